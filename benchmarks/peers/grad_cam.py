"""pytorch-grad-cam: GradCAM on the last layer's attention, and on its tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipfast
from benchmarks import cases
from benchmarks.peers.question import Answer, Inputs, Peer, Question, Side
from clipfast.analyses.relevance import gradcam
from clipfast.compat.grad_cam import GradCAM as OurGradCAM
from clipfast.compat.relevance import enlarged, spread


class Exposed(nn.Module):
    """An ``nn.MultiheadAttention`` with a module whose output is the attention: GradCAM needs one as its layer.

    Attributes:
        weights: gives the attention, ``[B, H, N, N]``.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention, self.weights = attention, nn.Identity()

    def forward(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        """Attention of ``[B, N, W]`` to itself."""
        heads = self.attention.num_heads
        packed = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
        weights = self.weights((query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1))
        return (self.attention.out_proj((weights @ value).transpose(1, 2).flatten(2)),)


def _our_attention(inputs: Inputs) -> Side:
    tower = clipfast.wrap(inputs.vision.visual).tower
    texts = _texts(inputs)
    return Side(lambda: spread(enlarged(spread(gradcam(tower, inputs.images, texts)), tower.image_size)))


def _texts(inputs: Inputs) -> Tensor:
    """A text per image whose map is not zero, ``[B, D]``: where that of one is, its opposite's is not."""
    text = inputs.texts[0]
    seen = gradcam(clipfast.wrap(inputs.vision.visual).tower, inputs.images, text).amax((1, 2)) > 0
    return torch.where(seen[:, None], text, -text)


def _attention(inputs: Inputs) -> Side:
    visual: Any = inputs.vision.visual
    grid, last, texts = clipfast.wrap(visual).tower.grid, visual.transformer.resblocks[-1], _texts(inputs)
    last.attn = Exposed(last.attn)
    return _theirs(inputs, texts, last.attn.weights, lambda rows: rows[:, :, 0, 1:].unflatten(-1, grid))


def _our_tokens(inputs: Inputs) -> Side:
    method = OurGradCAM(clipfast.wrap(inputs.vision.visual), texts=inputs.texts[:1])
    targets = [0] * len(inputs.images)
    return Side(lambda: torch.from_numpy(method(inputs.images, targets)))


def _tokens(inputs: Inputs) -> Side:
    visual: Any = inputs.vision.visual
    grid, last = clipfast.wrap(visual).tower.grid, visual.transformer.resblocks[-1]
    texts = inputs.texts[:1].expand(len(inputs.images), -1)
    return _theirs(inputs, texts, last.ln_1, lambda tokens: tokens[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2))


def _theirs(inputs: Inputs, texts: Tensor, layer: nn.Module, reshape: Callable[[Tensor], Tensor]) -> Side:
    from pytorch_grad_cam import GradCAM

    visual: Any = inputs.vision.visual
    visual.requires_grad_(False)
    visual.transformer.resblocks[-1].requires_grad_(True)
    method = GradCAM(visual, [layer], reshape)
    targets = [partial(_similarity, text=text) for text in texts]

    def answer() -> Answer:
        return torch.from_numpy(method(inputs.images, targets))

    return Side(answer)


def _similarity(embedding: Tensor, text: Tensor) -> Tensor:
    return cases.unit(embedding) @ text


PEER = Peer(
    "pytorch-grad-cam",
    "grad-cam",
    "pytorch_grad_cam",
    (
        Question(
            "GradCAM on attention",
            "GradCAM of the class token's attention in the last layer for a text, [B, height, width] from 0 to 1",
            "open_clip's attention has no module that gives its weights, so the last one is written out for the "
            "package. Weights before the last block are frozen, so that its backward ends there, as clipfast's does.",
            _our_attention,
            _attention,
        ),
        Question(
            "GradCAM on tokens",
            "GradCAM of what the last block's attention reads for one text, [B, height, width] from 0 to 1",
            "The package's own choice for vision transformers: the layer is the last block's first norm, without the "
            "class token. Weights before the last block are frozen here, too.",
            _our_tokens,
            _tokens,
        ),
    ),
)
