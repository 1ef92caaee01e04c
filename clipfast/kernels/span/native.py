"""TEXTSPAN in C++ for the CPU (``csrc/span.cpp``)."""

import torch
from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.dispatch import Implementation


def span(texts: Tensor, factor: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.span`, groups in parallel; computed in float64 for texts in float32, too."""
    groups, _, rank = texts.shape
    picks = torch.full((groups, size), -1, dtype=torch.long)
    variance, directions = texts.new_zeros(groups, size), texts.new_zeros(groups, size, rank)
    native.library().span(texts, factor.double().contiguous(), floor, picks, variance, directions)
    return picks, variance, directions


def _unsupported_reasons(texts: Tensor, factor: Tensor, size: int, floor: float) -> list[str]:
    return native.library().span_unsupported_reasons(texts, factor)


IMPLEMENTATIONS = {"span": Implementation(span, _unsupported_reasons)}
