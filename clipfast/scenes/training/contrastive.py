"""Losses between images and texts, with known truth of every pair."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.scenes.training.heads import attribute_targets
from clipfast.scenes.vocabulary import ATTRIBUTES

MAX_SCALE = 50.0
"""Upper bound of the learnt logit scale."""


def text_features(model: Any, tokens: Tensor) -> Tensor:
    """Unit text embeddings [n, embed] of tokens [n, length]; length may be below the context length.

    open_clip's encode_text needs the full context. Attention is causal and the end token is pooled, so
    later tokens have no effect, and shorter rows save time.
    """
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)
    last = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=1)]
    return F.normalize(last @ model.text_projection, dim=-1)


def image_features(model: Any, class_tokens: Tensor) -> Tensor:
    """Unit image embeddings [n, embed] from the class tokens after the vision tower's last norm."""
    return F.normalize(class_tokens @ model.visual.proj, dim=-1)


def pair_loss(images: Tensor, texts: Tensor, truth: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss with many positives: every true pair is one, so there are no false negatives.

    The target of an image is uniform over its true captions, and that of a caption over the images it
    describes. Every image and every caption has at least one true partner in the batch.

    Args:
        images: [B, embed] unit vectors.
        texts: [M, embed] unit vectors.
        truth: [B, M] bool.
        scale: scalar factor on the cosines.
    """
    logits = scale * images @ texts.T
    true = truth.float()
    per_image = -(true * logits.log_softmax(dim=1)).sum(dim=1) / true.sum(dim=1).clamp(min=1)
    per_text = -(true * logits.log_softmax(dim=0)).sum(dim=0) / true.sum(dim=0).clamp(min=1)
    # subtract the entropy of the targets, so that a perfect model has loss zero
    floor = true.sum(dim=1).clamp(min=1).log().mean() + true.sum(dim=0).clamp(min=1).log().mean()
    return (per_image.mean() + per_text.mean() - floor) / 2


def prompt_loss(images: Tensor, texts: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of zero-shot classification, mean over attributes, and the accuracy of each attribute.

    Args:
        images: [B, embed] unit vectors.
        texts: [C, embed] unit vectors, one for each class of every attribute in order.
        codes: [B, 14] int64 rows of `encode_scene`.
        scale: scalar factor on the cosines.
    """
    losses, accuracies = [], {}
    start = 0
    for name, values in ATTRIBUTES.items():
        logits = scale * images @ texts[start : start + len(values)].T
        start += len(values)
        first, second = attribute_targets(name, codes)
        clear = (first >= 0) & (second < 0)
        if bool(clear.any()):
            losses.append(F.cross_entropy(logits[clear], first[clear]))
            accuracies[name] = float((logits.argmax(dim=1) == first)[clear].float().mean())
    return torch.stack(losses).mean(), accuracies
