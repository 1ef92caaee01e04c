"""pytorch-grad-cam: GradCAM on the last layer's attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clipfast
from benchmarks import cases
from benchmarks.peers.ours import heat
from benchmarks.peers.question import Answer, Inputs, Peer, Question, Side
from clipfast.analyses.relevance import gradcam


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


def _ours(inputs: Inputs) -> Side:
    tower = clipfast.wrap(inputs.vision.visual).tower
    return Side(lambda: heat(gradcam(tower, inputs.images, inputs.texts[0]), tower.image_size))


def _theirs(inputs: Inputs) -> Side:
    from pytorch_grad_cam import GradCAM

    visual: Any = inputs.vision.visual
    grid, text = clipfast.wrap(visual).tower.grid, inputs.texts[0]
    visual.requires_grad_(False)
    last = visual.transformer.resblocks[-1]
    last.attn = Exposed(last.attn)
    last.requires_grad_(True)
    method = GradCAM(visual, [last.attn.weights], lambda rows: rows[:, :, 0, 1:].unflatten(-1, grid))
    targets = [lambda embedding: cases.unit(embedding) @ text] * len(inputs.images)

    def answer() -> Answer:
        return torch.from_numpy(method(inputs.images, targets))

    return Side(answer)


PEER = Peer(
    "pytorch-grad-cam",
    "grad-cam",
    "pytorch_grad_cam",
    (
        Question(
            "GradCAM on attention",
            "GradCAM of the class token's attention in the last layer for one text, [B, height, width] from 0 to 1",
            "open_clip's attention has no module that gives its weights, so the last one is written out for the "
            "package. Weights before the last block are frozen, so that its backward ends there, as clipfast's does.",
            _ours,
            _theirs,
        ),
    ),
)
