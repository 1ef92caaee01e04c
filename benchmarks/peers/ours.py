"""clipfast's sides of the questions."""

import torch
import torch.nn.functional as F
from torch import Tensor

import clipfast
from benchmarks.peers.question import Inputs, Side
from clipfast.analyses.gradients import attention_matrices


def heads(inputs: Inputs) -> Side:
    """Every head's contribution, ``[B, L, H, D]``."""
    model = clipfast.wrap(inputs.vision.visual)
    return Side(lambda: model.decompose(inputs.images).heads())


def pooled_attention(inputs: Inputs) -> Side:
    """The class token's row of attention, ``[B, L, H, N]``."""
    model = clipfast.wrap(inputs.vision.visual)
    return Side(lambda: model.decompose(inputs.images, attention=True).attention)


def patterns(inputs: Inputs) -> Side:
    """Every layer's attention, ``[B, H, N, N]`` each."""
    tower = clipfast.wrap(inputs.vision.visual).tower
    return Side(lambda: list(attention_matrices(tower, inputs.images)))


def heat(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``[B, rows, columns]`` as other packages draw them: bilinear in the image's size, from 0 to 1 per image."""
    upsampled = F.interpolate(maps[:, None], size, mode="bilinear")[:, 0]
    low, high = upsampled.amin((1, 2), keepdim=True), upsampled.amax((1, 2), keepdim=True)
    return (upsampled - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
