"""Rotary positions in C++ for the CPU (``csrc/rotate.cpp``)."""

from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.dispatch import Implementation


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> None:
    """:func:`clipfast.kernels.reference.rotate` in place, tokens in parallel."""
    native.library().rotate(x, native.float32(cos), native.float32(sin), halves)


def _unsupported_reasons(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> list[str]:
    return native.library().rotate_unsupported_reasons(x, cos, sin)


IMPLEMENTATIONS = {"rotate": Implementation(rotate, _unsupported_reasons)}
