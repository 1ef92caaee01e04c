"""Attention of a single query per image and head: pooling heads, and the row that the class token reads with.

``alpha_n = softmax_n(q·k_n / √E)`` and ``z = Σ_n alpha_n v_n``. One query is no matrix product: the work is to read
every key and value once; one kernel does both in one sweep and writes nothing but ``alpha`` and ``z``. In plain torch
scores and weights go through memory between launches. The arithmetic is float32 whatever the inputs are: tensor cores
would round more and save nothing.
"""

from collections.abc import Sequence
from functools import partial
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import (
    INTERPRETED,
    Config,
    Launch,
    alignment,
    power_of_two,
    unit_stride,
    unsupported_dtypes,
    unsupported_head_dim,
)
from clipfast.kernels.query_row import triton_from_tokens

# From a model; not timed on a GPU yet. Bound by memory: small programs, many on a multiprocessor, each with next tiles
# on the way. TILE is how many elements of the keys make a tile, and as many of the values.
CONFIGS = (Config({"TILE": 2048}, warps=4, stages=1), Config({"TILE": 4096}, warps=4, stages=1))

LARGEST_HEAD = 1024


@triton.jit
def attend(
    p_query,
    p_key,
    p_value,
    p_alpha,
    N,
    s_key,
    s_value,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    WITH_Z: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Writes ``alpha = softmax(q·k/√E)`` of one query to ``p_alpha [N]`` and returns ``z = Σ alpha_n v_n  [BLOCK_E]``.

    One sweep with an online softmax. Every row of the tile keeps a softmax of its own, so nothing crosses rows inside
    the loop; they are joined at the end. Until then ``p_alpha`` holds the scores. With APART = 1 the first token comes
    before the loop: in it, N = 2ᵏ + 1 would leave a tile of one.
    """
    o_e = tl.arange(0, BLOCK_E)
    o_n = tl.arange(0, BLOCK_N)
    m_e = o_e < HEAD_DIM
    b_query = tl.load(p_query + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_max = tl.full([BLOCK_N], -1e38, tl.float32)  # finite: a row of the tile may see no token
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    b_z = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    if APART:
        b_first = tl.load(p_key + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_first_value = tl.load(p_value + o_e, mask=m_e, other=0.0).to(tl.float32)
        first = tl.sum(b_query * b_first, 0)
        tl.store(p_alpha, first)
        b_score = first + tl.zeros([BLOCK_N], tl.float32)
        b_max = tl.where(o_n == 0, b_score, b_max)
        b_sum = tl.where(o_n == 0, 1.0, b_sum)
        b_z = b_sum[:, None] * b_first_value[None, :]
    for start in tl.range(APART, N, BLOCK_N, num_stages=3):  # two tiles ahead: latency is all there is to hide
        m_n = start + o_n < N
        mask = m_n[:, None] & m_e[None, :]
        o_row = tl.cast(start + o_n, tl.int64)
        # [BLOCK_N, BLOCK_E]
        b_key = tl.load(p_key + tl.multiple_of(o_row * s_key, ALIGNED)[:, None] + o_e[None, :], mask=mask, other=0.0)
        if WITH_Z:
            o_value = tl.multiple_of(o_row * s_value, ALIGNED)[:, None] + o_e[None, :]
            b_value = tl.load(p_value + o_value, mask=mask, other=0.0)
        b_score = tl.sum(b_key.to(tl.float32) * b_query[None, :], 1)
        tl.store(p_alpha + start + o_n, b_score, mask=m_n)
        b_score = tl.where(m_n, b_score, float("-inf"))
        b_new = tl.maximum(b_max, b_score)
        b_weight = tl.exp2((b_score - b_new) * scale_log2)  # the difference first: scores of any size stay exact
        b_keep = tl.exp2((b_max - b_new) * scale_log2)
        b_sum = b_sum * b_keep + b_weight
        if WITH_Z:
            b_z = b_z * b_keep[:, None] + b_value.to(tl.float32) * b_weight[:, None]
        b_max = b_new
    highest = tl.max(b_max, 0)
    b_part = tl.exp2((b_max - highest) * scale_log2)
    inverse = 1.0 / tl.sum(b_sum * b_part, 0)
    tl.debug_barrier()  # the scores are read again, by other threads than wrote them
    for start in range(0, N, BLOCK_N):
        m_n = start + o_n < N
        b_score = tl.load(p_alpha + start + o_n, mask=m_n, other=float("-inf"))
        tl.store(p_alpha + start + o_n, tl.exp2((b_score - highest) * scale_log2) * inverse, mask=m_n)
    return tl.sum(b_z * b_part[:, None], 0) * inverse


@triton.jit
def _query_row_kernel(
    p_query,
    p_key,
    p_value,
    p_z,
    p_alpha,
    heads,
    N,
    s_query_b,
    s_query_h,
    s_key_b,
    s_key_n,
    s_key_h,
    s_value_b,
    s_value_n,
    s_value_h,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    WITH_Z: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
):
    """``alpha[b,h] = softmax(K[b,h] q[b,h] / √E)``, ``z[b,h] = alpha[b,h] V[b,h]``; one program per image and head."""
    row = tl.program_id(0).to(tl.int64)
    image, head = row // heads, row % heads
    b_z = attend(
        p_query + image * s_query_b + head * s_query_h,
        p_key + tl.multiple_of(image * s_key_b + head * s_key_h, ALIGNED),
        p_value + tl.multiple_of(image * s_value_b + head * s_value_h, ALIGNED),
        p_alpha + row * N,
        N,
        s_key_n,
        s_value_n,
        scale_log2,
        HEAD_DIM,
        ALIGNED,
        WITH_Z,
        0,
        BLOCK_E,
        TILE // BLOCK_E,
    )
    if WITH_Z:
        o_e = tl.arange(0, BLOCK_E)
        tl.store(p_z + row * HEAD_DIM + o_e, b_z, mask=o_e < HEAD_DIM)


def logit_scale(head_dim: int) -> float:
    """What products of queries and keys are multiplied by to be exponents of two: ``log₂e / √E``."""
    return log2(e) * head_dim**-0.5


def plan(
    query: Tensor, key: Tensor, value: Tensor | None, config: Config = CONFIGS[0]
) -> tuple[Launch, Tensor, Tensor]:
    """The launch that computes :func:`run`, with its results ``z [B, H, E]`` and ``alpha [B, H, N]``.

    Without ``value`` there is no z: it is empty then.
    """
    query, key = unit_stride(query), unit_stride(key)
    value = None if value is None else unit_stride(value)
    images, tokens, heads, head_dim = key.shape
    alpha = key.new_empty((images, heads, tokens), dtype=torch.float32)
    z = key.new_empty((images, heads, 0 if value is None else head_dim), dtype=torch.float32)
    read = key if value is None else value
    launch = Launch(
        kernel=_query_row_kernel,
        grid=(images * heads,),
        arguments={
            "p_query": query,
            "p_key": key,
            "p_value": read,
            "p_z": z,
            "p_alpha": alpha,
            "heads": heads,
            "N": tokens,
            "s_query_b": query.stride(0),
            "s_query_h": query.stride(1),
            "s_key_b": key.stride(0),
            "s_key_n": key.stride(1),
            "s_key_h": key.stride(2),
            "s_value_b": read.stride(0),
            "s_value_n": read.stride(1),
            "s_value_h": read.stride(2),
            "scale_log2": logit_scale(head_dim),
        },
        constants={
            "HEAD_DIM": head_dim,
            "ALIGNED": alignment(*key.stride()[:3], *read.stride()[:3]),
            "WITH_Z": value is not None,
            "BLOCK_E": power_of_two(head_dim),
        },
        config=config,
    )
    return launch, z, alpha


def run(query: Tensor, key: Tensor, value: Tensor, config: Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.query_row`: ``z [B, H, E]`` and ``alpha [B, H, N]`` in float32."""
    launch, z, alpha = plan(query, key, value, config)
    launch.run()
    return z, alpha


def alpha_alone(query: Tensor, key: Tensor, config: Config = CONFIGS[0]) -> Tensor:
    """``alpha [B, H, N]`` of :func:`run`, without reading values."""
    launch, _, alpha = plan(query, key, None, config)
    launch.run()
    return alpha


def unsupported_reasons(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    return unsupported_dtypes(query=query, key=key, value=value) + unsupported_head_dim(key.shape[3], LARGEST_HEAD)


def variants(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Variant]:
    """One variant per configuration."""
    configs = CONFIGS[:1] if INTERPRETED else CONFIGS
    return [(str(config), partial(run, config=config)) for config in configs]


IMPLEMENTATIONS = {
    "query_row": Implementation(run, unsupported_reasons, variants),
    "query_row_from_tokens": triton_from_tokens.IMPLEMENTATION,
}
