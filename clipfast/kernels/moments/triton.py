"""First and second moments of every head's codes, one batch after the other.

With ``x[b,g] = [codes[b,g], shared[b]] − centre[g]``: ``total[g] += Σ_b x`` and ``second[g] += Σ_b x xᵀ``. Mean and
covariance of the dataset follow from these, and with them TEXTSPAN for any pool of texts, without the images. In plain
torch the codes are written out again, joined and centred, and multiplied in float64; here they are read where they are,
upcast and centred on the way, and only the sums are written.

32 images are summed in float32, exactly rounded (tensor cores would round the inputs), and such sums in float64: the
error does not grow with the batch. The centre keeps them from cancelling. Only tiles on or above the diagonal are
computed; what is added to an entry is added to its mirror image, so a matrix that is symmetric stays so to the bit.
"""

from collections.abc import Sequence
from functools import partial
from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import dot
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import INTERPRETED, Config, Launch, unsupported_dtypes

# From a model; not timed on a GPU yet. BLOCK_C: columns of a tile. A code of 64 with three shared entries has 67
# columns: tiles of 16 compute 1.7 times what is needed, tiles of 32 compute 2.7 times and read half as often.
CONFIGS = (
    Config({"BLOCK_C": 16, "BLOCK_B": 32}, warps=1, stages=1),
    Config({"BLOCK_C": 32, "BLOCK_B": 32}, warps=4, stages=1),
)


@triton.jit
def _centred(
    p_codes,
    p_shared,
    p_centre,
    o_b,
    o_c,
    images,
    s_code_b,
    s_code_e,
    s_shared_b,
    s_shared_x,
    CODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """``x = [code, shared] − centre`` of one head, 0 beyond the images and the columns  [BLOCK_B, BLOCK_C]."""
    m_b = (o_b < images)[:, None]
    m_c = (o_c < COLUMNS)[None, :]
    o_row, o_column = o_b.to(tl.int64), o_c.to(tl.int64)
    p_code = p_codes + tl.multiple_of(o_row * s_code_b, ALIGNED)[:, None] + (o_column * s_code_e)[None, :]
    b_x = tl.load(p_code, mask=m_b & (o_c < CODE)[None, :], other=0.0).to(tl.float32)
    p_rest = p_shared + (o_row * s_shared_b)[:, None] + ((o_column - CODE) * s_shared_x)[None, :]
    b_x += tl.load(p_rest, mask=m_b & m_c & (o_c >= CODE)[None, :], other=0.0).to(tl.float32)
    b_centre = tl.load(p_centre + o_c, mask=o_c < COLUMNS, other=0.0).to(tl.float32)
    return tl.where(m_b, b_x - b_centre[None, :], 0.0)


@triton.jit
def _moments_kernel(
    p_codes,
    p_shared,
    p_centre,
    p_total,
    p_second,
    images,
    s_code_b,
    s_code_g,
    s_code_e,
    s_shared_b,
    s_shared_x,
    CODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """``second[g][i,j] += Σ_b x_i x_jᵀ`` for one pair of tiles ``i ≤ j``; those on the diagonal add ``total[g][i]``."""
    PAIRS: tl.constexpr = TILES * (TILES + 1) // 2
    program = tl.program_id(0)
    group = (program // PAIRS).to(tl.int64)
    i = program * 0
    j = program % PAIRS  # counted from the diagonal on, row by row
    for _ in tl.static_range(TILES - 1):
        beyond = j >= TILES - i
        j = tl.where(beyond, j - (TILES - i), j)
        i = tl.where(beyond, i + 1, i)
    j += i
    p_codes += tl.multiple_of(group * s_code_g, ALIGNED)
    p_centre += group * COLUMNS
    o_i = i * BLOCK_C + tl.arange(0, BLOCK_C)
    o_j = j * BLOCK_C + tl.arange(0, BLOCK_C)
    b_total = tl.zeros([BLOCK_C], tl.float64)
    b_second = tl.zeros([BLOCK_C, BLOCK_C], tl.float64)
    for start in range(0, images, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B)
        b_i = _centred(
            p_codes,
            p_shared,
            p_centre,
            o_b,
            o_i,
            images,
            s_code_b,
            s_code_e,
            s_shared_b,
            s_shared_x,
            CODE,
            COLUMNS,
            ALIGNED,
        )
        b_j = _centred(
            p_codes,
            p_shared,
            p_centre,
            o_b,
            o_j,
            images,
            s_code_b,
            s_code_e,
            s_shared_b,
            s_shared_x,
            CODE,
            COLUMNS,
            ALIGNED,
        )
        b_total += tl.sum(b_i, 0).to(tl.float64)
        b_second += dot(tl.trans(b_i), b_j, tl.zeros([BLOCK_C, BLOCK_C], tl.float32), "ieee").to(tl.float64)
    m_i = o_i < COLUMNS
    if i == j:
        p_own = p_total + group * COLUMNS + o_i
        tl.store(p_own, tl.load(p_own, mask=m_i, other=0.0) + b_total, mask=m_i)
    # On the diagonal the upper half of a tile is taken for both halves.
    o_row, o_column = o_i[:, None], o_j[None, :]
    mask = m_i[:, None] & (o_column < COLUMNS) & (o_row <= o_column)
    p_second += group * COLUMNS * COLUMNS
    p_upper = p_second + o_row * COLUMNS + o_column
    tl.store(p_upper, tl.load(p_upper, mask=mask, other=0.0) + b_second, mask=mask)
    mask = mask & (o_row < o_column)
    p_lower = p_second + o_column * COLUMNS + o_row
    tl.store(p_lower, tl.load(p_lower, mask=mask, other=0.0) + b_second, mask=mask)


def plan(
    codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor, config: Config = CONFIGS[0]
) -> Launch:
    """The launch that computes :func:`run`."""
    images, groups, code = codes.shape
    columns = code + shared.shape[1]
    tiles = -(-columns // config.blocks["BLOCK_C"])
    return Launch(
        kernel=_moments_kernel,
        grid=(groups * tiles * (tiles + 1) // 2 if images else 0,),
        arguments={
            "p_codes": codes,
            "p_shared": shared,
            "p_centre": centre.contiguous(),
            "p_total": total,
            "p_second": second,
            "images": images,
            "s_code_b": codes.stride(0),
            "s_code_g": codes.stride(1),
            "s_code_e": codes.stride(2),
            "s_shared_b": shared.stride(0),
            "s_shared_x": shared.stride(1),
        },
        constants={
            "CODE": code,
            "COLUMNS": columns,
            "TILES": tiles,
            "ALIGNED": gcd(16, *codes.stride()[:2]),
        },
        config=config,
    )


def run(
    codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor, config: Config = CONFIGS[0]
) -> None:
    """Adds :func:`clipfast.kernels.reference.moments` to ``total`` and ``second``, which are float64."""
    plan(codes, shared, centre, total, second, config).run()


def unsupported_reasons(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    return unsupported_dtypes(codes=codes, shared=shared, centre=centre)


def variants(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> Sequence[Variant]:
    """One variant per configuration."""
    configs = CONFIGS[:1] if INTERPRETED else CONFIGS
    return [(str(config), partial(run, config=config)) for config in configs]


IMPLEMENTATIONS = {"moments": Implementation(run, unsupported_reasons, variants)}
