"""The first linear layer of an MLP with its activation in the same launch: ``f(x Wᵀ + b)``.

cuBLASLt has a GELU epilogue, but it is the tanh form: another function. A pass of its own for the activation reads and
writes the hidden layer once more, 4 bytes per element in 16-bit formats, a quarter of the product's time at width 1024.
Here the activation is computed from the float32 sums in registers. What it costs the arithmetic units is hidden behind
the tensor cores' work on other tiles, in one of two ways:

- ``_deferred_kernel``: a program keeps a finished tile in registers, rounded, and activates and stores it in slices
  between the products of its next tile, which the tensor cores compute meanwhile.
- ``_direct_kernel``: activates at once; two programs share a multiprocessor, one multiplies while the other activates.

Both are persistent, and read and write whole tiles through tensor descriptors (the bulk copy engine of Hopper and
later). Where there is none, or rows are no multiple of 16 bytes, the direct kernel reads by masked pointers.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from clipfast.kernels.arithmetic import dot, dot_precision, rounded
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import DTYPES, INTERPRETED, Config, Launch, capability, describe
from clipfast.kernels.reference import Activation

# From a model; not timed on a GPU yet. Eight warps on a multiprocessor, in one program or two, leave every thread 255
# registers, which the sums need. SLICES, DEFERRED: how many parts of a tile are activated and stored one by one.
DEFERRED = Config({"BLOCK_R": 128, "BLOCK_M": 256, "BLOCK_K": 64, "DEFERRED": 8}, warps=8, stages=4)
PAIRED = Config({"BLOCK_R": 128, "BLOCK_M": 128, "BLOCK_K": 64, "SLICES": 2}, warps=4, stages=3)
WIDE = Config({"BLOCK_R": 128, "BLOCK_M": 256, "BLOCK_K": 64, "SLICES": 4}, warps=8, stages=4)
FEW_ROWS = Config({"BLOCK_R": 128, "BLOCK_M": 64, "BLOCK_K": 64, "SLICES": 1}, warps=4, stages=4)
SMALL = Config({"BLOCK_R": 128, "BLOCK_M": 128, "BLOCK_K": 32, "SLICES": 2}, warps=4, stages=3)  # fits any GPU
UNALIGNED = Config({"BLOCK_R": 64, "BLOCK_M": 64, "BLOCK_K": 32, "SLICES": 1}, warps=4, stages=2)
FLOAT32 = Config({"BLOCK_R": 64, "BLOCK_M": 64, "BLOCK_K": 32, "SLICES": 1}, warps=8, stages=2)
CONFIGS = (DEFERRED, PAIRED, WIDE, FEW_ROWS, SMALL, UNALIGNED, FLOAT32)
_INTERPRETED_CONFIGS = (
    Config({"BLOCK_R": 32, "BLOCK_M": 64, "BLOCK_K": 16, "DEFERRED": 4}),
    Config({"BLOCK_R": 32, "BLOCK_M": 64, "BLOCK_K": 32, "SLICES": 2}),
)

GROUP = 8
"""Rows of tiles that programs work on at a time: what these share of W stays in the L2 cache."""
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _reciprocal(x):
    """``1 / x`` to 1 ulp, in one instruction of NVIDIA's where ``/`` takes eight; 0 for infinity."""
    if _INTERPRETED or is_hip():
        b = 1.0 / x
    else:
        b = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return b


@triton.jit
def _exp2(x):
    """``2ˣ`` to 2 ulp, in one instruction of NVIDIA's where ``tl.exp2`` takes four to keep numbers below 1e-38."""
    if _INTERPRETED or is_hip():
        b = tl.exp2(x)
    else:
        b = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return b


