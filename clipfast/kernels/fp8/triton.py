"""Rows rounded to float8 in one sweep: activation, largest number, scale and rounding of a row in registers.

Apart they would read the row three times and write it twice in float32. Here a row of 16-bit numbers is read once and
written in 8 bits: 3 bytes per element, the least there is.
"""

from collections.abc import Sequence
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import (
    INTERPRETED,
    Config,
    Launch,
    capability,
    power_of_two,
    unit_stride,
    unsupported_dtypes,
)
from clipfast.kernels.linear.triton import activate
from clipfast.kernels.reference import Activation

# From a model; not timed on a GPU yet, as for LayerNorm: bound by memory, and warps of a row wait for each other once.
# With more columns per warp the activation spills registers on Blackwell.
COLUMNS_PER_WARP = (512, 256, 128)
LARGEST_WIDTH = 1 << 14
"""More columns than this do not fit the registers of the 16 warps that a row may have."""
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def _float8(b):
    """Bits of float8 (e4m3), to the nearest, ties to even, of numbers up to 448.

    The interpreter loses the carry where rounding leaves the binade, so there they are rounded before it converts them:
    to three bits of mantissa, below 2⁻⁶ to multiples of 2⁻⁹.
    """
    if _INTERPRETED:
        bits = b.to(tl.uint32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
        b_near = tl.where(tl.abs(b) < 0.015625, (b + 24576.0) - 24576.0, normal.to(tl.float32, bitcast=True))
        b_bits = tl.where(b == b, b_near.to(tl.float8e4nv).to(tl.uint8, bitcast=True), 0x7F)
    else:
        b_bits = b.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return b_bits


@triton.jit
def _quantize_kernel(
    p_x,
    p_out,
    p_scale,
    s_x,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``scale = max |f(x)| / 448`` and ``out = f(x) / scale`` of one row."""
    row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, BLOCK)
    m_w = o_w < WIDTH
    # [BLOCK]
    b_x = tl.load(p_x + row * s_x + o_w, mask=m_w, other=0.0).to(tl.float32)
    if ACTIVATION != "none":
        b_x = activate(b_x, ACTIVATION, EXACT)
    # max() may swallow a NaN, which must stay one in the numbers: dividing by any scale keeps it.
    scale = tl.max(tl.abs(b_x), 0) / 448.0
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(p_scale + row, scale)
    tl.store(p_out + row * WIDTH + o_w, _float8(b_x / scale), mask=m_w)


@cache
def configs(width: int) -> tuple[Config, ...]:
    """The configurations worth timing for rows of this width, the preferred first."""
    block = power_of_two(width)
    warps = dict.fromkeys(min(16, max(1, block // columns)) for columns in COLUMNS_PER_WARP)
    return tuple(Config({"BLOCK": block}, warps=count, stages=1) for count in warps)


def plan(
    x: Tensor, activation: Activation | None = None, config: Config | None = None
) -> tuple[Launch, Tensor, Tensor]:
    """The launch that computes :func:`run`, with its results."""
    width = x.shape[-1]
    rows = unit_stride(x.reshape(-1, width))
    out = x.new_empty(x.shape, dtype=torch.uint8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    launch = Launch(
        kernel=_quantize_kernel,
        grid=(rows.shape[0],),
        arguments={"p_x": rows, "p_out": out, "p_scale": scale, "s_x": rows.stride(0)},
        constants={"WIDTH": width, "ACTIVATION": activation or "none", "EXACT": x.dtype == torch.float32},
        config=configs(width)[0] if config is None else config,
    )
    return launch, out, scale


def run(x: Tensor, activation: Activation | None = None, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.quantize_rows`."""
    launch, out, scale = plan(x, activation, config)
    launch.run()
    return out, scale


def unsupported_reasons(x: Tensor, activation: Activation | None = None) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    reasons = unsupported_dtypes(x=x)
    if x.shape[-1] > LARGEST_WIDTH:
        reasons.append(f"width {x.shape[-1]} is more than {LARGEST_WIDTH}")
    if capability(x) < 90:
        reasons.append("the GPU has no instructions for float8 before compute capability 9.0 (Hopper)")
    return reasons


def variants(x: Tensor, activation: Activation | None = None) -> Sequence[Variant]:
    """:func:`run` in every configuration worth timing for these tensors, the preferred first."""
    worth_timing = configs(x.shape[-1])[: 1 if INTERPRETED else None]
    return [(str(config), partial(run, config=config)) for config in worth_timing]


IMPLEMENTATIONS = {"quantize_rows": Implementation(run, unsupported_reasons, variants)}
