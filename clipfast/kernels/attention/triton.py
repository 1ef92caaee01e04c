"""Self-attention that also gives the attention row of the pooled token: ``out`` and ``alpha`` in one launch.

``out[b,n,h] = Σ_m softmax_m(q[b,n,h]·k[b,m,h] / √E) v[b,m,h]``, and ``alpha[b,h] = softmax(K[b,h] q[b,0,h] / √E)`` or
the mean of these weights over the patches' queries (:mod:`.mean_row`).

A vision transformer has N = 2ᵏ + 1 tokens or so: 257, 577. Cut into tiles of 64 or 128, the one token too many costs a
row and a column of tiles: at N = 257 more than half of the products are of padding. Here the class token stands apart:
tiles cover the N − 1 patches, and their online softmax *starts* from the class token's key (its score is the first
maximum, its value the first sum). The class token's own query is computed in float32 without tensor cores, and its
weights are ``alpha``. Where the class token apart saves no tile (N = 50, 197), it is a query like the others.

The row goes with the first tile of queries, whose keys and values are in shared memory already, if there are registers
for it (:func:`row_place`): its scores are those of the tile's first query, or, where the class token is apart, sums of
products beside those of the tensor cores. Else one more program of the same launch computes it.

A head is cut into two parts where its size is no power of two, 80 = 64 + 16: padded to 128 it would cost 1.6 times the
products.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend
from triton.tools.tensor_descriptor import TensorDescriptor

from clipfast.kernels.arithmetic import dot, dot_precision, rounded
from clipfast.kernels.attention import mean_row, sdpa
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import (
    AMD,
    INTERPRETED,
    Config,
    Launch,
    alignment,
    capability,
    power_of_two,
    unit_stride,
    unsupported_dtypes,
)
from clipfast.kernels.query_row import triton as query_row
from clipfast.kernels.reference import Row

# ------------------------------------------------------------------------------------------------------------ tiles


def _config(block_m: int, block_n: int, descriptors: int, warps: int, stages: int, with_tile: int = 0) -> Config:
    """Tiles of queries and keys; whether they are read through tensor descriptors (sm_90 and later) or pointers.

    ``with_tile``: the class token's row goes with the first tile of queries, if it can (:func:`row_place`).
    """
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "DESCRIPTORS": descriptors, "WITH_TILE": with_tile}
    return Config(blocks, warps, stages)


CONFIGS: Mapping[tuple[int, int], Sequence[Config]] = {
    (80, 64): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3), _config(128, 64, 0, 4, 2)],
    (80, 96): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (80, 128): [_config(64, 32, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (80, 256): [_config(64, 32, 0, 8, 2)],
    (AMD, 64): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (AMD, 96): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (AMD, 128): [_config(64, 32, 0, 4, 3)],
    (AMD, 256): [_config(64, 32, 0, 8, 2)],
    (90, 64): [
        _config(128, 64, 1, 8, 4, with_tile=1),
        _config(128, 64, 0, 8, 4),
        _config(64, 64, 1, 4, 3, with_tile=1),
        _config(128, 64, 1, 4, 3, with_tile=1),
    ],
    (90, 96): [
        _config(128, 64, 0, 8, 3),
        _config(128, 64, 1, 8, 3, with_tile=1),
        _config(64, 64, 0, 4, 3),
        _config(64, 64, 1, 4, 3),
    ],
    (90, 128): [
        _config(64, 64, 0, 4, 2),
        _config(64, 64, 1, 4, 2),
        _config(128, 32, 1, 8, 3),
        _config(128, 128, 1, 8, 2),
    ],
    (90, 256): [_config(64, 32, 0, 8, 2), _config(64, 32, 1, 4, 2)],
    (100, 64): [
        _config(128, 64, 0, 8, 3),
        _config(128, 64, 1, 8, 3),
        _config(64, 64, 0, 4, 3),
        _config(128, 128, 1, 8, 2),
    ],
    (100, 96): [_config(128, 64, 0, 8, 3), _config(128, 64, 1, 8, 3), _config(64, 64, 0, 4, 3)],
    (100, 128): [_config(64, 32, 0, 4, 3), _config(64, 64, 1, 4, 2), _config(128, 128, 1, 8, 2)],
    (100, 256): [_config(64, 64, 0, 8, 2), _config(64, 32, 1, 4, 2)],
}
"""By architecture and columns of a head. From a model; not timed on a GPU yet. On sm_90 two programs of 8 warps share a
multiprocessor at up to 128 registers, and a tile of 64 keys keeps them there. Where the compiler aims at 128 it spills
one register in a few cases (sm_80 at head_dim 64, sm_100 at N = 197), before the loop."""

FLOAT32_CONFIG = _config(32, 32, 0, 8, 2)
"""Exact float32 has no tensor cores: a tile whose products, unrolled, fit the registers."""

_INTERPRETED_CONFIGS = _config(256, 64, 0, 32, 1), _config(256, 64, 1, 32, 1, with_tile=1)

LARGEST_HEAD = 256
LARGEST_TILE = 256
"""Tokens of a tile, of queries or keys, at most."""
WITH_TILE, OWN_PROGRAM = 1, 2
CLOSE = 1.25
"""Configurations that compute up to this many times the fewest scores are worth timing."""


def head_parts(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two powers of two, the second maybe 0, whose sum is the fewest columns that hold a head.

    In float32, where products are unrolled in registers, two halves where one part alone would be large.
    """
    whole = power_of_two(head_dim, 16)
    sizes = [2**k for k in range(4, 9)]
    pairs = [(whole, 0), *((a, b) for a in sizes for b in sizes if b < a and head_dim <= a + b < whole)]
    first, second = min(pairs, key=sum)
    large = first > 64 or (first > 16 and not second)
    return (whole // 2, whole // 2) if dtype == torch.float32 and large else (first, second)


def scores(tokens: int, config: Config) -> int:
    """How many scores of ``tokens`` queries and keys are computed, in whole tiles."""
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    return ceil(tokens / block_m) * block_m * ceil(tokens / block_n) * block_n


def apart(tokens: int, config: Config) -> bool:
    """Whether fewer scores are computed when tiles cover the patches alone and the class token is apart."""
    return tokens > 1 and scores(tokens - 1, config) < scores(tokens, config)


def row_place(alone: bool, row: Row | None, parts: tuple[int, int], config: Config) -> int:
    """Where the class token's row is computed: 0 (nowhere apart), :data:`WITH_TILE` or :data:`OWN_PROGRAM`.

    With a tile of queries it takes registers. On sm_90 descriptors leave some, which addresses take otherwise, but not
    in a head of more than 64 columns with the class token apart. On sm_80 and sm_100 one program would fit a
    multiprocessor where two do.
    """
    if not alone and row != "cls":
        return 0
    narrow = parts[0] <= 64 and not parts[1]
    return WITH_TILE if config.blocks["WITH_TILE"] and (narrow or not alone) else OWN_PROGRAM


def describable(qkv: Tensor) -> bool:
    """Whether there can be tensor descriptors: hardware that has them, and every step a multiple of 16 bytes."""
    steps = [stride * qkv.element_size() for stride in qkv.stride()[:4]]
    aligned = not any(step % 16 for step in (*steps, qkv.data_ptr()))
    return capability(qkv) >= 90 and qkv.numel() > 0 and qkv.stride(4) == 1 and aligned


def configs(qkv: Tensor, arch: int | None = None) -> list[Config]:
    """The configurations worth timing for ``qkv [B, N, 3, H, E]``, those that compute the fewest scores first.

    Args:
        qkv: queries, keys and values.
        arch: compute capability as 80, 90 or 100, or :data:`.launch.AMD`; None for that of the tensor's GPU.
    """
    if INTERPRETED or qkv.dtype == torch.float32:
        return [_INTERPRETED_CONFIGS[describable(qkv)] if INTERPRETED else FLOAT32_CONFIG]
    arch = capability(qkv) if arch is None else arch
    family = {AMD: AMD, 9: 90, 10: 100, 11: 100}.get(arch // 10, 80)
    needed = sum(head_parts(qkv.shape[4], qkv.dtype))
    columns = min(size for architecture, size in CONFIGS if architecture == family and size >= needed)
    usable = [c for c in CONFIGS[family, columns] if not c.blocks["DESCRIPTORS"] or describable(qkv)]

    def computed(config: Config) -> int:
        return scores(qkv.shape[1] - apart(qkv.shape[1], config), config)

    least = min(map(computed, usable))
    return sorted((config for config in usable if computed(config) <= CLOSE * least), key=computed)


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _rows(
    p_part,
    d_rows,
    image,
    part,
    head,
    start,
    N,
    s_n,
    HEAD_DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
    FROM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tokens ``start …`` of one head's queries, keys or values (part 0, 1, 2), zeros beyond ``N`` and ``HEAD_DIM``.

    Read through the descriptor where there is one, else through pointers.
    """
    if d_rows is None:
        o_n = tl.arange(0, ROWS)
        o_e = FROM + tl.arange(0, COLUMNS)
        p_rows = p_part + tl.multiple_of(tl.cast(start, tl.int64) * s_n, ALIGNED)
        p_rows = p_rows + (tl.multiple_of(o_n * s_n, ALIGNED)[:, None] + o_e[None, :])  # [ROWS, COLUMNS]
        m_n = (start + o_n < N)[:, None]
        m_e = (o_e < HEAD_DIM)[None, :]
        if FROM + COLUMNS > HEAD_DIM:
            b_rows = tl.load(p_rows, mask=m_e if WHOLE else m_n & m_e, other=0.0)
        elif WHOLE:
            b_rows = tl.load(p_rows)
        else:
            b_rows = tl.load(p_rows, mask=m_n, other=0.0)
    else:
        b_rows = d_rows.load([image, part, head, start, FROM]).reshape(ROWS, COLUMNS)
    return b_rows


@triton.jit
def _scores(
    b_query,
    b_query2,
    b_key,
    b_key2,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``q·k`` of a tile of queries and one of keys, both parts of a head  ``[ROWS, COLUMNS]``."""
    b_score = dot(b_query, tl.trans(b_key), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
    if SECOND:
        b_score = dot(b_query2, tl.trans(b_key2), b_score, PRECISION)
    return b_score


@triton.jit
def _online_softmax(b_score, b_max, b_sum, scale_log2, EXACT: tl.constexpr):
    """Weights of one more tile of keys, the factor for what was summed before, and the new maxima and sums."""
    inner = 1.0 if EXACT else scale_log2  # maxima are kept in the units that weights() takes
    outer = scale_log2 if EXACT else 1.0
    b_new = tl.maximum(b_max, tl.max(b_score, 1) * inner)
    b_weight = mean_row.weights(b_score, b_new[:, None], scale_log2, EXACT)
    b_keep = tl.exp2((b_max - b_new) * outer)
    return b_weight, b_keep, b_new, b_sum * b_keep + tl.sum(b_weight, 1)


@triton.jit
def _begin(
    b_query,
    b_query2,
    p_key,
    p_value,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    APART: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The softmax of a tile of queries before any tile of keys: with APART = 1 it has seen the class token's key.

    Returns the scores of that key, maxima, sums, and both parts of the weighted values.
    """
    b_start = tl.zeros([ROWS], tl.float32)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_out = tl.zeros([ROWS, FIRST], tl.float32)
    b_out2 = tl.zeros([ROWS, SECOND if SECOND else 1], tl.float32)
    if APART:
        o_e = tl.arange(0, FIRST)
        m_e = o_e < HEAD_DIM
        b_class = tl.load(p_key + o_e, mask=m_e, other=0.0).to(tl.float32)
        b_start = tl.sum(b_query.to(tl.float32) * b_class[None, :], 1)
        if SECOND:
            o_e2 = FIRST + tl.arange(0, SECOND)
            m_e2 = o_e2 < HEAD_DIM
            b_class2 = tl.load(p_key + o_e2, mask=m_e2, other=0.0).to(tl.float32)
            b_start += tl.sum(b_query2.to(tl.float32) * b_class2[None, :], 1)
        b_max = b_start * (1.0 if EXACT else scale_log2)
        b_sum = mean_row.weights(b_start, b_max, scale_log2, EXACT)  # 1, but for the rounding of the maximum
        b_out += b_sum[:, None] * tl.load(p_value + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
        if SECOND:
            b_out2 += b_sum[:, None] * tl.load(p_value + o_e2, mask=m_e2, other=0.0).to(tl.float32)[None, :]
    return b_start, b_max, b_sum, b_out, b_out2


@triton.jit
def _keep_row(p_row, b_score, start, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores the scores of a tile's first query, to be normalised when all have been seen."""
    o_n = start + tl.arange(0, COLUMNS)
    mask = (tl.arange(0, ROWS) == 0)[:, None] & (o_n < N)[None, :]
    tl.store(p_row + tl.zeros([ROWS, 1], tl.int32) + o_n[None, :], b_score, mask=mask)


@triton.jit
def _write_rows(
    p_rows,
    b_out,
    b_out2,
    m_rows,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Stores the head outputs of a tile of queries, ``p_rows [ROWS]`` apart."""
    o_e = tl.arange(0, FIRST)
    mask = m_rows[:, None] & (o_e < HEAD_DIM)[None, :]
    tl.store(p_rows[:, None] + o_e[None, :], rounded(b_out, p_rows.dtype.element_ty), mask=mask)
    if SECOND:
        o_e2 = FIRST + tl.arange(0, SECOND)
        mask = m_rows[:, None] & (o_e2 < HEAD_DIM)[None, :]
        tl.store(p_rows[:, None] + o_e2[None, :], rounded(b_out2, p_rows.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    p_query,
    p_key,
    p_value,
    d_query,
    d_key,
    d_query2,
    d_key2,
    p_out,
    p_alpha,
    p_max,
    p_inverse,
    image,
    head,
    first,
    heads,
    N,
    s_n,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ALIGNED: tl.constexpr,
    APART: tl.constexpr,
    WHOLE: tl.constexpr,
    CLASS: tl.constexpr,
    ALPHA: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The queries ``first …`` of one head. With CLASS the class token's row comes along, on the same keys and values.

    Where it is apart, it has a softmax of its own, in float32 without tensor cores. Else it is the first of these
    queries. ALPHA writes its weights.
    """
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    # [BLOCK_M, FIRST] and [BLOCK_M, SECOND]
    b_query = _rows(p_query, d_query, image, 0, head, first, N, s_n, HEAD_DIM, ALIGNED, False, 0, FIRST, BLOCK_M)
    b_query2 = 0.0
    if SECOND:
        b_query2 = _rows(
            p_query, d_query2, image, 0, head, first, N, s_n, HEAD_DIM, ALIGNED, False, FIRST, SECOND, BLOCK_M
        )
    _, b_max, b_sum, b_out, b_out2 = _begin(
        b_query, b_query2, p_key, p_value, scale_log2, HEAD_DIM, FIRST, SECOND, APART, BLOCK_M, EXACT
    )
    if CLASS and APART:
        o_e = tl.arange(0, FIRST)
        m_e = o_e < HEAD_DIM
        b_class = tl.load(p_query + o_e, mask=m_e, other=0.0).to(tl.float32)
        class_score = tl.sum(b_class * tl.load(p_key + o_e, mask=m_e, other=0.0).to(tl.float32), 0)
        b_z = tl.load(p_value + o_e, mask=m_e, other=0.0).to(tl.float32)
        if ALPHA:
            tl.store(p_alpha, class_score)
        class_max = class_score
        class_sum = 1.0
    for start in range(APART, N, BLOCK_N):
        # [BLOCK_N, FIRST] and [BLOCK_N, SECOND]
        b_key = _rows(p_key, d_key, image, 1, head, start, N, s_n, HEAD_DIM, ALIGNED, WHOLE, 0, FIRST, BLOCK_N)
        b_key2 = 0.0
        if SECOND:
            b_key2 = _rows(
                p_key, d_key2, image, 1, head, start, N, s_n, HEAD_DIM, ALIGNED, WHOLE, FIRST, SECOND, BLOCK_N
            )
        if CLASS and APART:  # before the tile's own scores, which take many registers
            o_n = start + tl.arange(0, BLOCK_N)
            b_row = tl.sum(b_key.to(tl.float32) * b_class[None, :], 1)
            if ALPHA:
                tl.store(p_alpha + o_n, b_row, mask=o_n < N)
            if not WHOLE:
                b_row = tl.where(o_n < N, b_row, float("-inf"))
            class_new = tl.maximum(class_max, tl.max(b_row, 0))
            b_row = tl.exp2((b_row - class_new) * scale_log2)
            class_keep = tl.exp2((class_max - class_new) * scale_log2)
            class_sum = class_sum * class_keep + tl.sum(b_row, 0)
            class_max = class_new
        b_score = _scores(b_query, b_query2, b_key, b_key2, BLOCK_M, BLOCK_N, SECOND, PRECISION)
        if not WHOLE:
            b_score = tl.where((start + tl.arange(0, BLOCK_N) < N)[None, :], b_score, float("-inf"))
        if CLASS and ALPHA and not APART:
            _keep_row(p_alpha, b_score, start, N, BLOCK_M, BLOCK_N)
        b_weight, b_keep, b_max, b_sum = _online_softmax(b_score, b_max, b_sum, scale_log2, EXACT)
        b_value = _rows(p_value, d_key, image, 2, head, start, N, s_n, HEAD_DIM, ALIGNED, WHOLE, 0, FIRST, BLOCK_N)
        b_weight = rounded(b_weight, b_value.dtype)
        if CLASS and APART:
            b_z = b_z * class_keep + tl.sum(b_value.to(tl.float32) * b_row[:, None], 0)
        b_out = dot(b_weight, b_value, b_out * b_keep[:, None], PRECISION)
        if SECOND:
            b_value2 = _rows(
                p_value, d_key2, image, 2, head, start, N, s_n, HEAD_DIM, ALIGNED, WHOLE, FIRST, SECOND, BLOCK_N
            )
            b_out2 = dot(b_weight, b_value2, b_out2 * b_keep[:, None], PRECISION)
    b_inverse = 1.0 / b_sum
    if STATISTICS:
        tl.store(p_max + o_m, b_max, mask=m_m)
        tl.store(p_inverse + o_m, b_inverse, mask=m_m)
    p_rows = p_out + o_m.to(tl.int64) * heads * HEAD_DIM
    _write_rows(p_rows, b_out * b_inverse[:, None], b_out2 * b_inverse[:, None], m_m, HEAD_DIM, FIRST, SECOND)
    if CLASS:
        if APART:
            inverse = 1.0 / class_sum
            o_e = tl.arange(0, FIRST)
            tl.store(p_out + o_e, rounded(b_z * inverse, p_out.dtype.element_ty), mask=o_e < HEAD_DIM)
        else:
            class_max = tl.max(tl.where(o_m == 0, b_max, float("-inf")), 0)
            inverse = tl.max(tl.where(o_m == 0, b_inverse, 0.0), 0)
        if ALPHA:
            tl.debug_barrier()  # the scores are read again, by other threads than wrote them
            for start in range(0, N, BLOCK_R):
                o_n = start + tl.arange(0, BLOCK_R)
                b_row = tl.load(p_alpha + o_n, mask=o_n < N, other=float("-inf"))
                b_row = mean_row.weights(b_row, class_max, scale_log2, EXACT or APART) * inverse
                tl.store(p_alpha + o_n, b_row, mask=o_n < N)


@triton.jit
def _attention_kernel(
    p_qkv,
    d_query,
    d_key,
    d_query2,
    d_key2,
    p_out,
    p_alpha,
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
    APART: tl.constexpr,
    WHOLE: tl.constexpr,
    ROW: tl.constexpr,
    ALPHA: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WITH_TILE: tl.constexpr,
):
    """``out[n] = Σ_m exp(q_n·k_m/√E − max_n) v_m / Σ_m exp(q_n·k_m/√E − max_n)``, tile by tile (FlashAttention).

    Programs of one image and head follow one another, one for each of its tiles of queries. ROW says where the class
    token's row is computed: nowhere apart from the tiles (0), with the first of them (1), in a loop of its own so that
    the others' has no branch, or by a program of its own (2). APART is how many tokens are apart from the tiles, 1 (see
    the module) or 0; WHOLE says that the keys fill theirs. A head is cut into FIRST + SECOND columns. STATISTICS keeps
    every query's maximum and inverse sum for :mod:`.mean_row`.
    """
    tiles = tl.cdiv(N - APART, BLOCK_M)
    programs = tiles + 1 if ROW == 2 else tiles
    program = tl.program_id(0)
    row = program // programs
    tile = program % programs
    image, head = row // heads, row % heads
    row = row.to(tl.int64)
    o_head = image.to(tl.int64) * s_b + head.to(tl.int64) * s_h
    p_query = p_qkv + tl.multiple_of(o_head, ALIGNED)
    p_key = p_qkv + tl.multiple_of(o_head + s_part, ALIGNED)
    p_value = p_qkv + tl.multiple_of(o_head + s_part + s_part, ALIGNED)  # a product would be one of 32 bits
    p_out += (image.to(tl.int64) * N * heads + head) * HEAD_DIM
    p_alpha += row * N
    if STATISTICS:
        p_max += row * N
        p_inverse += row * N
    first = APART + tile * BLOCK_M
    if ROW and tile == (tiles if ROW == 2 else 0):
        if ROW == 1:
            _tile(
                p_query,
                p_key,
                p_value,
                d_query,
                d_key,
                d_query2,
                d_key2,
                p_out,
                p_alpha,
                p_max,
                p_inverse,
                image,
                head,
                first,
                heads,
                N,
                s_n,
                scale_log2,
                HEAD_DIM,
                FIRST,
                SECOND,
                ALIGNED,
                APART,
                WHOLE,
                True,
                ALPHA,
                STATISTICS,
                PRECISION,
                EXACT,
                BLOCK_R,
                BLOCK_M,
                BLOCK_N,
            )
        else:
            b_z = query_row.attend(
                p_query,
                p_key,
                p_value,
                p_alpha,
                N,
                s_n,
                s_n,
                scale_log2,
                HEAD_DIM,
                ALIGNED,
                APART == 1,
                APART,
                BLOCK_E,
                BLOCK_R,
            )
            if APART:
                o_z = tl.arange(0, BLOCK_E)
                tl.store(p_out + o_z, rounded(b_z, p_out.dtype.element_ty), mask=o_z < HEAD_DIM)
    else:
        _tile(
            p_query,
            p_key,
            p_value,
            d_query,
            d_key,
            d_query2,
            d_key2,
            p_out,
            p_alpha,
            p_max,
            p_inverse,
            image,
            head,
            first,
            heads,
            N,
            s_n,
            scale_log2,
            HEAD_DIM,
            FIRST,
            SECOND,
            ALIGNED,
            APART,
            WHOLE,
            False,
            ALPHA,
            STATISTICS,
            PRECISION,
            EXACT,
            BLOCK_R,
            BLOCK_M,
            BLOCK_N,
        )


def _descriptors(qkv: Tensor, config: Config, parts: tuple[int, int]) -> dict[str, Any]:
    """Descriptors of tiles of queries, and of keys or values, in both parts of a head; None for what is not used."""
    names = ("d_query", "d_key", "d_query2", "d_key2")
    if not config.blocks["DESCRIPTORS"]:
        return dict.fromkeys(names)
    view = qkv.permute(0, 2, 3, 1, 4)  # [B, 3, H, N, E]
    tiles = [(config.blocks[rows], part) for part in parts for rows in ("BLOCK_M", "BLOCK_N")]
    return {
        name: TensorDescriptor(view, list(view.shape), list(view.stride()), [1, 1, 1, rows, columns])
        if columns
        else None
        for name, (rows, columns) in zip(names, tiles, strict=True)
    }


def _readable(qkv: Tensor) -> Tensor:
    """``qkv`` with strides that the kernels can read."""
    qkv = unit_stride(qkv)
    # Where tokens are so far apart that a tile's offsets, of 32 bits, would overflow, they are copied together.
    return qkv.contiguous() if LARGEST_TILE * qkv.stride(1) >= 2**31 else qkv


def _sizes(qkv: Tensor) -> dict[str, Any]:
    """Sizes, strides and scale, as arguments."""
    _, tokens, _, heads, head_dim = qkv.shape
    strides = dict(zip(("s_b", "s_n", "s_part", "s_h"), qkv.stride(), strict=False))
    return {"heads": heads, "N": tokens, **strides, "scale_log2": query_row.logit_scale(head_dim)}


def _constants(qkv: Tensor) -> dict[str, Any]:
    """How a head is cut, read and multiplied, as compile-time arguments."""
    first, second = head_parts(qkv.shape[4], qkv.dtype)
    return {
        "HEAD_DIM": qkv.shape[4],
        "FIRST": first,
        "SECOND": second,
        "ALIGNED": alignment(*qkv.stride()[:4]),
        "PRECISION": dot_precision(qkv.dtype),
        "EXACT": qkv.dtype == torch.float32,
    }


def plan(qkv: Tensor, row: Row | None, config: Config | None = None) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that compute :func:`run`, in order, with its results.

    Args:
        qkv: ``[B, N, 3, H, E]``.
        row: the attention row to return.
        config: how programs are cut; None for the preferred one.
    """
    config = configs(qkv)[0] if config is None else config
    qkv = _readable(qkv)
    images, tokens, _, heads, head_dim = qkv.shape
    alone = apart(tokens, config)
    parts = head_parts(head_dim, qkv.dtype)
    out = qkv.new_empty((images, tokens, heads, head_dim))
    alpha = qkv.new_empty((images, heads, tokens), dtype=torch.float32)
    kept = {name: torch.empty_like(alpha) if row == "mean" else None for name in ("p_max", "p_inverse")}  # per query
    shared, constants = _sizes(qkv), _constants(qkv)
    place = row_place(alone, row, parts, config)
    programs = ceil((tokens - alone) / config.blocks["BLOCK_M"]) + (place == OWN_PROGRAM)
    columns = power_of_two(head_dim)
    per_thread = 8 if qkv.dtype == torch.float32 else 32 if columns <= 64 else 16  # elements of the class row's keys
    own_rows = max(1, min(4096, 32 * config.warps * per_thread) // columns)
    launch = Launch(
        kernel=_attention_kernel,
        grid=(images * heads * programs,),
        arguments={
            "p_qkv": qkv,
            **_descriptors(qkv, config, parts),
            "p_out": out,
            "p_alpha": alpha,
            **kept,
            **shared,
        },
        constants={
            **constants,
            "APART": int(alone),
            "WHOLE": (tokens - alone) % config.blocks["BLOCK_N"] == 0,
            "ROW": place,
            "ALPHA": row == "cls",
            "STATISTICS": row == "mean",
            "BLOCK_E": columns,
            "BLOCK_R": own_rows if place == OWN_PROGRAM else 32 * config.warps,
        },
        config=config,
    )
    if row != "mean":
        return [launch], out, alpha if row == "cls" else qkv.new_empty((images, heads, 0), dtype=torch.float32)
    mean = mean_row.plan(qkv, kept, alpha, shared, constants)
    return [launch, mean], out, alpha


def run(qkv: Tensor, row: Row | None, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.attention`: ``out [B, N, H, E]``, and ``alpha [B, H, N]`` or ``[B, H, 0]``."""
    launches, out, alpha = plan(qkv, row, config)
    for launch in launches:
        launch.run()
    return out, alpha


def through_torch(
    qkv: Tensor, row: Row | None, attend: sdpa.Attend = F.scaled_dot_product_attention
) -> tuple[Tensor, Tensor]:
    """:func:`run` for ``row`` ``"cls"`` or None with torch's attention, and the row from a kernel of its own."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, N, E]
    out = attend(query, key, value).transpose(1, 2).contiguous()
    if row is None:
        return out, qkv.new_empty((qkv.shape[0], qkv.shape[3], 0), dtype=torch.float32)
    return out, query_row.alpha_alone(qkv[:, 0, 0], qkv[:, :, 1])


def with_logsumexp(qkv: Tensor, backend: SDPBackend) -> tuple[Tensor, Tensor]:
    """Torch's attention ``out [B, N, H, E]``, and ``ln Σ_m exp(q·k_m/√E)`` of every query, ``[B, H, N]`` in float32.

    ``backend`` is flash or cuDNN; on the CPU there is one of its own.
    """
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, N, E]
    if qkv.is_cpu:
        out, logarithm = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    elif backend == SDPBackend.CUDNN_ATTENTION:
        out, logarithm, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    else:
        out, logarithm, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)
    return out.transpose(1, 2).contiguous(), logarithm.reshape(query.shape[:3]).contiguous()


def plan_mean(qkv: Tensor, logarithm: Tensor) -> tuple[Launch, Tensor]:
    """The launch that computes the mean row ``alpha [B, H, N]`` from :func:`with_logsumexp`, and its result."""
    qkv = _readable(qkv)
    alpha = torch.empty_like(logarithm)
    kept = {"p_max": logarithm, "p_inverse": None}
    return mean_row.plan(qkv, kept, alpha, _sizes(qkv), _constants(qkv)), alpha


def mean_through_torch(qkv: Tensor, row: Row | None, backend: SDPBackend) -> tuple[Tensor, Tensor]:
    """:func:`run` for ``row="mean"`` in 16-bit formats with torch's attention, and the row from its logarithms."""
    out, logarithm = with_logsumexp(qkv, backend)
    launch, alpha = plan_mean(qkv, logarithm)
    launch.run()
    return out, alpha


def _fused(qkv: Tensor) -> Iterator[tuple[str, SDPBackend]]:
    """Torch's fused kernels that can attend within ``qkv`` in its 16-bit format."""
    if qkv.dtype == torch.float32 or qkv.shape[4] % 8 or capability(qkv) < 80:
        return
    ways = {
        "sdpa-flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.can_use_flash_attention),
        "sdpa-cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.can_use_cudnn_attention),
    }
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    arguments = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    for label, (backend, usable) in ways.items():
        if not qkv.is_cuda or usable(arguments):  # without a GPU, what one may have
            yield label, backend


def unsupported_reasons(qkv: Tensor, row: Row | None) -> list[str]:
    """The reasons why :func:`run` does not support these arguments."""
    reasons = unsupported_dtypes(qkv=qkv)
    if not 0 < qkv.shape[4] <= LARGEST_HEAD:
        reasons.append(f"head_dim {qkv.shape[4]} is not between 1 and {LARGEST_HEAD}")
    return reasons


def variants(qkv: Tensor, row: Row | None) -> Sequence[Variant]:
    """Our own kernel in every configuration worth timing, and torch's attention where a kernel adds the row to it.

    The mean row is added to torch's where our own has no less to compute: where the class token is not apart.
    """
    worth_timing = configs(qkv)
    own: list[Variant] = [(str(config), partial(run, config=config)) for config in worth_timing]
    if INTERPRETED:
        return own[:1]
    if row == "mean":
        if not apart(qkv.shape[1], worth_timing[0]):
            own += [(label, partial(mean_through_torch, backend=backend)) for label, backend in _fused(qkv)]
        return own
    ways = [(label, partial(through_torch, attend=attend)) for label, attend in sdpa.ways(qkv)]
    return [*own, ("sdpa", through_torch), *ways]


IMPLEMENTATIONS = {"attention": Implementation(run, unsupported_reasons, variants)}
