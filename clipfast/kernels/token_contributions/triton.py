"""What every token gives through every head: contributions ``[B, N, H, D]`` and maps per head ``[B, H, N, T]``.

``out[b,n,h] = (alpha[b,h,n] · v[b,n,h] @ M[h] + shift[b]) · scale[b]``, written once: weights, products, shift and
scale meet in registers. In plain torch the result, which is larger than all that it is made of, is read and written
again for each of them. Maps per head are the same with texts as columns, and with the heads before the tokens.

Bound by the write. That leaves time for two products where one would round the matrix: with values in bfloat16 a
float32 matrix enters as the sum of two bfloat16 ones, so the result is almost as exact as with float32 values.
"""

from collections.abc import Sequence
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import dot, dot_precision, rounded
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import (
    INTERPRETED,
    Config,
    Launch,
    alignment,
    capability,
    unit_stride,
    unsupported_dtypes,
    unsupported_head_dim,
)
from clipfast.kernels.text_maps.triton import LARGEST_HEAD, load_value, split_head

Tiles = dict[int, tuple[tuple[int, int, int, int], ...]]

# From a model; not timed on a GPU yet. By the number of columns up to which they serve: (BLOCK_M, BLOCK_D, warps,
# stages), the preferred first. A program converts its tile of the matrix once and goes through the tokens of an image
# with it; several programs per multiprocessor, so that some write while others multiply.
TILES: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    16: ((64, 16, 4, 3), (128, 16, 4, 2)),
    32: ((64, 32, 4, 3), (128, 32, 4, 2)),
    64: ((64, 64, 4, 2), (64, 64, 4, 3)),
    128: ((64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (64, 128, 4, 2)),
}
# The last of them would spill up to 13 registers with head_dim 104 and 128.
BLACKWELL: dict[int, tuple[tuple[int, int, int, int], ...]] = TILES | {32: TILES[32][:-1], 128: TILES[128][:-1]}
# Exact products of float32 run on the ordinary units, which want small tiles.
FLOAT32: dict[int, tuple[tuple[int, int, int, int], ...]] = {128: ((64, 32, 8, 2), (32, 32, 4, 2))}


