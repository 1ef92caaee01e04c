"""What every operation means: eager torch, one line of mathematics after the other.

These functions *are* the definitions. Tests run them in float64 and hold every backend to them. They may allocate
whatever they like and are never called on a user's images.

Axes: ``B`` images, ``N`` tokens, ``H`` heads, ``E`` head_dim, ``T`` texts, ``D`` embed_dim, ``W`` width, ``L`` layers.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Row = Literal["cls", "mean"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
LARGEST_FLOAT8 = 448.0
"""The largest number of ``float8_e4m3fn``."""
EQUAL = 4e-15
"""Variances that differ by less of the first pick's are equal: float64 computes those of one text twice no closer."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are carried in: float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def weighted_rows(qkv: Tensor, weights: Tensor) -> Tensor:
    """Sums of attention rows, ``rows[b,g,h,m] = Σ_n weights[b,g,n] softmax_m(q[b,n,h]·k[b,m,h] / √E)``.

    Args:
        qkv: ``[B, N, 3, H, E]``; the values are not used.
        weights: ``[B, G, N]``, of either sign.

    Returns:
        ``[B, G, H, N]``.
    """
    query, key, _ = qkv.unbind(2)
    logits = torch.einsum("bnhe,bmhe->bhnm", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bgn,bhnm->bghm", weights, logits.softmax(-1))


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


def text_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, heads: Tensor | None = None) -> Tensor:
    """Per-token scores summed over heads: ``map[b,n,t] = Σ_h alpha[b,h,n] <v[b,n,h], U[h,:,t]>``.

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        text_basis: ``U [H, E, T]``.
        heads: which heads to sum over, ``[S]``; all for None, zero for none.

    Returns:
        ``[B, N, T]``.
    """
    if heads is not None:
        alpha, value, text_basis = alpha[:, heads], value[:, :, heads], text_basis[heads]
    return torch.einsum("bhn,bnhe,het->bnt", alpha, value, text_basis)


def layered_text_maps(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None = None
) -> Tensor:
    """:func:`text_maps` summed over layers, too.

    Args:
        alpha: ``[B, L, H, N]``.
        values: ``L`` times ``[B, N, H, E]``.
        text_basis: ``[L, H, E, T]``.
        heads: which (layer, head) pairs to sum over, as ``layer · H + head``, ``[S]``; all for None.

    Returns:
        ``[B, N, T]``.
    """
    value = torch.stack(tuple(values), 2)  # [B, N, L, H, E]
    return text_maps(alpha.flatten(1, 2), value.flatten(2, 3), text_basis.flatten(0, 1), heads)


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


