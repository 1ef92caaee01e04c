"""The mean attention row of the patches, from what the attention kernel keeps of each query.

``alpha[b,h,m] = 1/(N−1) Σ_{n≥1} exp(q_n·k_m/√E − max_n) / Σ_n``: a pooled token that averages over the patches reads
token m with this weight. The attention kernel's softmax runs along rows and these sums along columns, so it keeps every
query's maximum and inverse sum (two numbers, where their logarithm would cost the accuracy of large logits), and the
scores are computed a second time: half of the attention's products, and no ``[N, N]`` matrix is ever written.

Torch's attention keeps that logarithm, ``ln Σ_m exp(q·k_m/√E)``. In 16-bit formats it is exact enough: of logits of 100
it loses 1e-5, a hundredth of what bfloat16 rounds.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import dot, fma
from clipfast.kernels.launch import INTERPRETED, Config, Launch


@triton.jit
def weights(b_score, b_max, scale_log2, EXACT: tl.constexpr):
    """``exp(score·scale − max)``, to ``b_max`` as :func:`.attention` keeps it.

    EXACT: the maximum of the scores themselves, subtracted before anything is rounded. Else the maximum of the scaled
    scores, one instruction less: its rounding is a factor that all weights of a query share, so it cancels.
    """
    return tl.exp2((b_score - b_max) * scale_log2 if EXACT else fma(b_score, scale_log2, -b_max))


@triton.jit
def _mean_row_kernel(
    p_qkv,
    p_max,
    p_inverse,
    p_alpha,
    heads,
    N,
    s_b,
    s_n,
    s_part,
    s_h,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``alpha[m] = 1/(N−1) Σ_{n≥1} exp(q_n·k_m/√E − max_n) / sum_n``: one program per tile of BLOCK_M keys.

    Without ``p_inverse``, ``p_max`` holds the logarithm of the sum, ``max_n + ln sum_n``, and EXACT is not possible.
    """
    tiles = tl.cdiv(N, BLOCK_M)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    image, head = row // heads, row % heads
    o_head = image * s_b + head * s_h
    p_query = p_qkv + tl.multiple_of(o_head, ALIGNED)
    p_key = p_qkv + tl.multiple_of(o_head + s_part, ALIGNED)
    o_m = (program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_e = tl.arange(0, FIRST)[None, :]
    m_e = o_e < HEAD_DIM
    o_key = tl.minimum(o_m, N - 1).to(tl.int64)  # a repeated key has a weight of sensible size; a zero has none
    p_keys = p_key + tl.multiple_of(o_key * s_n, ALIGNED)[:, None]
    b_key = tl.load(p_keys + o_e, mask=m_e, other=0.0)  # [BLOCK_M, FIRST]
    if SECOND:
        o_e2 = FIRST + tl.arange(0, SECOND)[None, :]
        m_e2 = o_e2 < HEAD_DIM
        b_key2 = tl.load(p_keys + o_e2, mask=m_e2, other=0.0)  # [BLOCK_M, SECOND]
    b_alpha = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(1, N, BLOCK_N):
        m_n = start + o_n < N
        p_queries = p_query + tl.multiple_of(tl.cast(start, tl.int64) * s_n, ALIGNED)
        p_queries = p_queries + tl.multiple_of(o_n * s_n, ALIGNED)[:, None]
        b_query = tl.load(p_queries + o_e, mask=m_n[:, None] & m_e, other=0.0)  # [BLOCK_N, FIRST]
        b_score = dot(b_key, tl.trans(b_query), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        if SECOND:
            b_query2 = tl.load(p_queries + o_e2, mask=m_n[:, None] & m_e2, other=0.0)  # [BLOCK_N, SECOND]
            b_score = dot(b_key2, tl.trans(b_query2), b_score, PRECISION)
        b_max = tl.load(p_max + row * N + start + o_n, mask=m_n, other=0.0)
        if p_inverse is None:
            b_max *= 1.4426950408889634  # log₂e
            b_inverse = m_n.to(tl.float32)
        else:
            b_inverse = tl.load(p_inverse + row * N + start + o_n, mask=m_n, other=0.0)
        b_weight = weights(b_score, b_max[None, :], scale_log2, EXACT)
        b_alpha += tl.sum(b_weight * b_inverse[None, :], 1)  # beyond N times 0
    tl.store(p_alpha + row * N + o_m, b_alpha / (N - 1), mask=o_m < N)


# From a model; not timed on a GPU yet. Few registers, so that several programs hide each other's latency.
CONFIG = Config({"BLOCK_M": 64, "BLOCK_N": 64}, warps=4, stages=3)
FLOAT32_CONFIG = Config({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=2)
_INTERPRETED_CONFIG = Config({"BLOCK_M": 256, "BLOCK_N": 64})


def plan(
    qkv: Tensor, kept: Mapping[str, Any], alpha: Tensor, shared: Mapping[str, Any], constants: Mapping[str, Any]
) -> Launch:
    """The launch that fills ``alpha [B, H, N]``.

    Args:
        qkv: ``[B, N, 3, H, E]``.
        kept: ``p_max`` and ``p_inverse [B, H, N]``, every query's maximum (as an exponent of 2) and inverse sum; or the
            natural logarithm of its sum, and None.
        alpha: filled.
        shared: sizes, strides and scale as the attention kernel takes them.
        constants: the attention kernel's cut of a head into columns, alignment and precision.
    """
    config = _INTERPRETED_CONFIG if INTERPRETED else FLOAT32_CONFIG if qkv.dtype == torch.float32 else CONFIG
    images, heads, tokens = alpha.shape
    return Launch(
        kernel=_mean_row_kernel,
        grid=(images * heads * ceil(tokens / config.blocks["BLOCK_M"]),),
        arguments={"p_qkv": qkv, **kept, "p_alpha": alpha, **shared},
        constants=constants,
        config=config,
    )