@triton.jit
def _load_matrix(p_column, s_row, mask, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows ``START … START + SIZE`` of one head's tile of M, zeros from ``HEAD_DIM`` on  ``[SIZE, BLOCK_D]``."""
    o_e = START + tl.arange(0, SIZE)
    p_matrix = p_column[None, :] + (o_e * s_row)[:, None]
    return tl.load(p_matrix, mask=(o_e < HEAD_DIM)[:, None] & mask[None, :], other=0.0)


@triton.jit
def _rounded_off(b_matrix, TWO_PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """What a matrix loses when it is rounded to ``DTYPE``, in ``DTYPE``."""
    b_rest = b_matrix.to(DTYPE)
    if TWO_PARTS:
        b_rest = (b_matrix.to(tl.float32) - b_rest.to(tl.float32)).to(DTYPE)
    return b_rest


@triton.jit
def _multiply(b_value, b_matrix, b_rest, b_sum, TWO_PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """``b_sum + v @ M`` with ``M`` in one part or in two."""
    if TWO_PARTS:
        b_sum = dot(b_value, b_rest, b_sum, PRECISION)
    return dot(b_value, b_matrix, b_sum, PRECISION)


@triton.jit(do_not_specialize=["tokens"])
def _contributions_kernel(
    p_alpha,
    p_value,
    p_matrix,
    p_shift,
    p_scale,
    p_out,
    tokens,
    heads,
    columns,
    column_tiles,
    s_alpha_b,
    s_alpha_h,
    s_alpha_n,
    s_value_b,
    s_value_n,
    s_value_h,
    s_matrix_h,
    s_matrix_e,
    s_shift_b,
    s_scale_b,
    s_out_b,
    s_out_n,
    s_out_h,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    TWO_PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``out[b,n,h,d] = (alpha[b,h,n] Σ_e v[b,n,h,e] M[h,e,d] + shift[b,d]) · scale[b]`` for all tokens n.

    One program per image, head and tile of columns, the columns first, then the heads: what is written at a time lies
    together. ``columns`` and the strides of the matrix and of ``out`` count in steps of ``UNIT``.
    """
    program = tl.program_id(0)
    column_tile = program % column_tiles
    head = (program // column_tiles % heads).to(tl.int64)
    image = (program // column_tiles // heads).to(tl.int64)
    o_d = column_tile * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < columns * UNIT
    DTYPE: tl.constexpr = p_value.dtype.element_ty

    p_column = p_matrix + head * s_matrix_h * UNIT + o_d
    s_row = tl.cast(s_matrix_e, tl.int64) * UNIT
    b_matrix = _load_matrix(p_column, s_row, m_d, 0, FIRST, HEAD_DIM)  # [FIRST, BLOCK_D]
    b_rest = _rounded_off(b_matrix, TWO_PARTS, DTYPE)
    b_matrix = b_matrix.to(DTYPE)
    if SECOND:
        b_matrix_2 = _load_matrix(p_column, s_row, m_d, FIRST, SECOND, HEAD_DIM)  # [SECOND, BLOCK_D]
        b_rest_2 = _rounded_off(b_matrix_2, TWO_PARTS, DTYPE)
        b_matrix_2 = b_matrix_2.to(DTYPE)
    scale = 1.0
    if p_scale is not None:
        scale = tl.load(p_scale + image * s_scale_b).to(tl.float32)
    if p_shift is not None:
        b_shift = tl.load(p_shift + image * s_shift_b + o_d, mask=m_d, other=0.0).to(tl.float32) * scale  # [BLOCK_D]

    p_alpha += image * s_alpha_b + head * s_alpha_h
    p_value += tl.multiple_of(image * s_value_b + head * s_value_h, ALIGNED)
    p_out += (image * s_out_b + head * s_out_h) * UNIT
    for start in range(0, tokens, BLOCK_M):
        o_n = start + tl.arange(0, BLOCK_M)
        row = tl.minimum(o_n, tokens - 1).to(tl.int64)  # rows past the end read the last one again, and are not written
        p_row = p_value + tl.multiple_of(row * s_value_n, ALIGNED)  # [BLOCK_M]
        b_weight = tl.load(p_alpha + row * s_alpha_n).to(tl.float32) * scale
        b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_value = load_value(p_row, 0, FIRST, HEAD_DIM)  # [BLOCK_M, FIRST]
        b_out = _multiply(b_value, b_matrix, b_rest, b_out, TWO_PARTS, PRECISION)
        if SECOND:
            b_value = load_value(p_row, FIRST, SECOND, HEAD_DIM)
            b_out = _multiply(b_value, b_matrix_2, b_rest_2, b_out, TWO_PARTS, PRECISION)
        b_out *= b_weight[:, None]
        if p_shift is not None:
            b_out += b_shift[None, :]
        # Written and not read again: evicted before values and matrices, which are.
        p_tile = p_out + (row * s_out_n * UNIT)[:, None] + o_d[None, :]
        mask = (o_n < tokens)[:, None] & m_d[None, :]
        tl.store(p_tile, rounded(b_out, p_out.dtype.element_ty), mask=mask, cache_modifier=".cs")


def configs(columns: int, dtype: torch.dtype, on: int = 90) -> list[Config]:
    """The configurations for a number of columns and values of a dtype on a compute capability."""
    table = BLACKWELL if 100 <= on < 110 else TILES
    if dtype == torch.float32 and not INTERPRETED:  # there, fewer programs are better
        table = FLOAT32
    size = next((size for size in table if columns <= size), max(table))
    made = [
        Config({"BLOCK_M": block_m, "BLOCK_D": block_d}, warps, stages)
        for block_m, block_d, warps, stages in table[size]
    ]
    return made[: 1 if INTERPRETED else None]


def _configs(columns: int, value: Tensor) -> list[Config]:
    return configs(columns, value.dtype, capability(value))


def launch_into(
    out: Tensor,
    alpha: Tensor,
    value: Tensor,
    matrix: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    config: Config | None = None,
) -> Launch:
    """The launch that writes ``out [B, N, H, D]``, of any strides with a contiguous last axis."""
    value, matrix = unit_stride(value), unit_stride(matrix)
    shift = None if shift is None else unit_stride(shift)
    images, tokens, heads, head_dim = value.shape
    columns = matrix.shape[2]
    config = _configs(columns, value)[0] if config is None else config
    column_tiles = -(-columns // config.blocks["BLOCK_D"])
    unit = alignment(columns, *matrix.stride()[:2], *out.stride()[:3])
    first, second = split_head(head_dim)
    return Launch(
        kernel=_contributions_kernel,
        grid=(images * heads * column_tiles if tokens else 0,),
        arguments={
            "p_alpha": alpha,
            "p_value": value,
            "p_matrix": matrix,
            "p_shift": shift,
            "p_scale": scale,
            "p_out": out,
            "tokens": tokens,
            "heads": heads,
            "columns": columns // unit,
            "column_tiles": column_tiles,
            "s_alpha_b": alpha.stride(0),
            "s_alpha_h": alpha.stride(1),
            "s_alpha_n": alpha.stride(2),
            "s_value_b": value.stride(0),
            "s_value_n": value.stride(1),
            "s_value_h": value.stride(2),
            "s_matrix_h": matrix.stride(0) // unit,
            "s_matrix_e": matrix.stride(1) // unit,
            "s_shift_b": 0 if shift is None else shift.stride(0),
            "s_scale_b": 0 if scale is None else scale.stride(0),
            "s_out_b": out.stride(0) // unit,
            "s_out_n": out.stride(1) // unit,
            "s_out_h": out.stride(2) // unit,
        },
        constants={
            "HEAD_DIM": head_dim,
            "FIRST": first,
            "SECOND": second,
            "ALIGNED": alignment(*value.stride()[:3]),
            "UNIT": unit,
            "TWO_PARTS": value.dtype not in (torch.float32, matrix.dtype),
            "PRECISION": dot_precision(value.dtype),
        },
        config=config,
    )


def plan(
    alpha: Tensor,
    value: Tensor,
    basis: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Launch, Tensor]:
    """The launch that computes :func:`run`, with its result ``[B, N, H, D]``."""
    out = basis.new_empty((*value.shape[:3], basis.shape[2]))
    return launch_into(out, alpha, value, basis, shift, scale, config), out


def run(
    alpha: Tensor,
    value: Tensor,
    basis: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """:func:`clipfast.kernels.reference.token_contributions` ``[B, N, H, D]`` in the dtype of ``basis``."""
    launch, out = plan(alpha, value, basis, shift, scale, config)
    launch.run()
    return out


def unsupported_reasons(
    alpha: Tensor, value: Tensor, basis: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    tensors = {"alpha": alpha, "value": value, "basis": basis, "shift": shift, "scale": scale}
    return unsupported_dtypes(**tensors) + unsupported_head_dim(value.shape[3], LARGEST_HEAD)


def variants(
    alpha: Tensor, value: Tensor, basis: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
) -> Sequence[Variant]:
    """One variant per configuration."""
    return [(str(config), partial(run, config=config)) for config in _configs(basis.shape[2], value)]


# ----------------------------------------------------------------------------------------------------- maps per head


def plan_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, config: Config | None = None) -> tuple[Launch, Tensor]:
    """The launch that computes :func:`run_maps`, with its result ``[B, H, N, T]``."""
    images, tokens, heads, _ = value.shape
    out = alpha.new_empty((images, heads, tokens, text_basis.shape[2]))
    return launch_into(out.transpose(1, 2), alpha, value, text_basis, config=config), out


def run_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, config: Config | None = None) -> Tensor:
    """:func:`clipfast.kernels.reference.head_maps` ``[B, H, N, T]`` in the dtype of ``alpha``."""
    launch, out = plan_maps(alpha, value, text_basis, config)
    launch.run()
    return out


def unsupported_reasons_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> list[str]:
    """The reasons why :func:`run_maps` does not support these tensors."""
    return unsupported_dtypes(alpha=alpha, value=value, text_basis=text_basis) + unsupported_head_dim(
        value.shape[3], LARGEST_HEAD
    )


def variants_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> Sequence[Variant]:
    """One variant per configuration."""
    return [(str(config), partial(run_maps, config=config)) for config in _configs(text_basis.shape[2], value)]


IMPLEMENTATIONS = {
    "token_contributions": Implementation(run, unsupported_reasons, variants),
    "head_maps": Implementation(run_maps, unsupported_reasons_maps, variants_maps),
}
