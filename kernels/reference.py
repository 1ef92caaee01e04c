"""What every operation means: eager torch, one line of mathematics after the other.

These functions *are* the definitions. Tests run them in float64 and hold every backend to them. They may allocate
whatever they like and are never called on a user's images.

Axes: ``B`` images, ``N`` tokens, ``H`` heads, ``E`` head_dim, ``T`` texts, ``D`` embed_dim.
"""

from typing import Literal

import torch
from torch import Tensor

Row = Literal["cls", "mean"]


def attention(qkv: Tensor, row: Row = "cls") -> tuple[Tensor, Tensor]:
    """Self-attention over packed queries, keys and values, and the attention row that the pooled token reads with.

    ``out[b,n,h] = Σ_m softmax_m(q[b,n,h]·k[b,m,h] / √E) v[b,m,h]``

    Args:
        qkv: ``[B, N, 3, H, E]``.
        row: ``"cls"``: the weights of query 0. ``"mean"``: the mean weights of queries 1 … N−1 (average pooling over
            the patches).

    Returns:
        ``out [B, N, H, E]`` and ``alpha [B, H, N]``; every row of alpha sums to 1.
    """
    query, key, value = qkv.unbind(2)
    logits = torch.einsum("bnhe,bmhe->bhnm", query, key) * query.shape[-1] ** -0.5
    weights = logits.softmax(-1)
    out = torch.einsum("bhnm,bmhe->bnhe", weights, value)
    alpha = weights[:, :, 0] if row == "cls" else weights[:, :, 1:].mean(2)
    return out, alpha


def query_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of one query per image and head: ``alpha = softmax(q·k/√E)``, ``z = Σ_n alpha_n v_n``.

    Args:
        query: ``[B, H, E]``.
        key: ``[B, N, H, E]``.
        value: ``[B, N, H, E]``.

    Returns:
        ``z [B, H, E]`` and ``alpha [B, H, N]``.
    """
    logits = torch.einsum("bhe,bnhe->bhn", query, key) * query.shape[-1] ** -0.5
    alpha = logits.softmax(-1)
    return torch.einsum("bhn,bnhe->bhe", alpha, value), alpha


def query_row_from_tokens(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`query_row` where keys and values are linear in ``tokens`` and need not exist.

    ``k_n = W_K x_n (+ b_K, which the softmax cancels)`` and ``v_n = W_V x_n + b_V``.

    Args:
        query: ``[B, H, E]``.
        tokens: ``[B, N, W]``.
        key_weight: ``[H, E, W]``.
        value_weight: ``[H, E, W]``.
        value_bias: ``[H, E]``.

    Returns:
        ``z [B, H, E]`` and ``alpha [B, H, N]``.
    """
    key = torch.einsum("bnw,hew->bnhe", tokens, key_weight)
    value = torch.einsum("bnw,hew->bnhe", tokens, value_weight) + value_bias
    return query_row(query, key, value)


def text_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> Tensor:
    """Per-token scores summed over heads: ``map[b,n,t] = Σ_h alpha[b,h,n] <v[b,n,h], U[h,:,t]>``.

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        text_basis: ``U [H, E, T]``.

    Returns:
        ``[B, N, T]``.
    """
    return torch.einsum("bhn,bnhe,het->bnt", alpha, value, text_basis)


def text_maps_from_tokens(
    alpha: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor, text_basis: Tensor
) -> Tensor:
    """:func:`text_maps` where values are linear in ``tokens`` and need not exist, ``v_n = W_V x_n + b_V``.

    Args:
        alpha: ``[B, H, N]``.
        tokens: ``[B, N, W]``.
        value_weight: ``[H, E, W]``.
        value_bias: ``[H, E]``.
        text_basis: ``[H, E, T]``.

    Returns:
        ``[B, N, T]``.
    """
    value = torch.einsum("bnw,hew->bnhe", tokens, value_weight) + value_bias
    return text_maps(alpha, value, text_basis)


def head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> Tensor:
    """:func:`text_maps` before the sum over heads, ``[B, H, N, T]``."""
    return torch.einsum("bhn,bnhe,het->bhnt", alpha, value, text_basis)


def token_contributions(alpha: Tensor, value: Tensor, basis: Tensor) -> Tensor:
    """The part of each token through each head, ``alpha[b,h,n] · v[b,n,h] @ M[h]``.

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        basis: ``M [H, E, D]``.

    Returns:
        ``[B, N, H, D]``: large; only for callers who ask for exactly this.
    """
    return torch.einsum("bhn,bnhe,hed->bnhd", alpha, value, basis)


def layer_statistics(residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that a LayerNorm would use: ``μ = mean(r)``, ``σ = √(var(r) + ε)``, biased.

    Args:
        residual: ``[B, W]``.
        eps: the LayerNorm's ε.

    Returns:
        ``mean [B]`` and ``std [B]``.
    """
    mean = residual.mean(-1)
    variance = (residual - mean[..., None]).square().mean(-1)
    return mean, (variance + eps).sqrt()
