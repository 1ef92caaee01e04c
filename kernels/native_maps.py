"""Per-token scores of texts, the sums over heads in C++."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.native_linear import FORMATS, linear
from clipfast.kernels.text_maps import eager

TILE = 32
"""Texts are padded to multiples of this many, as ``csrc/text_maps.h`` wants."""


def text_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None = None) -> None:
    """Adds :func:`clipfast.kernels.reference.text_maps` to ``out [B, N, T]``, blocks of tokens side by side."""
    images, tokens, count, width = value.shape
    texts = text_basis.shape[2]
    if heads is not None:
        heads = heads.long().contiguous()
        count = len(heads)
    if not (out.numel() and count and width):
        return
    padded = -(-texts // TILE) * TILE
    basis = text_basis.new_zeros((*text_basis.shape[:2], padded), dtype=torch.float32)
    basis[..., :texts] = text_basis
    value = value if value.stride(3) == 1 else value.contiguous()
    alpha = alpha.float()
    native.call(
        "text_maps",
        FORMATS[value.dtype],
        alpha,
        *alpha.stride(),
        value,
        *value.stride()[:3],
        basis,
        heads,
        count,
        images,
        tokens,
        width,
        texts,
        padded,
        out,
    )


def layered_text_maps(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None = None
) -> Tensor:
    """:func:`clipfast.kernels.reference.layered_text_maps`, layer by layer."""
    images, layers, count, tokens = alpha.shape
    out = alpha.new_zeros((images, tokens, text_basis.shape[3]), dtype=torch.float32)
    for layer in range(layers):
        text_maps(alpha[:, layer], values[layer], text_basis[layer], out, eager.heads_of_layer(heads, layer, count))
    return out.to(alpha.dtype)


def text_maps_from_tokens(
    alpha: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor, text_basis: Tensor, out: Tensor
) -> None:
    """Adds :func:`clipfast.kernels.reference.text_maps_from_tokens` to ``out [B, N, T]``."""
    eager.text_maps_from_tokens(alpha, tokens, value_weight, value_bias, text_basis, out, project=linear)
