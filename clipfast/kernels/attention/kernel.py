"""The attention kernel: a tile of queries with all keys, and the pooled token's row on the way; and its launch."""

from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import dot, rounded
from clipfast.kernels.attention import mean_row
from clipfast.kernels.attention.blocks import begin, both_parts, keep_row, online_softmax, rows, scores, write_part
from clipfast.kernels.attention.mean_row import weights
from clipfast.kernels.attention.tiles import (
    OWN_PROGRAM,
    apart,
    configs,
    constants_of,
    head_parts,
    readable,
    row_place,
    sizes_of,
)
from clipfast.kernels.launch import Config, Launch, describe, power_of_two
from clipfast.kernels.query_row.triton import attend
from clipfast.kernels.reference import Row


@triton.jit
def _tile(
    p_head,
    d_head,
    p_results,
    place,
    sizes,
    CUT: tl.constexpr,
    APART: tl.constexpr,
    WHOLE: tl.constexpr,
    CLASS: tl.constexpr,
    KEPT: tl.constexpr,
    WAY: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The queries ``first …`` of one head. With CLASS the class token's row comes along, on the same keys and values.

    Where it is apart, it has a softmax of its own, in float32 without tensor cores. Else it is the first of these
    queries. Of KEPT, ALPHA writes its weights. The tuples are those of :func:`_attention_kernel`.
    """
    p_query, p_key, p_value = p_head
    d_query, d_key, d_query2, d_key2 = d_head
    p_out, p_alpha, p_max, p_inverse = p_results
    image, head, first = place
    heads, N, s_n, scale_log2 = sizes
    HEAD_DIM: tl.constexpr = CUT[0]
    FIRST: tl.constexpr = CUT[1]
    SECOND: tl.constexpr = CUT[2]
    ALPHA: tl.constexpr = KEPT[0]
    STATISTICS: tl.constexpr = KEPT[1]
    PRECISION: tl.constexpr = WAY[0]
    EXACT: tl.constexpr = WAY[1]
    BLOCK_R: tl.constexpr = BLOCKS[0]
    BLOCK_M: tl.constexpr = BLOCKS[1]
    BLOCK_N: tl.constexpr = BLOCKS[2]
    o_m = first + tl.arange(0, BLOCK_M)
    m_m = o_m < N
    # [BLOCK_M, FIRST] and [BLOCK_M, SECOND]
    b_query, b_query2 = both_parts(p_query, d_query, d_query2, image, 0, head, first, N, s_n, CUT, False, BLOCK_M)
    b_max, b_sum, b_out, b_out2 = begin(b_query, b_query2, p_key, p_value, scale_log2, CUT, APART, BLOCK_M, EXACT)
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
        b_key, b_key2 = both_parts(p_key, d_key, d_key2, image, 1, head, start, N, s_n, CUT, WHOLE, BLOCK_N)
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
        b_score = scores(b_query, b_query2, b_key, b_key2, BLOCK_M, BLOCK_N, CUT, PRECISION)
        if not WHOLE:
            b_score = tl.where((start + tl.arange(0, BLOCK_N) < N)[None, :], b_score, float("-inf"))
        if CLASS and ALPHA and not APART:
            keep_row(p_alpha, b_score, start, N, BLOCK_M, BLOCK_N)
        b_weight, b_keep, b_max, b_sum = online_softmax(b_score, b_max, b_sum, scale_log2, EXACT)
        b_value = rows(p_value, d_key, image, 2, head, start, N, s_n, CUT, WHOLE, 0, FIRST, BLOCK_N)
        b_weight = rounded(b_weight, b_value.dtype)
        if CLASS and APART:
            b_z = b_z * class_keep + tl.sum(b_value.to(tl.float32) * b_row[:, None], 0)
        b_out = dot(b_weight, b_value, b_out * b_keep[:, None], PRECISION)
        if SECOND:
            b_value2 = rows(p_value, d_key2, image, 2, head, start, N, s_n, CUT, WHOLE, FIRST, SECOND, BLOCK_N)
            b_out2 = dot(b_weight, b_value2, b_out2 * b_keep[:, None], PRECISION)
    b_inverse = 1.0 / b_sum
    if STATISTICS:
        tl.store(p_max + o_m, b_max, mask=m_m)
        tl.store(p_inverse + o_m, b_inverse, mask=m_m)
    p_rows = p_out + o_m.to(tl.int64) * heads * HEAD_DIM
    b_out *= b_inverse[:, None]
    b_out2 *= b_inverse[:, None]
    write_part(p_rows, b_out, m_m, HEAD_DIM, 0, FIRST)
    if SECOND:
        write_part(p_rows, b_out2, m_m, HEAD_DIM, FIRST, SECOND)
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
                b_row = weights(b_row, class_max, scale_log2, EXACT or APART) * inverse
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
    :mod:`.tiles`) or 0; WHOLE says that the keys fill theirs. A head is cut into FIRST + SECOND columns. STATISTICS
    keeps every query's maximum and inverse sum for :mod:`.mean_row`.
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
    CUT: tl.constexpr = (HEAD_DIM, FIRST, SECOND, ALIGNED)
    BLOCKS: tl.constexpr = (BLOCK_R, BLOCK_M, BLOCK_N)
    p_head = (p_query, p_key, p_value)
    d_head = (d_query, d_key, d_query2, d_key2)
    p_results = (p_out, p_alpha, p_max, p_inverse)
    place = (image, head, APART + tile * BLOCK_M)
    sizes = (heads, N, s_n, scale_log2)
    KEPT: tl.constexpr = (ALPHA, STATISTICS)
    WAY: tl.constexpr = (PRECISION, EXACT)
    if ROW and tile == (tiles if ROW == 2 else 0):
        if ROW == 1:
            _tile(p_head, d_head, p_results, place, sizes, CUT, APART, WHOLE, True, KEPT, WAY, BLOCKS)
        else:
            b_z = attend(
                *p_head, p_alpha, N, s_n, s_n, scale_log2, HEAD_DIM, ALIGNED, APART == 1, APART, BLOCK_E, BLOCK_R
            )
            if APART:
                o_z = tl.arange(0, BLOCK_E)
                tl.store(p_out + o_z, rounded(b_z, p_out.dtype.element_ty), mask=o_z < HEAD_DIM)
    else:
        _tile(p_head, d_head, p_results, place, sizes, CUT, APART, WHOLE, False, KEPT, WAY, BLOCKS)


def _descriptors(qkv: Tensor, config: Config, parts: tuple[int, int]) -> dict[str, Any]:
    """Descriptors of tiles of queries, and of keys or values, in both parts of a head; None for what is not used."""
    names = ("d_query", "d_key", "d_query2", "d_key2")
    if not config.blocks["DESCRIPTORS"]:
        return dict.fromkeys(names)
    view = qkv.permute(0, 2, 3, 1, 4)  # [B, 3, H, N, E]
    tiles = [(config.blocks[rows], part) for part in parts for rows in ("BLOCK_M", "BLOCK_N")]
    return {
        name: describe(view, (1, 1, 1, rows, columns)) if columns else None
        for name, (rows, columns) in zip(names, tiles, strict=True)
    }


def plan(qkv: Tensor, row: Row | None, config: Config | None = None) -> tuple[list[Launch], Tensor, Tensor]:
    """The launches that compute :func:`.triton.run`, in order, with its results.

    Args:
        qkv: ``[B, N, 3, H, E]``.
        row: the attention row to return.
        config: how programs are cut; None for the preferred one.
    """
    config = configs(qkv)[0] if config is None else config
    qkv = readable(qkv)
    images, tokens, _, heads, head_dim = qkv.shape
    alone = apart(tokens, config)
    parts = head_parts(head_dim, qkv.dtype)
    out = qkv.new_empty((images, tokens, heads, head_dim))
    alpha = qkv.new_empty((images, heads, tokens), dtype=torch.float32)
    kept = dict.fromkeys(("p_max", "p_inverse"))  # per query
    if row == "mean":
        kept = {name: torch.empty_like(alpha) for name in kept}
    shared, constants = sizes_of(qkv), constants_of(qkv)
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
