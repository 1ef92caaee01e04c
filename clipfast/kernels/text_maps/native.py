"""Per-token scores of texts in C++ for the CPU (``csrc/text_maps.cpp``)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.linear.native import linear
from clipfast.kernels.text_maps import eager

TEXT_PADDING = 32
"""Texts are padded to multiples of this many, the widest tile of ``csrc/text_maps.h``."""


def text_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None = None) -> None:
    """Adds :func:`clipfast.kernels.reference.text_maps` to ``out [B, N, T]``, blocks of tokens in parallel."""
    texts = text_basis.shape[2]
    basis = text_basis.new_zeros((*text_basis.shape[:2], -(-texts // TEXT_PADDING) * TEXT_PADDING), dtype=torch.float32)
    basis[..., :texts] = text_basis
    if heads is not None:
        heads = heads.long().contiguous()
    native.library().text_maps(alpha.float(), native.contiguous_rows(value), basis, heads, out)


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


def _text_maps_reasons(
    alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None = None
) -> list[str]:
    return native.library().text_maps_unsupported_reasons(alpha, value, text_basis, out, heads)


def _layered_text_maps_reasons(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None
) -> list[str]:
    return native.library().layered_text_maps_unsupported_reasons(alpha, values, text_basis, heads)


def _text_maps_from_tokens_reasons(
    alpha: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor, text_basis: Tensor, out: Tensor
) -> list[str]:
    return native.library().text_maps_from_tokens_unsupported_reasons(
        alpha, tokens, value_weight, value_bias, text_basis, out
    )


IMPLEMENTATIONS = {
    "text_maps": Implementation(text_maps, _text_maps_reasons),
    "layered_text_maps": Implementation(layered_text_maps, _layered_text_maps_reasons),
    "text_maps_from_tokens": Implementation(text_maps_from_tokens, _text_maps_from_tokens_reasons),
}
