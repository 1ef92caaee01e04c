"""Weighted sums of attention rows in two sweeps over the scores, none of which is ever written.

``rows[g,m] = Σ_n weights[g,n] exp(q_n·k_m/√E − max_n) / sum_n``. The softmax runs along rows and these sums along
columns, as for the mean row of :mod:`clipfast.kernels.attention.mean_row`: the first sweep keeps every query's maximum
and inverse sum, the second computes the scores again, a tile of keys with all queries, and multiplies their weights
with those of the queries. That product is one of tensor cores too, in three parts of TF32: as exact as float32 to 2⁻²².
Sums are formed in the order of the queries, by one program each, so results are the same in every run.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import dot
from clipfast.kernels.attention import tiles
from clipfast.kernels.attention.blocks import both_parts, scores
from clipfast.kernels.attention.mean_row import weights as softmax_weights
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import INTERPRETED, Config, Launch, power_of_two, unsupported_dtypes

# From a model; not timed on a GPU yet. BLOCK_M: queries of the first sweep, keys of the second; BLOCK_N: the others.
# The parts in TF32 of 64 columns of weights would take more registers than there are for two programs.
CONFIGS = (
    Config({"BLOCK_M": 64, "BLOCK_N": 32}, warps=4, stages=3),
    Config({"BLOCK_M": 128, "BLOCK_N": 32}, warps=8, stages=3),
)
WIDE_CONFIG = Config({"BLOCK_M": 64, "BLOCK_N": 32}, warps=8, stages=2)
"""For heads of more than 128 columns."""
FLOAT32_CONFIG = Config({"BLOCK_M": 32, "BLOCK_N": 32}, warps=8, stages=2)
_INTERPRETED_CONFIG = Config({"BLOCK_M": 256, "BLOCK_N": 64})

LARGEST_GROUP = 32
"""Weightings that are summed side by side; scores are computed again for more."""


@triton.jit
def _statistics_kernel(
    p_qkv,
    p_max,
    p_inverse,
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
    """The largest score of every query, in the units of ``softmax_weights``, and one over the sum of its weights."""
    CUT: tl.constexpr = (HEAD_DIM, FIRST, SECOND, ALIGNED)
    blocks = tl.cdiv(N, BLOCK_M)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    image, head = row // heads, row % heads
    first = (program % blocks) * BLOCK_M
    o_head = image * s_b + head * s_h
    p_query = p_qkv + tl.multiple_of(o_head, ALIGNED)
    p_key = p_qkv + tl.multiple_of(o_head + s_part, ALIGNED)
    inner = 1.0 if EXACT else scale_log2
    outer = scale_log2 if EXACT else 1.0
    # [BLOCK_M, FIRST] and [BLOCK_M, SECOND]
    b_query, b_query2 = both_parts(p_query, None, None, 0, 0, 0, first, N, s_n, CUT, False, BLOCK_M)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, N, BLOCK_N):
        # [BLOCK_N, FIRST] and [BLOCK_N, SECOND]
        b_key, b_key2 = both_parts(p_key, None, None, 0, 1, 0, start, N, s_n, CUT, False, BLOCK_N)
        b_score = scores(b_query, b_query2, b_key, b_key2, BLOCK_M, BLOCK_N, CUT, PRECISION)
        b_score = tl.where((start + tl.arange(0, BLOCK_N) < N)[None, :], b_score, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, 1) * inner)
        b_weight = softmax_weights(b_score, b_new[:, None], scale_log2, EXACT)
        b_sum = b_sum * tl.exp2((b_max - b_new) * outer) + tl.sum(b_weight, 1)
        b_max = b_new
    o_m = first + tl.arange(0, BLOCK_M)
    tl.store(p_max + row * N + o_m, b_max, mask=o_m < N)
    tl.store(p_inverse + row * N + o_m, 1.0 / b_sum, mask=o_m < N)


@triton.jit
def _weighted_rows_kernel(
    p_qkv,
    p_weights,
    p_max,
    p_inverse,
    p_out,
    heads,
    N,
    s_b,
    s_n,
    s_part,
    s_h,
    scale_log2,
    groups,
    s_weights_b,
    s_weights_g,
    s_weights_n,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``rows[g, m]`` of one image and head: a program per tile of BLOCK_M keys and BLOCK_G weightings."""
    CUT: tl.constexpr = (HEAD_DIM, FIRST, SECOND, ALIGNED)
    blocks, parts = tl.cdiv(N, BLOCK_M), tl.cdiv(groups, BLOCK_G)
    program = tl.program_id(0)
    row = (program // (blocks * parts)).to(tl.int64)
    image, head = row // heads, row % heads
    first = (program // parts % blocks) * BLOCK_M
    o_head = image * s_b + head * s_h
    p_query = p_qkv + tl.multiple_of(o_head, ALIGNED)
    p_key = p_qkv + tl.multiple_of(o_head + s_part, ALIGNED)
    o_g = (program % parts) * BLOCK_G + tl.arange(0, BLOCK_G)
    m_g = o_g < groups
    p_weights += image * s_weights_b + o_g.to(tl.int64) * s_weights_g  # [BLOCK_G]
    # [BLOCK_M, FIRST] and [BLOCK_M, SECOND]
    b_key, b_key2 = both_parts(p_key, None, None, 0, 1, 0, first, N, s_n, CUT, False, BLOCK_M)
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    b_rows = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    for start in range(0, N, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        # [BLOCK_N, FIRST] and [BLOCK_N, SECOND]
        b_query, b_query2 = both_parts(p_query, None, None, 0, 0, 0, start, N, s_n, CUT, False, BLOCK_N)
        b_score = scores(b_key, b_key2, b_query, b_query2, BLOCK_M, BLOCK_N, CUT, PRECISION)
        b_score = tl.where(m_m[:, None], b_score, float("-inf"))  # of a key that is not there 0 may be far too much
        b_max = tl.load(p_max + row * N + o_n, mask=m_n, other=0.0)
        b_inverse = tl.load(p_inverse + row * N + o_n, mask=m_n, other=0.0)
        p_shares = p_weights[None, :] + (o_n.to(tl.int64) * s_weights_n)[:, None]
        b_share = tl.load(p_shares, mask=m_n[:, None] & m_g[None, :], other=0.0)  # [BLOCK_N, BLOCK_G]
        b_weight = softmax_weights(b_score, b_max[None, :], scale_log2, EXACT)  # [BLOCK_M, BLOCK_N]
        b_rows = dot(b_weight, b_share * b_inverse[:, None], b_rows, "tf32x3")
    p_rows = p_out + ((image * groups + o_g) * heads + head)[None, :] * N + o_m[:, None]
    tl.store(p_rows, b_rows, mask=m_m[:, None] & m_g[None, :])


def configs(qkv: Tensor) -> Sequence[Config]:
    """The configurations worth timing for ``qkv [B, N, 3, H, E]``."""
    if INTERPRETED:
        return (_INTERPRETED_CONFIG,)
    if qkv.dtype == torch.float32:
        return (FLOAT32_CONFIG,)
    return CONFIGS if sum(tiles.head_parts(qkv.shape[4], qkv.dtype)) <= 128 else (WIDE_CONFIG,)


def plan(qkv: Tensor, weights: Tensor, config: Config | None = None) -> tuple[list[Launch], Tensor]:
    """The launches that compute :func:`run`, in order, with their result.

    Args:
        qkv: ``[B, N, 3, H, E]``.
        weights: ``[B, G, N]``.
        config: how programs are cut; None for the preferred one.
    """
    config = configs(qkv)[0] if config is None else config
    qkv = tiles.readable(qkv)
    images, tokens, _, heads, _ = qkv.shape
    groups = weights.shape[1]
    out = weights.new_empty((images, groups, heads, tokens))
    kept = {name: weights.new_empty((images, heads, tokens)) for name in ("p_max", "p_inverse")}
    sizes, constants = tiles.sizes_of(qkv), tiles.constants_of(qkv)
    programs = images * heads * ceil(tokens / config.blocks["BLOCK_M"])
    block_g = power_of_two(min(groups, LARGEST_GROUP), 16)
    statistics = Launch(
        kernel=_statistics_kernel,
        grid=(programs if groups else 0,),
        arguments={"p_qkv": qkv, **kept, **sizes},
        constants=constants,
        config=config,
    )
    strides = dict(zip(("s_weights_b", "s_weights_g", "s_weights_n"), weights.stride(), strict=True))
    rows = Launch(
        kernel=_weighted_rows_kernel,
        grid=(programs * ceil(groups / block_g),),
        arguments={"p_qkv": qkv, "p_weights": weights, **kept, "p_out": out, **sizes, "groups": groups, **strides},
        constants={**constants, "BLOCK_G": block_g},
        config=config,
    )
    return [statistics, rows], out


def run(qkv: Tensor, weights: Tensor, config: Config | None = None) -> Tensor:
    """:func:`clipfast.kernels.reference.weighted_rows`: ``[B, G, H, N]`` in float32."""
    launches, out = plan(qkv, weights, config)
    for launch in launches:
        launch.run()
    return out


def unsupported_reasons(qkv: Tensor, weights: Tensor) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    reasons = unsupported_dtypes(qkv=qkv, weights=weights)
    if not 0 < qkv.shape[4] <= tiles.LARGEST_HEAD:
        reasons.append(f"head_dim {qkv.shape[4]} is not between 1 and {tiles.LARGEST_HEAD}")
    return reasons


def variants(qkv: Tensor, weights: Tensor) -> Sequence[Variant]:
    """One variant per configuration."""
    return [(str(config), partial(run, config=config)) for config in configs(qkv)]


IMPLEMENTATIONS = {"weighted_rows": Implementation(run, unsupported_reasons, variants)}
