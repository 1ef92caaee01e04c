"""Attention of one query in C++ for the CPU (``csrc/query_row.cpp``)."""

import torch
from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.dispatch import Implementation


def query_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.query_row`, images and heads in parallel."""
    images, tokens, heads, width = key.shape
    z = key.new_empty(images, heads, width, dtype=torch.float32)
    alpha = key.new_empty(images, heads, tokens, dtype=torch.float32)
    rows = native.contiguous_rows
    native.library().query_row(native.float32(query), rows(key), rows(value), z, alpha)
    if not width:  # every product is 0
        alpha.fill_(1 / tokens)
    return z, alpha


def _unsupported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return native.library().query_row_unsupported_reasons(query, key, value)


IMPLEMENTATIONS = {"query_row": Implementation(query_row, _unsupported_reasons)}
