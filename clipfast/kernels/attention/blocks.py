"""What the attention kernels do with one tile: read rows of a head, multiply, and keep a softmax up to date.

``CUT`` is how a head is read, ``(HEAD_DIM, FIRST, SECOND, ALIGNED)``: its columns, the powers of two that they are cut
into (the second may be 0), and what every stride is a multiple of.
"""

import triton
import triton.language as tl

from clipfast.kernels.arithmetic import dot, rounded
from clipfast.kernels.attention.mean_row import weights


@triton.jit
def rows(
    p_part,
    d_rows,
    image,
    part,
    head,
    start,
    N,
    s_n,
    CUT: tl.constexpr,
    WHOLE: tl.constexpr,
    FROM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Tokens ``start …`` of one head's queries, keys or values (part 0, 1, 2), zeros beyond ``N`` and the head.

    Read through the descriptor where there is one, else through pointers. WHOLE: there are as many as ROWS.
    """
    HEAD_DIM: tl.constexpr = CUT[0]
    ALIGNED: tl.constexpr = CUT[3]
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
def both_parts(
    p_part,
    d_rows,
    d_rows2,
    image,
    part,
    head,
    start,
    N,
    s_n,
    CUT: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """:func:`rows` in both parts of a head: ``[ROWS, FIRST]`` and ``[ROWS, SECOND]``, 0 where there is none."""
    FIRST: tl.constexpr = CUT[1]
    SECOND: tl.constexpr = CUT[2]
    b_rows = rows(p_part, d_rows, image, part, head, start, N, s_n, CUT, WHOLE, 0, FIRST, ROWS)
    b_rows2 = 0.0
    if SECOND:
        b_rows2 = rows(p_part, d_rows2, image, part, head, start, N, s_n, CUT, WHOLE, FIRST, SECOND, ROWS)
    return b_rows, b_rows2


@triton.jit
def scores(
    b_query,
    b_query2,
    b_key,
    b_key2,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``q·k`` of a tile of queries and one of keys, both parts of a head  ``[ROWS, COLUMNS]``."""
    SECOND: tl.constexpr = CUT[2]
    b_score = dot(b_query, tl.trans(b_key), tl.zeros([ROWS, COLUMNS], tl.float32), PRECISION)
    if SECOND:
        b_score = dot(b_query2, tl.trans(b_key2), b_score, PRECISION)
    return b_score


@triton.jit
def online_softmax(b_score, b_max, b_sum, scale_log2, EXACT: tl.constexpr):
    """Weights of one more tile of keys, the factor for what was summed before, and the new maxima and sums."""
    inner = 1.0 if EXACT else scale_log2  # maxima are kept in the units that weights() takes
    outer = scale_log2 if EXACT else 1.0
    b_new = tl.maximum(b_max, tl.max(b_score, 1) * inner)
    b_weight = weights(b_score, b_new[:, None], scale_log2, EXACT)
    b_keep = tl.exp2((b_max - b_new) * outer)
    return b_weight, b_keep, b_new, b_sum * b_keep + tl.sum(b_weight, 1)


@triton.jit
def begin(
    b_query,
    b_query2,
    p_key,
    p_value,
    scale_log2,
    CUT: tl.constexpr,
    APART: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The softmax of a tile of queries before any tile of keys: with APART = 1 it has seen the class token's key.

    Returns maxima, sums, and both parts of the weighted values.
    """
    HEAD_DIM: tl.constexpr = CUT[0]
    FIRST: tl.constexpr = CUT[1]
    SECOND: tl.constexpr = CUT[2]
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
        b_sum = weights(b_start, b_max, scale_log2, EXACT)  # 1, but for the rounding of the maximum
        b_out += b_sum[:, None] * tl.load(p_value + o_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
        if SECOND:
            b_out2 += b_sum[:, None] * tl.load(p_value + o_e2, mask=m_e2, other=0.0).to(tl.float32)[None, :]
    return b_max, b_sum, b_out, b_out2


@triton.jit
def keep_row(p_row, b_score, start, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores the scores of a tile's first query, to be normalised when all have been seen."""
    o_n = start + tl.arange(0, COLUMNS)
    mask = (tl.arange(0, ROWS) == 0)[:, None] & (o_n < N)[None, :]
    tl.store(p_row + tl.zeros([ROWS, 1], tl.int32) + o_n[None, :], b_score, mask=mask)


@triton.jit
def write_part(p_rows, b_out, m_rows, HEAD_DIM: tl.constexpr, FROM: tl.constexpr, COLUMNS: tl.constexpr):
    """Stores one part of the head outputs of a tile of queries, ``p_rows [ROWS]`` apart."""
    o_e = FROM + tl.arange(0, COLUMNS)
    mask = m_rows[:, None] & (o_e < HEAD_DIM)[None, :]
    tl.store(p_rows[:, None] + o_e[None, :], rounded(b_out, p_rows.dtype.element_ty), mask=mask)