def token_contributions(
    alpha: Tensor, value: Tensor, basis: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The part of each token through each head, ``(alpha[b,h,n] · v[b,n,h] @ M[h] + shift[b]) · scale[b]``.

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        basis: ``M [H, E, D]``.
        shift: ``[B, D]``, the token's share of what a head adds besides its values; none for None.
        scale: ``[B]``, ``1 / (σ n)``; 1 for None.

    Returns:
        ``[B, N, H, D]``: large; only for callers who ask for exactly this.
    """
    out = torch.einsum("bhn,bnhe,hed->bnhd", alpha, value, basis)
    if shift is not None:
        out = out + shift[:, None, None]
    return out if scale is None else out * scale[:, None, None, None]


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


def moments(codes: Tensor, shared: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """What a batch adds to the first two moments of every head's codes, about a fixed centre.

    With ``x[b,g] = [codes[b,g], shared[b]] − centre[g]``: ``Σ_b x`` and ``Σ_b x xᵀ``. Mean and covariance follow at any
    time, and sums of shards add up; the centre (any point near the mean) keeps them from cancelling. Source: Chan,
    Golub & LeVeque 1983, "shifted data".

    Args:
        codes: ``[B, G, E]``, codes of ``G`` heads.
        shared: ``[B, X]``, entries that are the same for every head.
        centre: ``[G, E + X]``.

    Returns:
        ``[G, E + X]`` and ``[G, E + X, E + X]``.
    """
    x = torch.cat([codes, shared[:, None].expand(-1, codes.shape[1], -1)], 2) - centre
    return x.sum(0), torch.einsum("bgi,bgj->gij", x, x)


def span(texts: Tensor, factor: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """TEXTSPAN: the texts that, one after the other, explain most of what is left of a head's variance.

    With ``S = L Lᵀ`` and texts as rows of ``A``, repeat: ``j = argmax_t A_t S A_tᵀ``, ``w = A_j / ‖A_j‖``,
    ``S ← (I − wwᵀ) S (I − wwᵀ)``, ``A ← A − (A w) wᵀ``. Of equals the first is taken, and equal is what is so within
    rounding: a text that a pool holds twice need not give the same bits. Source: arXiv 2310.05916, algorithm 1, from
    moments instead of data.

    Args:
        texts: ``A [G, T, R]``, texts in coordinates of each head's span.
        factor: ``L [G, R, R]``, computed in its dtype: that of the texts, or float64.
        size: how many to pick.
        floor: stop where the variance explained falls to this share of the first pick's.

    Returns:
        ``picks [G, size]`` (−1 after the stop), ``variance [G, size]`` that each pick explains (0 after the stop) and
        the orthonormal ``directions [G, size, R]`` (0 after the stop).
    """
    groups, _, rank = texts.shape
    picks = torch.full((groups, size), -1, dtype=torch.long, device=texts.device)
    variances, directions = texts.new_zeros(groups, size), texts.new_zeros(groups, size, rank)
    for group in range(groups):
        left, covariance = texts[group].to(factor.dtype, copy=True), factor[group] @ factor[group].T
        first = left.new_zeros(())
        for step in range(min(size, rank)):
            variance = ((left @ covariance) * left).sum(1)
            best = variance.max()
            if not best > floor * first.clamp_min(torch.finfo(left.dtype).tiny):
                break
            first = first if step else best
            pick = int((variance >= best - EQUAL * first).nonzero()[0])
            direction = left[pick] / left[pick].norm()
            picks[group, step], variances[group, step], directions[group, step] = pick, variance[pick], direction
            left = left - torch.outer(left @ direction, direction)
            away = torch.eye(rank, dtype=left.dtype, device=texts.device) - torch.outer(direction, direction)
            covariance = away @ covariance @ away
    return picks, variances, directions


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer, ``x Wᵀ + b``.

    Args:
        x: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]``, or None.

    Returns:
        ``[..., M]``.
    """
    product = x @ weight.T
    return product if bias is None else product + bias


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """The first half of an MLP, ``f(x Wᵀ + b)``.

    ``gelu``: ``x Φ(x)``, exactly; ``gelu_tanh``: its tanh approximation; ``quick_gelu``: ``x · sigmoid(1.702 x)``.

    Args:
        x: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]``.
        activation: ``f``.

    Returns:
        ``[..., M]``.
    """
    return activated(x @ weight.T + bias, activation)


def activated(hidden: Tensor, activation: Activation) -> Tensor:
    """``f`` of :func:`linear_activation`, of every number."""
    if activation == "quick_gelu":
        return hidden * torch.sigmoid(1.702 * hidden)
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")


def quantize_rows(x: Tensor, activation: Activation | None = None) -> tuple[Tensor, Tensor]:
    """Rows rounded to float8 (e4m3) so that the largest number of each is the largest there is, 448.

    ``s = max_k |f(x_k)| / 448`` and ``v_k = round(f(x_k) / s)``; ``s = 1`` for a row of zeros.

    Args:
        x: ``[..., K]``.
        activation: ``f``, None for none.

    Returns:
        ``v [..., K]`` as bits in uint8, and ``s [...]``.
    """
    hidden = x if activation is None else activated(x, activation)
    scale = hidden.abs().amax(-1) / LARGEST_FLOAT8
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (hidden / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), scale


def scaled_linear(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A linear layer of rows in float8, ``(s v) (t W)ᵀ + b`` with a scale for every row of ``v`` and of ``W``.

    Args:
        values: ``v [..., K]`` as bits in uint8.
        scale: ``s [...]``.
        weight: ``W [M, K]`` as bits in uint8.
        weight_scale: ``t [M]``.
        bias: ``b [M]``, or None.

    Returns:
        ``[..., M]``.
    """
    rows, columns = (
        bits.view(torch.float8_e4m3fn).to(factor.dtype) * factor[..., None]
        for bits, factor in ((values, scale), (weight, weight_scale))
    )
    return linear(rows, columns, bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Tensor:
    """Rotary positions of queries and keys, ``x·cos + turned(x)·sin``, with ``turned(x) = (−x₂, x₁)`` of every pair.

    Args:
        x: ``[B, N, S, H, E]``: ``S`` is 2 for queries and keys.
        cos: ``[H, N, E]``, or ``[1, N, E]`` for all heads.
        sin: as ``cos``.
        halves: whether the entries of a pair are half a head apart; else they are neighbours.

    Returns:
        ``[B, N, S, H, E]``.
    """
    if halves:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    cos, sin = cos.transpose(0, 1)[:, None], sin.transpose(0, 1)[:, None]  # [N, 1, H, E]
    return x * cos + turned * sin


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The residual stream after a term was added, and its LayerNorm: ``r = x + delta``, ``(r + c − μ)/σ · γ + β``.

    Args:
        x: ``[..., W]``.
        delta: ``[..., W]``, None for nothing.
        weight: ``γ [W]``.
        bias: ``β [W]``.
        eps: ``σ = √(var + eps)``.
        carried: ``c [W]``, what belongs to every row of the stream and was never added to it; None for nothing.

    Returns:
        ``r`` and the LayerNorm of ``r + c``, both ``[..., W]``.
    """
    x = x if delta is None else x + delta
    whole = x if carried is None else x + carried
    mean, std = layer_statistics(whole, eps)
    return x, (whole - mean[..., None]) / std[..., None] * weight + bias


def add_linear(x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """A product added to the residual stream, ``x + h Wᵀ``.

    Args:
        x: ``[..., W]``.
        h: ``[..., K]``.
        weight: ``[W, K]``.

    Returns:
        ``[..., W]``.
    """
    return x + h @ weight.T


def linear_unrounded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of a few rows, ``x Wᵀ + b`` in the dtype that sums are carried in.

    Args:
        x: ``[R, K]``.
        weight: ``[M, K]``.
        bias: ``[M]``.

    Returns:
        ``[R, M]``, float32, float64 for float64.
    """
    dtype = accumulation_dtype(weight.dtype)
    return x.to(dtype) @ weight.to(dtype).T + bias.to(dtype)
