"""Attention in C++ for the CPU (``csrc/attention.cpp``)."""

import torch
from torch import Tensor

from clipfast.kernels import buffers, native
from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import Row


def attention(qkv: Tensor, row: Row | None) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.attention`, images and heads in parallel; ``alpha`` is empty for ``row=None``.

    In bfloat16 with AVX512-BF16 the values are multiplied by weights rounded to bfloat16, and numbers below 2⁻¹²⁶ count
    as zero; the weights returned are those of float32.
    """
    images, tokens, _, heads, width = qkv.shape
    out = buffers.empty(qkv, images, tokens, heads, width)
    alpha = qkv.new_empty(images, heads, tokens if row is not None else 0, dtype=torch.float32)
    native.library().attention(native.contiguous_rows(qkv), row == "mean", out, None if row is None else alpha)
    return out, alpha


def _unsupported_reasons(qkv: Tensor, row: Row | None) -> list[str]:
    return native.library().attention_unsupported_reasons(qkv)


IMPLEMENTATIONS = {"attention": Implementation(attention, _unsupported_reasons)}
