"""Attention of a single query straight from the tokens: the last layer, of which only the class token is wanted.

``q·(W_K x_n) = (W_Kᵀ q)·x_n`` and ``Σ_n α_n W_V x_n = W_V (Σ_n α_n x_n)``: keys and values are never formed. With
``F = W_Kᵀ q / √E`` of every head (small, by torch in float32) what is left is two products with the tokens of an image,
``alpha = softmax(F Xᵀ)`` and ``mixed = alpha X``, of as many columns as there are heads, and ``z = W_V mixed + b_V``.

Bound by memory: for ViT-L/14 at batch 256 the kernels read the tokens twice in bfloat16, 270 MB. Torch needs a float32
copy for sums of that accuracy, written once and read twice, 950 MB in all. The tensor cores multiply the tokens as they
are: bfloat16 products are exact and summed in float32, so it is enough to write the other operand, which is float32, as
the sum of three bfloat16 numbers.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import dot, dot_precision, rounded
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import INTERPRETED, Config, Launch, power_of_two, unit_stride, unsupported_dtypes

Cut = tuple[Config, Config]
"""How the programs of the first and of the second product are cut."""

# From a model; not timed on a GPU yet. Small tiles: a batch of 8 has to fill the GPU too.
CUTS: tuple[Cut, ...] = (
    (Config({"BLOCK_N": 64, "BLOCK_W": 64}, warps=4, stages=4), Config({"BLOCK_W": 128, "BLOCK_N": 32}, 4, 4)),
    (Config({"BLOCK_N": 16, "BLOCK_W": 64}, warps=4, stages=4), Config({"BLOCK_W": 64, "BLOCK_N": 32}, 4, 4)),
)
FLOAT16_CUTS: tuple[Cut, ...] = (
    (Config({"BLOCK_N": 64, "BLOCK_W": 64}, warps=4, stages=3), Config({"BLOCK_W": 64, "BLOCK_N": 32}, 4, 4)),
)
FLOAT32_CUTS: tuple[Cut, ...] = (
    (Config({"BLOCK_N": 32, "BLOCK_W": 32}, warps=4, stages=2), Config({"BLOCK_W": 32, "BLOCK_N": 32}, 4, 2)),
)
"""Exact float32 has no tensor cores: tiles whose products, unrolled, fit the registers."""

MOST_HEADS = 64


@triton.jit
def _product(a, b, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` in float32 for ``a`` in the tokens' dtype and ``b`` in float32  [ROWS, COLUMNS].

    bfloat16: b as the sum of three numbers of 8 bits, which are the 24 bits it has, the smallest summed first. float16
    fits TF32, so three TF32 products are as exact.
    """
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    if a.dtype == tl.bfloat16:
        high = rounded(b, tl.bfloat16)
        b -= high.to(tl.float32)
        middle = rounded(b, tl.bfloat16)
        low = rounded(b - middle.to(tl.float32), tl.bfloat16)
        b_sum = dot(a, low, b_sum, PRECISION)
        b_sum = dot(a, middle, b_sum, PRECISION)
        b_sum = dot(a, high, b_sum, PRECISION)
    else:
        b_sum = dot(a.to(tl.float32), b, b_sum, PRECISION)
    return b_sum


