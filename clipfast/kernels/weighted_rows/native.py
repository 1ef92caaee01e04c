"""Weighted sums of attention rows in C++ for the CPU (``csrc/weighted_rows.cpp``)."""

from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.dispatch import Implementation


def weighted_rows(qkv: Tensor, weights: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.weighted_rows`, images and heads in parallel."""
    images, tokens, _, heads, _ = qkv.shape
    out = weights.new_empty(images, weights.shape[1], heads, tokens)
    native.library().weighted_rows(native.contiguous_rows(qkv), weights.contiguous(), out)
    return out


def _unsupported_reasons(qkv: Tensor, weights: Tensor) -> list[str]:
    return native.library().weighted_rows_unsupported_reasons(qkv, weights)


IMPLEMENTATIONS = {"weighted_rows": Implementation(weighted_rows, _unsupported_reasons)}
