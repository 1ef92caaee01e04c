"""Text maps: scores of every token for every text, summed over heads (and layers), in one pass over the values.

``out[b,n,t] += Σ_h alpha[b,h,n] <v[b,n,h], U[h,:,t]>``. A program holds a tile of tokens and texts in registers and
goes through the heads: the values are read once, where they lie inside the packed queries, keys and values, and ``out``
is read and written once. In plain torch the weighted values are a copy first: three times the bytes. The weights scale
the products, not the values, which would round them once more: the maps are as exact as float32 sums of products are,
at the same cost. Several layers at once are the same sum with more heads: nothing is read and written in between.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import gcd

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import dot, dot_precision, rounded
from clipfast.kernels.derived import Derived
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import (
    INTERPRETED,
    Config,
    Launch,
    alignment,
    capability,
    power_of_two,
    shared_memory,
    unit_stride,
    unsupported_dtypes,
    unsupported_head_dim,
)

LARGEST_HEAD = 128

# From a model; not timed on a GPU yet. By the largest number of texts: (BLOCK_M, BLOCK_T, warps, stages), the preferred
# first. The time is that of reading the values and of reading and writing `out`; what counts is to have
# enough bytes under way, and, as every program reads all of U from the L2 cache, many tokens per program. A 128x128
# tile takes 128 registers of 256 threads: one program fits a multiprocessor, or three of half the tokens.
TILES = {
    16: ((128, 16, 4, 4), (64, 16, 4, 4), (128, 16, 4, 3)),
    32: ((128, 32, 4, 4), (64, 32, 4, 4), (128, 32, 4, 3)),
    64: ((128, 64, 8, 3), (256, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 3)),
    128: ((128, 128, 8, 3), (128, 128, 8, 4), (64, 128, 4, 3), (256, 64, 8, 3), (128, 64, 8, 3)),
}
# Elsewhere the operands of a product pass through registers, too: 128x128 tiles would spill.
AMPERE = TILES | {64: ((128, 64, 8, 3), (64, 64, 4, 3)), 128: ((64, 128, 4, 3), (128, 64, 8, 3))}
# The last of them would spill two registers with head_dim 80.
BLACKWELL = TILES | {128: TILES[128][:-1]}
# Exact products of float32 run on the ordinary units, which want small tiles.
FLOAT32 = {16: ((64, 16, 4, 2),), 128: ((64, 32, 8, 2), (32, 32, 4, 2))}


@triton.jit
def load_value(p_row, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Columns ``START … START + SIZE`` of one head's values, zeros from ``HEAD_DIM`` on  ``[BLOCK_M, SIZE]``."""
    o_e = START + tl.arange(0, SIZE)
    if START + SIZE > HEAD_DIM:
        b_value = tl.load(p_row[:, None] + o_e[None, :], mask=(o_e < HEAD_DIM)[None, :], other=0.0)
    else:
        b_value = tl.load(p_row[:, None] + o_e[None, :])
    return b_value


@triton.jit
def _load_basis(p_head, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr):
    """Rows ``START … START + SIZE`` of one head's tile of texts, zeros from ``HEAD_DIM`` on  ``[SIZE, BLOCK_T]``."""
    o_e = START + tl.arange(0, SIZE)
    p_basis = p_head + (o_e * BLOCK_T)[:, None] + tl.arange(0, BLOCK_T)[None, :]
    if START + SIZE > HEAD_DIM:
        b_basis = tl.load(p_basis, mask=(o_e < HEAD_DIM)[:, None], other=0.0)
    else:
        b_basis = tl.load(p_basis)
    return b_basis


@triton.jit
def _listed(p_heads, i, count):
    """The pair in place ``i``, the last one's beyond the end: ``i`` itself where there is no list."""
    pair = tl.minimum(i, count - 1)
    if p_heads is not None:
        pair = tl.load(p_heads + pair).to(tl.int32)
    return pair