@triton.jit
def _scores_kernel(
    p_folded,
    p_tokens,
    p_scores,
    heads,
    N,
    W,
    s_folded_b,
    s_folded_h,
    s_b,
    s_n,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """``scores[b,h,n] = F[b,h]·x[b,n]``: one program per image and BLOCK_N tokens."""
    tiles = tl.cdiv(N, BLOCK_N)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_h = tl.arange(0, BLOCK_H)
    o_w = tl.arange(0, BLOCK_W)
    m_n, m_h = o_n < N, o_h < heads
    p_rows = p_tokens + image * s_b + (o_n.to(tl.int64) * s_n)[:, None]
    p_columns = p_folded + image * s_folded_b + (o_h.to(tl.int64) * s_folded_h)[None, :]
    b_score = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
    for start in tl.range(0, W, BLOCK_W):
        m_w = start + o_w < W
        b_token = tl.load(p_rows + (start + o_w)[None, :], mask=m_n[:, None] & m_w[None, :], other=0.0)
        b_folded = tl.load(p_columns + (start + o_w)[:, None], mask=m_w[:, None] & m_h[None, :], other=0.0)
        b_score += _product(b_token, b_folded, BLOCK_N, BLOCK_H, PRECISION)  # rounded to nearest between tiles
    p_scores += (image * heads + o_h[None, :]) * N + o_n[:, None]
    tl.store(p_scores, b_score, mask=m_n[:, None] & m_h[None, :])


@triton.jit
def _mixed_kernel(
    p_alpha,
    p_tokens,
    p_mixed,
    heads,
    N,
    W,
    s_b,
    s_n,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``mixed[b,h,w] = Σ_n alpha[b,h,n] x[b,n,w]``: one program per image and BLOCK_W columns."""
    tiles = tl.cdiv(W, BLOCK_W)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    o_w = (tl.program_id(0) % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    o_h = tl.arange(0, BLOCK_H)
    o_n = tl.arange(0, BLOCK_N)
    m_w, m_h = o_w < W, o_h < heads
    p_columns = p_tokens + image * s_b + o_w[None, :]
    p_weights = p_alpha + (image * heads + o_h[None, :]) * N
    b_mixed = tl.zeros([BLOCK_W, BLOCK_H], tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        m_n = start + o_n < N
        o_row = tl.cast(start + o_n, tl.int64) * s_n
        b_token = tl.load(p_columns + o_row[:, None], mask=m_n[:, None] & m_w[None, :], other=0.0)
        b_alpha = tl.load(p_weights + (start + o_n)[:, None], mask=m_n[:, None] & m_h[None, :], other=0.0)
        b_mixed += _product(tl.trans(b_token), b_alpha, BLOCK_W, BLOCK_H, PRECISION)
    p_mixed += (image * heads + o_h[None, :]) * W + o_w[:, None]
    tl.store(p_mixed, b_mixed, mask=m_w[:, None] & m_h[None, :])


def plan(folded: Tensor, tokens: Tensor, alpha: Tensor, mixed: Tensor, cut: Cut) -> tuple[Launch, Launch]:
    """The launches that compute ``folded @ tokensᵀ`` into ``alpha``, and ``alpha @ tokens`` into ``mixed``.

    Args:
        folded: ``[B, H, W]``, float32, contiguous last axis.
        tokens: ``[B, N, W]``, contiguous last axis.
        alpha: ``[B, H, N]``, float32, contiguous: the first writes scores, the second reads weights.
        mixed: ``[B, H, W]``, float32, contiguous.
        cut: how the programs of each are cut.
    """
    images, count, width = tokens.shape
    heads = folded.shape[1]
    sizes = {"heads": heads, "N": count, "W": width}
    strides = {"s_b": tokens.stride(0), "s_n": tokens.stride(1)}
    precision = "tf32x3" if tokens.dtype == torch.float16 else dot_precision(tokens.dtype)
    constants = {"PRECISION": precision, "BLOCK_H": power_of_two(heads, 16)}
    scores = Launch(
        kernel=_scores_kernel,
        grid=(images * ceil(count / cut[0].blocks["BLOCK_N"]),),
        arguments={
            "p_folded": folded,
            "p_tokens": tokens,
            "p_scores": alpha,
            **sizes,
            "s_folded_b": folded.stride(0),
            "s_folded_h": folded.stride(1),
            **strides,
        },
        constants=constants,
        config=cut[0],
    )
    mix = Launch(
        kernel=_mixed_kernel,
        grid=(images * ceil(width / cut[1].blocks["BLOCK_W"]),),
        arguments={"p_alpha": alpha, "p_tokens": tokens, "p_mixed": mixed, **sizes, **strides},
        constants=constants,
        config=cut[1],
    )
    return scores, mix


def cuts(tokens: Tensor) -> tuple[Cut, ...]:
    """The cuts worth timing for ``tokens``, the preferred first."""
    return {torch.float32: FLOAT32_CUTS, torch.float16: FLOAT16_CUTS}.get(tokens.dtype, CUTS)


def run(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor, cut: Cut | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.query_row_from_tokens`: ``z [B, H, E]`` and ``alpha [B, H, N]`` in float32."""
    tokens = unit_stride(tokens)
    images, heads, head_dim = query.shape
    scores = tokens.new_empty((images, heads, tokens.shape[1]), dtype=torch.float32)
    mixed = tokens.new_empty((images, heads, tokens.shape[2]), dtype=torch.float32)
    folded = torch.einsum("bhe,hew->bhw", query.float() * head_dim**-0.5, key_weight.float())
    first, _ = plan(unit_stride(folded), tokens, scores, mixed, cut or cuts(tokens)[0])
    first.run()
    alpha = scores.softmax(-1)
    _, second = plan(folded, tokens, alpha, mixed, cut or cuts(tokens)[0])
    second.run()
    z = torch.einsum("bhw,hew->bhe", mixed, value_weight.float()) + value_bias.float()
    return z.contiguous(), alpha


def unsupported_reasons(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor
) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    weights = {"key_weight": key_weight, "value_weight": value_weight, "value_bias": value_bias}
    reasons = unsupported_dtypes(query=query, tokens=tokens, **weights)
    if query.shape[1] > MOST_HEADS:
        reasons.append(f"{query.shape[1]} heads are more than {MOST_HEADS}")
    return reasons


def variants(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor
) -> Sequence[Variant]:
    """One variant per cut."""
    worth_timing = cuts(tokens)[: 1 if INTERPRETED else None]
    return [(f"{first}+{second}", partial(run, cut=(first, second))) for first, second in worth_timing]


IMPLEMENTATION = Implementation(run, unsupported_reasons, variants)
