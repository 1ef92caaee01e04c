"""Attention of one query in plain torch."""

import torch
from torch import Tensor

from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import accumulation_dtype


def query_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.query_row`."""
    acc_dtype = accumulation_dtype(key.dtype)
    alpha = row_logits(query.to(acc_dtype) * query.shape[-1] ** -0.5, key.to(acc_dtype)).softmax(-1)
    z = (value.to(acc_dtype) * alpha.transpose(1, 2)[..., None]).sum(1)  # [B, H, E]
    return z, alpha


def row_logits(query: Tensor, key: Tensor) -> Tensor:
    """``q·k`` of one query, ``[B, H, E] × [B, N, H, E] → [B, H, N]``.

    As a product and a sum: a matrix product with one column would copy the strided keys first, at twice the time.
    """
    return (key * query[:, None]).sum(-1).transpose(1, 2).contiguous()


def query_row_from_tokens(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.query_row_from_tokens` without forming keys or values.

    ``q·(W_K x_n) = (W_Kᵀ q)·x_n`` and ``Σ_n α_n W_V x_n = W_V (Σ_n α_n x_n)``: both products touch the tokens once, at
    ``H`` columns instead of ``2·W``.
    """
    acc_dtype = accumulation_dtype(tokens.dtype)
    folded = torch.einsum("bhe,hew->bhw", query.to(acc_dtype), key_weight.to(acc_dtype))
    tokens = tokens.to(acc_dtype)
    logits = (folded * query.shape[-1] ** -0.5) @ tokens.transpose(1, 2)  # [B, H, N]
    alpha = logits.softmax(-1)
    mixed = alpha @ tokens  # [B, H, W]
    z = torch.einsum("bhw,hew->bhe", mixed, value_weight.to(acc_dtype)) + value_bias.to(acc_dtype)
    return z.contiguous(), alpha


IMPLEMENTATIONS = {
    "query_row": Implementation(query_row),
    "query_row_from_tokens": Implementation(query_row_from_tokens),
}
