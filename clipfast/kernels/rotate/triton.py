"""Rotary positions of queries and keys, read and written once where they lie among packed queries, keys and values.

In plain torch the turned entries are written out, and what is rotated is read and written twice more. Nothing is
multiplied but entries with angles, so memory is all there is: a program takes the queries and keys of one token, which
share their angles. Neighbours are read as they lie and parted in registers.
"""

from collections.abc import Sequence
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import rounded
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import (
    INTERPRETED,
    Config,
    Launch,
    alignment,
    power_of_two,
    unsupported_dtypes,
    unsupported_head_dim,
)

# From a model; not timed on a GPU yet. TILE: entries that a program holds at a time, whole heads.
CONFIGS = (Config({"TILE": 1024}, warps=4, stages=1), Config({"TILE": 4096}, warps=4, stages=1))

LARGEST_HEAD = 1024


@triton.jit
def _rotate_kernel(
    p_x,
    p_cos,
    p_sin,
    tokens,
    parts,
    heads,
    s_b,
    s_n,
    s_part,
    s_h,
    s_cos_h,
    s_cos_n,
    s_sin_h,
    s_sin_n,
    HEAD_DIM: tl.constexpr,
    HALVES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILE: tl.constexpr,
):
    """``x ← x·cos + turned(x)·sin`` of the queries and keys of one token: every part and head is a row."""
    ROWS: tl.constexpr = TILE // BLOCK_E
    HALF: tl.constexpr = HEAD_DIM // 2
    PAIRS: tl.constexpr = BLOCK_E // 2
    unit = tl.program_id(0).to(tl.int64)
    image, token = unit // tokens, unit % tokens
    p_x += tl.multiple_of(image * s_b + token * s_n, ALIGNED)
    p_cos += token * s_cos_n
    p_sin += token * s_sin_n
    o_e = tl.arange(0, PAIRS if HALVES else BLOCK_E)
    m_e = o_e < (HALF if HALVES else HEAD_DIM)
    for start in range(0, parts * heads, ROWS):
        o_row = start + tl.arange(0, ROWS)
        o_part, o_head = (o_row // heads).to(tl.int64), (o_row % heads).to(tl.int64)
        p_rows = p_x + tl.multiple_of(o_part * s_part + o_head * s_h, ALIGNED)[:, None] + o_e[None, :]
        p_cosines = p_cos + (o_head * s_cos_h)[:, None] + o_e[None, :]
        p_sines = p_sin + (o_head * s_sin_h)[:, None] + o_e[None, :]
        mask = (o_row < parts * heads)[:, None] & m_e[None, :]
        b_x = tl.load(p_rows, mask=mask, other=0.0).to(tl.float32)
        b_cos = tl.load(p_cosines, mask=mask, other=0.0).to(tl.float32)
        b_sin = tl.load(p_sines, mask=mask, other=0.0).to(tl.float32)
        if HALVES:  # [ROWS, PAIRS]
            b_x2 = tl.load(p_rows + HALF, mask=mask, other=0.0).to(tl.float32)
            b_cos2 = tl.load(p_cosines + HALF, mask=mask, other=0.0).to(tl.float32)
            b_sin2 = tl.load(p_sines + HALF, mask=mask, other=0.0).to(tl.float32)
            tl.store(p_rows, rounded(b_x * b_cos - b_x2 * b_sin, p_x.dtype.element_ty), mask=mask)
            tl.store(p_rows + HALF, rounded(b_x2 * b_cos2 + b_x * b_sin2, p_x.dtype.element_ty), mask=mask)
        else:  # [ROWS, BLOCK_E]
            b_first, b_second = tl.split(tl.reshape(b_x, [ROWS, PAIRS, 2]))
            b_turned = tl.reshape(tl.join(-b_second, b_first), [ROWS, BLOCK_E])
            tl.store(p_rows, rounded(b_x * b_cos + b_turned * b_sin, p_x.dtype.element_ty), mask=mask)


def plan(x: Tensor, cos: Tensor, sin: Tensor, halves: bool, config: Config = CONFIGS[0]) -> Launch:
    """The launch that computes :func:`run`."""
    images, tokens, parts, heads, head_dim = x.shape
    cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
    strides = dict(zip(("s_b", "s_n", "s_part", "s_h"), x.stride(), strict=False))
    for name, table in (("cos", cos), ("sin", sin)):
        strides[f"s_{name}_h"] = 0 if table.shape[0] == 1 else table.stride(0)
        strides[f"s_{name}_n"] = table.stride(1)
    return Launch(
        kernel=_rotate_kernel,
        grid=(images * tokens if parts * heads else 0,),
        arguments={
            "p_x": x,
            "p_cos": cos,
            "p_sin": sin,
            "tokens": tokens,
            "parts": parts,
            "heads": heads,
            **strides,
        },
        constants={
            "HEAD_DIM": head_dim,
            "HALVES": halves,
            "ALIGNED": alignment(*x.stride()[:4]),
            "BLOCK_E": power_of_two(head_dim),
        },
        config=config,
    )


def run(x: Tensor, cos: Tensor, sin: Tensor, halves: bool, config: Config = CONFIGS[0]) -> None:
    """:func:`clipfast.kernels.reference.rotate` in place."""
    plan(x, cos, sin, halves, config).run()


def unsupported_reasons(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    reasons = unsupported_dtypes(x=x, cos=cos, sin=sin) + unsupported_head_dim(x.shape[4], LARGEST_HEAD)
    return reasons if x.stride(-1) == 1 else [*reasons, "the last axis of x is not contiguous"]


def variants(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> Sequence[Variant]:
    """One variant per configuration."""
    configs = CONFIGS[:1] if INTERPRETED else CONFIGS
    return [(str(config), partial(run, config=config)) for config in configs]


IMPLEMENTATIONS = {"rotate": Implementation(run, unsupported_reasons, variants)}