@triton.jit(do_not_specialize=["rows", "tokens", "texts", "count", "s_out"])
def _text_maps_kernel(
    p_alpha,
    p_value,
    p_basis,
    p_heads,
    p_out,
    rows,
    tokens,
    texts,
    count,
    text_tiles,
    s_alpha_b,
    s_alpha_l,
    s_alpha_h,
    s_alpha_n,
    s_value_b,
    s_value_l,
    s_value_n,
    s_value_h,
    s_out,
    LAYERS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``out[b,n,t] (+)= Σ_(l,h) alpha[b,l,h,n] <v[b,l,n,h], U[l,h,:,t]>`` for ``BLOCK_M`` (image, token) rows.

    A pair is ``layer · HEADS + head``: the first ``count`` of them, or those that ``p_heads [count]`` lists.
    ``p_basis`` is ``[text tiles, pairs, HEAD_DIM, BLOCK_T]``. ``texts`` and ``s_out`` count in steps of ``UNIT``, so
    that the compiler knows how the rows of ``out`` are aligned.
    """
    program = tl.program_id(0)
    first_row, text_tile = program // text_tiles * BLOCK_M, program % text_tiles
    o_m = tl.arange(0, BLOCK_M)
    row = tl.minimum(first_row + o_m, rows - 1)  # rows past the end read the last one again and are not written
    image, token = (row // tokens).to(tl.int64), (row % tokens).to(tl.int64)
    o_value = tl.multiple_of(image * s_value_b + token * s_value_n, ALIGNED)  # [BLOCK_M]
    o_alpha = image * s_alpha_b + token * s_alpha_n
    p_basis += text_tile.to(tl.int64) * (LAYERS * HEADS * HEAD_DIM * BLOCK_T)

    # The next pair and its weights are fetched while the products of this one run.
    pair = _listed(p_heads, 0, count)
    o_pair = (pair // HEADS).to(tl.int64) * s_alpha_l + (pair % HEADS).to(tl.int64) * s_alpha_h
    b_next = tl.load(p_alpha + o_pair + o_alpha).to(tl.float32)  # [BLOCK_M]
    b_out = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for i in range(count):
        b_alpha = b_next
        following = _listed(p_heads, i + 1, count)
        o_pair = (following // HEADS).to(tl.int64) * s_alpha_l + (following % HEADS).to(tl.int64) * s_alpha_h
        b_next = tl.load(p_alpha + o_pair + o_alpha).to(tl.float32)

        o_pair = (pair // HEADS).to(tl.int64) * s_value_l + (pair % HEADS).to(tl.int64) * s_value_h
        p_row = p_value + tl.multiple_of(o_pair, ALIGNED) + o_value
        p_head = p_basis + pair.to(tl.int64) * (HEAD_DIM * BLOCK_T)
        b_basis = _load_basis(p_head, 0, FIRST, HEAD_DIM, BLOCK_T)  # [FIRST, BLOCK_T]
        b_value = load_value(p_row, 0, FIRST, HEAD_DIM)  # [BLOCK_M, FIRST]
        b_product = dot(b_value, b_basis, tl.zeros([BLOCK_M, BLOCK_T], tl.float32), PRECISION)
        if SECOND:
            b_basis = _load_basis(p_head, FIRST, SECOND, HEAD_DIM, BLOCK_T)
            b_value = load_value(p_row, FIRST, SECOND, HEAD_DIM)
            b_product = dot(b_value, b_basis, b_product, PRECISION)
        b_out += b_alpha[:, None] * b_product
        pair = following

    width = texts * UNIT
    o_t = text_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    p_rows = p_out + (first_row + o_m).to(tl.int64) * s_out * UNIT
    p_tile = p_rows[:, None] + o_t[None, :]  # [BLOCK_M, BLOCK_T]
    mask = (first_row + o_m < rows)[:, None] & (o_t < width)[None, :]
    if ADD:
        b_out += tl.load(p_tile, mask=mask, other=0.0)
    tl.store(p_tile, rounded(b_out, p_out.dtype.element_ty), mask=mask)


def split_head(head_dim: int) -> tuple[int, int]:
    """``head_dim`` as one or two powers of two, 80 → 64 and 16: padded to one it would be up to twice the products."""
    whole = power_of_two(head_dim, 16)
    rest = power_of_two(head_dim - whole // 2, 16)
    return (whole, 0) if 2 * rest >= whole else (whole // 2, rest)


def configs(texts: int, head_dim: int, dtype: torch.dtype, on: int = 90) -> list[Config]:
    """The configurations for values of a dtype on a compute capability, with as many stages as there is memory for."""
    table = {90: TILES, 100: BLACKWELL, 103: BLACKWELL}.get(on, AMPERE)
    if dtype == torch.float32 and not INTERPRETED:  # there, fewer programs are better
        table = FLOAT32
    size = next((size for size in table if texts <= size), max(table))
    available = shared_memory(on) // (sum(split_head(head_dim)) * dtype.itemsize)
    fitting = {}
    for block_m, block_t, warps, stages in table[size]:
        blocks = {"BLOCK_M": block_m, "BLOCK_T": block_t}
        config = Config(blocks, warps, min(stages, available // (block_m + block_t)))
        fitting[str(config)] = config
    return list(fitting.values())[: 1 if INTERPRETED else None]


def _configs(texts: int, value: Tensor) -> list[Config]:
    return configs(texts, value.shape[-1], value.dtype, capability(value))


_LAID_OUT = Derived()


def _laid_out(text_basis: Tensor, dtype: torch.dtype, block: int) -> Tensor:
    """:func:`_cut` of ``[..., E, T]`` with the first axes as one, made once for as long as the basis lives."""
    return _LAID_OUT.get(text_basis, (dtype, block), lambda: _cut(text_basis.flatten(0, -3), dtype, block))


def _cut(text_basis: Tensor, dtype: torch.dtype, block: int) -> Tensor:
    """``[pairs, E, T]`` as ``[text tiles, pairs, E, block]`` in ``dtype``; columns from T on are never looked at."""
    pairs, head_dim, texts = text_basis.shape
    if texts == block and text_basis.dtype == dtype and text_basis.is_contiguous():
        return text_basis[None]
    whole, left = divmod(texts, block)
    make = text_basis.new_zeros if INTERPRETED else text_basis.new_empty  # numpy warns of what is never looked at
    cut = make((whole + (left > 0), pairs, head_dim, block), dtype=dtype)
    if whole:
        cut[:whole] = text_basis[..., : whole * block].unflatten(2, (whole, block)).permute(2, 0, 1, 3)
    if left:
        cut[whole, ..., :left] = text_basis[..., whole * block :]
    return cut


def _plan(
    alpha: Tensor,
    value: Tensor,
    s_layer: int,
    text_basis: Tensor,
    out: Tensor,
    heads: Tensor | None,
    add: bool,
    config: Config | None,
) -> Launch:
    """The launch for ``alpha [B, L, H, N]``, the first layer's ``value [B, N, H, E]``, ``text_basis [..., E, T]``."""
    images, tokens, count, head_dim = value.shape
    texts = out.shape[2]
    config = _configs(texts, value)[0] if config is None else config
    block_m, block_t = config.blocks["BLOCK_M"], config.blocks["BLOCK_T"]
    pairs = alpha.shape[1] * count if heads is None else len(heads)
    text_tiles = -(-texts // block_t)
    unit = gcd(texts, 4)  # 16 bytes of float32
    first, second = split_head(head_dim)
    return Launch(
        kernel=_text_maps_kernel,
        grid=(-(-images * tokens // block_m) * text_tiles if pairs else 0,),
        arguments={
            "p_alpha": alpha,
            "p_value": value,
            "p_basis": _laid_out(text_basis, value.dtype, block_t),
            "p_heads": None if heads is None else heads.to(value.device).contiguous(),
            "p_out": out,
            "rows": images * tokens,
            "tokens": tokens,
            "texts": texts // unit,
            "count": pairs,
            "text_tiles": text_tiles,
            "s_alpha_b": alpha.stride(0),
            "s_alpha_l": alpha.stride(1),
            "s_alpha_h": alpha.stride(2),
            "s_alpha_n": alpha.stride(3),
            "s_value_b": value.stride(0),
            "s_value_l": s_layer,
            "s_value_n": value.stride(1),
            "s_value_h": value.stride(2),
            "s_out": texts // unit,
        },
        constants={
            "LAYERS": alpha.shape[1],
            "HEADS": count,
            "HEAD_DIM": head_dim,
            "FIRST": first,
            "SECOND": second,
            "ALIGNED": alignment(s_layer, *value.stride()[:3]),
            "UNIT": unit,
            "ADD": add,
            "PRECISION": dot_precision(value.dtype),
        },
        config=config,
    )


def plan(
    alpha: Tensor,
    value: Tensor,
    text_basis: Tensor,
    out: Tensor,
    heads: Tensor | None = None,
    config: Config | None = None,
) -> Launch:
    """The launch that computes :func:`run`."""
    return _plan(alpha[:, None], unit_stride(value), 0, text_basis, out, heads, True, config)


def run(
    alpha: Tensor,
    value: Tensor,
    text_basis: Tensor,
    out: Tensor,
    heads: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Adds :func:`clipfast.kernels.reference.text_maps` to ``out [B, N, T]``."""
    plan(alpha, value, text_basis, out, heads, config).run()


def unsupported_reasons(
    alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None = None
) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    tensors = {"alpha": alpha, "value": value, "text_basis": text_basis, "out": out}
    return unsupported_dtypes(**tensors) + unsupported_head_dim(value.shape[3], LARGEST_HEAD)


def variants(
    alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None = None
) -> Sequence[Variant]:
    """One variant per configuration."""
    return [(str(config), partial(run, config=config)) for config in _configs(out.shape[2], value)]


# ------------------------------------------------------------------------------------------------------- over layers


def _spacing(values: Sequence[Tensor]) -> int | None:
    """How many elements lie between a layer's values and the next layer's, None where they are not evenly spaced."""
    first = values[0]
    memory = first.untyped_storage().data_ptr()
    alike = all(v.untyped_storage().data_ptr() == memory and v.stride() == first.stride() for v in values)
    spaces = {int(after.storage_offset()) - int(before.storage_offset()) for before, after in pairwise(values)}
    # Tensors without memory (on the meta device) all have the address 0.
    return (spaces or {0}).pop() if memory and alike and len(spaces) <= 1 else None


def plan_layered(
    alpha: Tensor,
    values: Sequence[Tensor],
    text_basis: Tensor,
    heads: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Launch, Tensor]:
    """The launch that computes :func:`run_layered`, with its result ``[B, N, T]``.

    Values that are slices of one buffer, one after the other, are read where they are; others are copied together.
    """
    images, layers, count, tokens = alpha.shape
    pairs = layers * count if heads is None else len(heads)
    make = alpha.new_empty if pairs else alpha.new_zeros  # no program writes a sum of nothing
    out = make((images, tokens, text_basis.shape[3]))
    if layers:
        s_layer, value = _spacing(values), values[0]
        if s_layer is None or unit_stride(value) is not value:
            stacked = torch.stack([each.contiguous() for each in values])
            s_layer, value = stacked.stride(0), stacked[0]
    else:
        s_layer, value = 0, alpha.new_empty((images, tokens, count, text_basis.shape[2]))
    return _plan(alpha, value, s_layer, text_basis, out, heads, False, config), out


def run_layered(
    alpha: Tensor,
    values: Sequence[Tensor],
    text_basis: Tensor,
    heads: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """:func:`clipfast.kernels.reference.layered_text_maps` ``[B, N, T]`` in the dtype of ``alpha``, in one launch."""
    launch, out = plan_layered(alpha, values, text_basis, heads, config)
    launch.run()
    return out


def unsupported_reasons_layered(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None = None
) -> list[str]:
    """The reasons why :func:`run_layered` does not support these tensors."""
    if any(value.dtype != values[0].dtype for value in values):
        return ["values differ in dtype"]
    tensors = {"alpha": alpha, "values": values[0] if values else None, "text_basis": text_basis}
    return unsupported_dtypes(**tensors) + unsupported_head_dim(text_basis.shape[2], LARGEST_HEAD)


def variants_layered(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None = None
) -> Sequence[Variant]:
    """One variant per configuration."""
    offered = _configs(text_basis.shape[3], values[0]) if values else [None]
    return [(str(config or ""), partial(run_layered, config=config)) for config in offered]


# --------------------------------------------------------------------------------------------------- without values


def run_from_tokens(
    alpha: Tensor,
    tokens: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    text_basis: Tensor,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Adds :func:`clipfast.kernels.reference.text_maps_from_tokens` to ``out [B, N, T]``; forms the values first."""
    heads, head_dim, _ = text_basis.shape
    weight, bias = value_weight.flatten(0, 1).to(tokens.dtype), value_bias.flatten().to(tokens.dtype)
    run(alpha, F.linear(tokens, weight, bias).unflatten(2, (heads, head_dim)), text_basis, out, None, config)


def unsupported_reasons_from_tokens(
    alpha: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor, text_basis: Tensor, out: Tensor
) -> list[str]:
    """The reasons why :func:`run_from_tokens` does not support these tensors."""
    tensors = {"alpha": alpha, "tokens": tokens, "text_basis": text_basis, "out": out}
    weights = {"value_weight": value_weight, "value_bias": value_bias}
    return unsupported_dtypes(**tensors, **weights) + unsupported_head_dim(text_basis.shape[1], LARGEST_HEAD)


IMPLEMENTATIONS = {
    "text_maps": Implementation(run, unsupported_reasons, variants),
    "text_maps_from_tokens": Implementation(run_from_tokens, unsupported_reasons_from_tokens),
    "layered_text_maps": Implementation(run_layered, unsupported_reasons_layered, variants_layered),
}