@triton.jit
def activate(x, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """``f(x)`` in float32.

    ``quick_gelu``: ``x / (1 + exp(−1.702 x))``; ``gelu_tanh`` is the same with ``√(8/π) (x + 0.044715 x³)`` in the
    exponent. For ``x → −∞`` the exponential is infinite and the result −0.

    Infinite x gives the limit, ∞ or 0, where torch gives NaN at −∞: a float16 that overflowed on its way here is
    activated as the number itself would be. So infinite factors are made finite where they meet a zero.

    ``gelu``: ``x Φ(x) = max(x, 0) − |x| Φ(−|x|)`` with ``Φ(−a) = exp(−a²/2) P(t)``, ``t = 1 / (1 + p a)``, the form of
    Abramowitz & Stegun 7.1.26. Their coefficients are for the smallest *absolute* error; these minimise the *relative*
    error of Φ(−a) for 0 ≤ a ≤ 14, so the negative tail is as exact as the rest: 1e-7 with eight terms (EXACT), 4e-6
    with six, which is 1/60 of what float16 rounds. 18 instructions with six terms; ``erf`` takes about 40.
    """
    if ACTIVATION == "quick_gelu":
        y = tl.maximum(x, -3e38) * _reciprocal(1.0 + _exp2(x * -2.4554669595930156))  # 1.702 log₂e
    elif ACTIVATION == "gelu_tanh":
        b = x * (-2.3022081989816 - 0.10294323962 * x * x)  # √(8/π) log₂e, · 0.044715
        y = tl.maximum(x, -3e38) * _reciprocal(1.0 + _exp2(b))
    else:
        size = tl.minimum(tl.abs(x), 3e38)
        if EXACT:
            t = _reciprocal(1.0 + 0.304 * size)
            b = 0.03662409247944182
            b = b * t - 0.15434866750644569
            b = b * t + 0.19059497041778745
            b = b * t - 0.04170072425220943
            b = b * t + 0.12281615485034687
            b = b * t + 0.10264076421856946
            b = b * t + 0.12213654312301747
            b = b * t + 0.12123686671910786
        else:
            t = _reciprocal(1.0 + 0.308 * size)
            b = -0.07543016805177513
            b = b * t + 0.18961848864547626
            b = b * t + 0.007272418970679446
            b = b * t + 0.13653384297388416
            b = b * t + 0.11888115752630621
            b = b * t + 0.12312270756844737
        tail = b * t * _exp2(x * x * -0.7213475204444817)  # log₂e / 2
        y = tl.maximum(x, 0.0) - size * tail  # a NaN that max() and min() swallow is still in the tail
    return y


@triton.jit
def _place(tile, down, across, GROUP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr):
    """First row and column of a tile: down GROUP tiles, then one to the right. Past the end: anywhere."""
    group = tile // (GROUP * across)
    height = max(min(down - group * GROUP, GROUP), 1)
    within = tile % (GROUP * across)
    return (group * GROUP + within % height) * BLOCK_R, within // height * BLOCK_M


@triton.jit
def _read(p, o_row, o_k, rows, K, stride, DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of rows, zeros outside, ``[BLOCK, BLOCK_K]``."""
    if DESCRIPTORS:
        b = p.load([o_row, o_k])
    else:
        o_r = o_row + tl.arange(0, BLOCK).to(tl.int64)
        o_c = o_k + tl.arange(0, BLOCK_K)
        mask = (o_r < rows)[:, None] & (o_c < K)[None, :]
        b = tl.load(p + o_r[:, None] * stride + o_c[None, :], mask=mask, other=0.0)
    return b


@triton.jit
def _write(p, b, o_row, o_m, rows, M, DESCRIPTORS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Stores what is inside of a tile, ``[BLOCK_R, BLOCK_M]``."""
    if DESCRIPTORS:
        p.store([o_row, o_m], b)
    else:
        o_r = o_row + tl.arange(0, BLOCK_R).to(tl.int64)
        o_c = o_m + tl.arange(0, BLOCK_M)
        tl.store(p + o_r[:, None] * M + o_c[None, :], b, mask=(o_r < rows)[:, None] & (o_c < M)[None, :])


@triton.jit
def _slice(b, INDEX: tl.constexpr, SLICES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One of equal slices of columns. Halving moves nothing: every thread holds some of each half."""
    if SLICES > 1:
        left, right = tl.split(tl.permute(tl.reshape(b, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        if INDEX < SLICES // 2:
            b = _slice(left, INDEX, SLICES // 2, ROWS, COLUMNS // 2)
        else:
            b = _slice(right, INDEX - SLICES // 2, SLICES // 2, ROWS, COLUMNS // 2)
    return b


@triton.jit
def _pack(b, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rounds to a 16-bit format, two neighbours in one register, ``[ROWS, COLUMNS / 2]``: else each would take one."""
    low, high = tl.split(tl.reshape(b, (ROWS, COLUMNS // 2, 2)))
    if _INTERPRETED:
        low = rounded(low, DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
        b = low | rounded(high, DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    elif DTYPE == tl.bfloat16:  # noqa: SIM300
        b = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], tl.uint32, True, 1)
    else:
        b = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [high, low], tl.uint32, True, 1)
    return b


@triton.jit
def _unpack(b, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Undoes :func:`_pack`, into float32, ``[ROWS, COLUMNS]``."""
    low = (b & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = (b >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (ROWS, COLUMNS)).to(tl.float32)


@triton.jit
def _bias(p_bias, o_m, M, BLOCK_M: tl.constexpr):
    """``b`` of a tile's columns in float32, ``[BLOCK_M]``."""
    o_c = o_m + tl.arange(0, BLOCK_M)
    return tl.load(p_bias + o_c, mask=o_c < M, other=0.0).to(tl.float32)


@triton.jit
def _direct_kernel(
    p_x,
    p_weight,
    p_bias,
    p_out,
    rows,
    M,
    K,
    s_x,
    s_weight,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SPECIALISE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr,
):
    """``out = f(x Wᵀ + b)``, tile after tile; the loads of the next tile go on while one is activated."""
    DTYPE: tl.constexpr = p_bias.dtype.element_ty
    PART: tl.constexpr = BLOCK_M // SLICES
    down, across = tl.cdiv(rows, BLOCK_R), tl.cdiv(M, BLOCK_M)
    tl.assume(K > 0)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True, warp_specialize=SPECIALISE):
        o_r, o_m = _place(tile, down, across, GROUP, BLOCK_R, BLOCK_M)
        acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        for o_k in range(0, K, BLOCK_K):
            b_x = _read(p_x, o_r, o_k, rows, K, s_x, DESCRIPTORS, BLOCK_R, BLOCK_K)
            b_weight = _read(p_weight, o_m, o_k, M, K, s_weight, DESCRIPTORS, BLOCK_M, BLOCK_K)
            acc = dot(b_x, b_weight.T, acc, PRECISION)
        for index in tl.static_range(SLICES):
            o_part = o_m + index * PART
            b = _slice(acc, index, SLICES, BLOCK_R, BLOCK_M) + _bias(p_bias, o_part, M, PART)[None, :]
            b_out = rounded(activate(b, ACTIVATION, EXACT), DTYPE)
            _write(p_out, b_out, o_r, o_part, rows, M, DESCRIPTORS, BLOCK_R, PART)


@triton.jit
def _deferred_kernel(
    p_x,
    p_weight,
    p_bias,
    p_out,
    rows,
    M,
    K,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEFERRED: tl.constexpr,
):
    """``out = f(x Wᵀ + b)``, every tile stored between the products of the next: it has to have more than DEFERRED.

    One loop over the products of all tiles of a program, so that loads run ahead of the sums from one tile into the
    next. Hence two sets of counters: ``next_`` for what is loaded, the others for what is summed. The loop runs
    DEFERRED turns longer than there are products, to store the last tile; what it multiplies then is not looked at.
    """
    DTYPE: tl.constexpr = p_bias.dtype.element_ty
    PART: tl.constexpr = BLOCK_M // DEFERRED
    down, across = tl.cdiv(rows, BLOCK_R), tl.cdiv(M, BLOCK_M)
    programs = tl.num_programs(0)
    steps = tl.cdiv(K, BLOCK_K)
    turns = tl.cdiv(down * across - tl.program_id(0), programs) * steps + DEFERRED
    tl.assume(turns > DEFERRED)

    next_tile, next_k = tl.program_id(0) - programs, -1
    next_r, next_m = 0, 0
    tile, k = tl.program_id(0), 0
    o_r, o_m = _place(tile, down, across, GROUP, BLOCK_R, BLOCK_M)
    done_r, done_m = rows, 0  # where the finished tile belongs; at first outside, where nothing is stored
    done = tl.zeros([BLOCK_R, BLOCK_M // 2], tl.uint32)
    b_bias = _bias(p_bias, o_m, M, BLOCK_M)
    acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32) + b_bias[None, :]
    for _ in tl.range(0, turns):
        next_k = tl.where(next_k == steps - 1, 0, next_k + 1)
        if next_k == 0:
            next_tile += programs
            next_r, next_m = _place(next_tile, down, across, GROUP, BLOCK_R, BLOCK_M)
        b_x = p_x.load([next_r, next_k * BLOCK_K])
        b_weight = p_weight.load([next_m, next_k * BLOCK_K])
        acc = dot(b_x, b_weight.T, acc, PRECISION)
        if k == DEFERRED:  # early, while the tensor cores work
            b_bias = _bias(p_bias, _place(tile + programs, down, across, GROUP, BLOCK_R, BLOCK_M)[1], M, BLOCK_M)
        if k == steps - 1:
            done = _pack(acc, DTYPE, BLOCK_R, BLOCK_M)
            done_r, done_m = o_r, o_m
            acc = tl.zeros([BLOCK_R, BLOCK_M], tl.float32) + b_bias[None, :]
            tile += programs
            o_r, o_m = _place(tile, down, across, GROUP, BLOCK_R, BLOCK_M)
        for index in tl.static_range(DEFERRED):
            if k == index:
                b_done = _unpack(_slice(done, index, DEFERRED, BLOCK_R, BLOCK_M // 2), DTYPE, BLOCK_R, PART)
                p_out.store([done_r, done_m + index * PART], rounded(activate(b_done, ACTIVATION, False), DTYPE))
        k = tl.where(k == steps - 1, 0, k + 1)


@cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H200's where there is none. The interpreter gets few, so that programs have more than one tile."""
    if device.type != "cuda":
        return 3 if INTERPRETED else 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(x: Tensor, weight: Tensor) -> bool:
    """Whether rows of x, W and the result can all start at multiples of 16 bytes, as tensor descriptors want them."""
    columns, depth = weight.shape
    size = x.element_size()
    return not (columns * size % 16 or depth * size % 16)


def _flat(tensor: Tensor, aligned: bool) -> Tensor:
    """As rows ``[R, K]`` that start at multiples of 16 bytes, if they can; a view if it can be one."""
    rows = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    stride, step = rows.stride()
    usable = step == 1
    if aligned:
        apart = stride >= rows.shape[1] and not stride * rows.element_size() % 16
        usable = usable and apart and not rows.data_ptr() % 16
    return rows if usable else rows.clone(memory_format=torch.contiguous_format)


def configs(x: Tensor, weight: Tensor, gpu: int | None = None) -> tuple[Config, ...]:
    """The configurations worth timing for ``x [..., K]`` and ``weight [M, K]``, the preferred first.

    ``gpu`` is a compute capability as of :func:`.launch.capability`, of the tensors' own device for None.
    """
    gpu, aligned = capability(x) if gpu is None else gpu, _aligned(x, weight)
    columns, inner = weight.shape
    deferred, direct = _INTERPRETED_CONFIGS if INTERPRETED else (DEFERRED, PAIRED)
    deferrable = aligned and inner > deferred.blocks["DEFERRED"] * deferred.blocks["BLOCK_K"]
    if INTERPRETED:
        return (deferred,) if deferrable and x.dtype != torch.float32 else (direct,)
    if x.dtype == torch.float32:
        return (FLOAT32,)
    if not aligned:
        return (UNALIGNED,)
    if gpu // 10 not in (9, 10):
        return (SMALL,)
    if triton.cdiv(x.shape[:-1].numel(), 128) * triton.cdiv(columns, 256) < _multiprocessors(x.device):
        return FEW_ROWS, PAIRED
    if gpu // 10 == 10:  # the sums are in tensor memory there: no registers to keep a tile in
        return WIDE, PAIRED
    return (DEFERRED, PAIRED, WIDE) if deferrable else (PAIRED, WIDE)


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: Activation,
    config: Config | None = None,
    gpu: int | None = None,
) -> tuple[Launch, Tensor]:
    """The launch that computes :func:`run`, with its result ``[..., M]``; ``gpu`` as for :func:`configs`."""
    gpu = capability(x) if gpu is None else gpu
    config = configs(x, weight, gpu)[0] if config is None else config
    blocks, deferred = config.blocks, "DEFERRED" in config.blocks
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    aligned = _aligned(x, weight)
    flat, weight = _flat(x, aligned), _flat(weight, aligned)
    (rows, inner), columns = flat.shape, weight.shape[0]
    tensors = (flat, weight, out.view(rows, columns))
    described = gpu >= 90 and aligned and out.numel() > 0
    if described:
        high, wide, deep = (blocks[name] for name in ("BLOCK_R", "BLOCK_M", "BLOCK_K"))
        part = wide // blocks["DEFERRED" if deferred else "SLICES"]
        tiles = ([high, deep], [wide, deep], [high, part])
        tensors = tuple(map(describe, tensors, tiles))
    arguments: dict[str, Any] = dict(zip(("p_x", "p_weight", "p_out"), tensors, strict=True))
    arguments |= {"p_bias": bias.contiguous(), "rows": rows, "M": columns, "K": inner}
    constants: dict[str, Any] = {"ACTIVATION": activation, "PRECISION": dot_precision(x.dtype), "GROUP": GROUP}
    if not deferred:
        arguments |= {"s_x": flat.stride(0), "s_weight": weight.stride(0)}
        constants |= {
            "EXACT": x.dtype == torch.float32,
            "DESCRIPTORS": described,
            "SPECIALISE": gpu // 10 == 10 and config == WIDE,
        }
    count = -(-rows // blocks["BLOCK_R"]) * -(-columns // blocks["BLOCK_M"])
    return Launch(
        kernel=_deferred_kernel if deferred else _direct_kernel,
        grid=(min(count, max(1, 8 // config.warps) * _multiprocessors(x.device)),),
        arguments=arguments,
        constants=constants,
        config=config,
    ), out


def run(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation, config: Config | None = None) -> Tensor:
    """:func:`clipfast.kernels.reference.linear_activation`, rounded once, or twice where tiles are deferred."""
    launch, out = plan(x, weight, bias, activation, config)
    launch.run()
    return out


def unsupported_reasons(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    x_dtype, *others = (str(tensor.dtype).removeprefix("torch.") for tensor in (x, weight, bias))
    reasons = [] if x.dtype in DTYPES else [f"x is {x_dtype}"]
    if others != [x_dtype, x_dtype]:
        reasons.append(f"x is {x_dtype}, weight {others[0]} and bias {others[1]}")
    return reasons if x.shape[-1] else [*reasons, "x has no columns"]


def variants(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Sequence[Variant]:
    """:func:`run` in every configuration worth timing for these tensors, the preferred first."""
    return [(str(config), partial(run, config=config)) for config in configs(x, weight)]


IMPLEMENTATIONS = {"linear_activation": Implementation(run, unsupported_reasons, variants)}
