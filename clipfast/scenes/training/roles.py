"""Losses that give heads roles like those in large CLIP models.

In large models, the embedding depends mostly on the attention of the last layers, and many of those heads respond to
one property, such as colours, places or counts. A small tower does not need this and mixes all properties in every
head, which leaves an analysis nothing to find. `specialisation` penalises mixing without assigning heads to
attributes; `bypass` penalises information that does not pass through the heads.

Both project the terms of the embedding, with fixed statistics of the last norm, onto the differences between the class
texts of each attribute. The look-alikes are excluded, so that the data decide which heads distinguish them, by outline
or by background.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipfast.scenes.training.reading import Reading
from clipfast.scenes.vocabulary import ATTRIBUTES, LOOKALIKES


class Roles:
    """Variation of the terms of a batch's embeddings along the class texts of every attribute.

    Args:
        visual: open_clip's VisionTransformer.
        reading: the result of its forward.
        texts: [C, embed] unit vectors, one per class of every attribute, in order.
        late: number of last layers whose heads the losses use.
    """

    def __init__(self, visual: Any, reading: Reading, texts: Tensor, late: int) -> None:
        self._visual, self._reading, self._late = visual, reading, late
        readout = visual.ln_post.weight[:, None] * visual.proj
        self._readout = readout - readout.mean(0)  # the norm subtracts the mean of every term
        spread = reading.stream.var(1, unbiased=False).add(visual.ln_post.eps).sqrt()
        self._scale = 1 / (spread * (reading.tokens[:, 0] @ visual.proj).norm(dim=1))  # [B]
        parts = texts.split([len(values) for values in ATTRIBUTES.values()])
        kept = [
            part[[value not in LOOKALIKES for value in values]]
            for part, values in zip(parts, ATTRIBUTES.values(), strict=True)
        ]
        self._contrasts = torch.cat([_contrast(part) for part in kept])  # [classes, embed]
        self._sizes = [len(part) for part in kept]

    def specialisation(self) -> Tensor:
        """Mean entropy of the heads' variances over attributes: 0 if every head has one attribute, 1 if all equally.

        Heads are weighted by their variance, without a gradient through the weights.
        """
        energies = torch.cat([self._of_heads(layer) for layer in self._layers(late=True)])  # [heads, attributes]
        shares = energies / energies.sum(1, keepdim=True).clamp_min(1e-12)  # a head may have zero variance
        entropy = -(shares * (shares + 1e-9).log()).sum(1) / math.log(len(ATTRIBUTES))
        weights = (energies.sum(1) / energies.sum()).detach()
        return (weights * entropy).sum()

    def bypass(self) -> Tensor:
        """Standard deviation of the embedding along the class texts without the late heads, relative to the total.

        This is the mean over attributes. Standard deviations, unlike variances, keep a large gradient near zero, where
        even a weak signal is enough to classify by.
        """
        without_late = sum(self._reading.others, torch.zeros_like(self._reading.stream))
        for layer in self._layers(late=False):
            without_late = without_late + self._attention(layer).out_proj(self._reading.heads[layer].flatten(1))
        total = (self._reading.stream * self._scale[:, None]) @ self._readout @ self._contrasts.T
        part = (without_late * self._scale[:, None]) @ self._readout @ self._contrasts.T
        variances, totals = self._by_attribute(part.var(0)), self._by_attribute(total.var(0))
        return (variances / totals.detach()).add(1e-8).sqrt().mean()

    def _layers(self, *, late: bool) -> range:
        depth = len(self._reading.heads)
        first = max(0, depth - self._late)
        return range(first, depth) if late else range(first)

    def _attention(self, layer: int) -> Any:
        return self._visual.transformer.resblocks[layer].attn

    def _of_heads(self, layer: int) -> Tensor:
        """Variance of every head's logits over the batch, summed over the classes of each attribute."""
        outputs = self._reading.heads[layer] * self._scale[:, None, None]  # [B, heads, head width]
        weights = self._attention(layer).out_proj.weight.T.view(*outputs.shape[1:], -1)  # [heads, head width, width]
        logits = torch.einsum("bhe,hec->bhc", outputs, weights @ (self._readout @ self._contrasts.T))
        return self._by_attribute(logits.var(0))

    def _by_attribute(self, variances: Tensor) -> Tensor:
        """Sums over the classes of each attribute: [..., classes] to [..., attributes]."""
        return torch.stack([part.sum(-1) for part in variances.split(self._sizes, -1)], -1)


def _contrast(texts: Tensor) -> Tensor:
    """Class texts of an attribute minus their mean, scaled to norm 1 so that attributes have equal weight."""
    centred = texts - texts.mean(0)
    return centred / centred.norm()
