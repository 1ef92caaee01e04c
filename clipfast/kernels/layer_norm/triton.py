"""The residual stream after a term was added, and its LayerNorm, in one sweep: ``x += delta``, ``(x − μ)/σ · γ + β``.

Apart, the sum and the norm read and write the stream in two launches, 12 bytes per element in 16-bit formats; together
they take 8, the least there is: both terms are read once, the stream and the norm written once. The row stays in
registers between the mean and the sum of centred squares: two passes, so that a large mean cancels nothing.

Where products add themselves to the stream, no term is left to add: the row is read, normed and written once, 4 bytes
per element. Their biases, which a product cannot add to a stream, are a vector in float32 that joins the row here.
"""

from collections.abc import Sequence
from functools import cache, partial

import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.arithmetic import rounded
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import INTERPRETED, Config, Launch, power_of_two, unsupported_dtypes

# From a model; not timed on a GPU yet. Bound by memory, so bytes in flight count: threads load 16 bytes at a time where
# rows allow it. The fewer warps share a row, the less they wait for each other. The preferred first.
COLUMNS_PER_WARP = (1024, 512, 256)
LARGEST_WIDTH = 1 << 14
"""More columns than this do not fit the registers of the 16 warps that a row may have."""


@triton.jit
def _add_layer_norm_kernel(
    p_x,
    p_delta,
    p_weight,
    p_bias,
    p_carried,
    p_out,
    s_x,
    s_delta,
    eps,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    CARRY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``x += delta``, ``r = x + carried``, ``out = (r − mean r) / √(var r + ε) · γ + β`` of one row.

    The x in r is the one that is stored, rounded; r itself is not rounded.
    """
    row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, BLOCK)
    m_w = o_w < WIDTH
    # [BLOCK]
    b_x = tl.load(p_x + row * s_x + o_w, mask=m_w, other=0.0).to(tl.float32)
    if ADD:
        b_x += tl.load(p_delta + row * s_delta + o_w, mask=m_w, other=0.0).to(tl.float32)
        b_stored = rounded(b_x, p_x.dtype.element_ty)
        tl.store(p_x + row * s_x + o_w, b_stored, mask=m_w)
        b_x = b_stored.to(tl.float32)
    if CARRY:
        b_x += tl.load(p_carried + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + o_w, mask=m_w, other=0.0).to(tl.float32)
    b_centred = tl.where(m_w, b_x - tl.sum(b_x, 0) / WIDTH, 0.0)
    # The mean is rounded, to 1e-5 where all x are near 100. What is off is the mean of what is left.
    off = tl.sum(b_centred, 0) / WIDTH
    variance = tl.maximum(tl.sum(b_centred * b_centred, 0) / WIDTH - off * off, 0.0)
    b_norm = (b_centred - off) * tl.rsqrt(variance + eps)
    tl.store(p_out + row * WIDTH + o_w, rounded(b_norm * b_weight + b_bias, p_out.dtype.element_ty), mask=m_w)


def _rows(tensor: Tensor) -> Tensor | None:
    """A view as rows ``[R, W]`` with a contiguous last axis, None where there is none or rows overlap."""
    width = tensor.shape[-1]
    try:
        rows = tensor.view(tensor.shape[:-1].numel(), width)
    except RuntimeError:
        return None
    contiguous = width == 1 or rows.stride(1) == 1
    apart = rows.shape[0] == 1 or rows.stride(0) >= width
    return rows if contiguous and apart else None


@cache
def configs(width: int) -> tuple[Config, ...]:
    """The configurations worth timing for rows of this width, the preferred first."""
    block = power_of_two(width)
    warps = dict.fromkeys(min(16, max(1, block // columns)) for columns in COLUMNS_PER_WARP)
    return tuple(Config({"BLOCK": block}, warps=count, stages=1) for count in warps)


def plan(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    carried: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Launch, Tensor]:
    """The launch that computes :func:`run`, with its result ``[..., W]``."""
    width = x.shape[-1]
    rows = _rows(x)
    if rows is None:
        raise ValueError(*unsupported_reasons(x, delta, weight, bias, eps))
    added = rows
    if delta is not None:
        view = _rows(delta)
        added = delta.contiguous().view(rows.shape) if view is None else view
    out = x.new_empty(x.shape)
    return Launch(
        kernel=_add_layer_norm_kernel,
        grid=(rows.shape[0] if width else 0,),
        arguments={
            "p_x": rows,
            "p_delta": added,
            "p_weight": weight.contiguous(),
            "p_bias": bias.contiguous(),
            "p_carried": bias if carried is None else carried.contiguous(),
            "p_out": out,
            "s_x": rows.stride(0),
            "s_delta": added.stride(0),
            "eps": eps,
        },
        constants={"WIDTH": width, "ADD": delta is not None, "CARRY": carried is not None},
        config=configs(width)[0] if config is None else config,
    ), out


def run(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    carried: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """Adds ``delta`` to ``x`` and returns the LayerNorm, :func:`clipfast.kernels.reference.add_layer_norm`."""
    launch, out = plan(x, delta, weight, bias, eps, carried, config)
    launch.run()
    return out


def unsupported_reasons(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, carried: Tensor | None = None
) -> list[str]:
    """The reasons why :func:`run` does not support these tensors."""
    reasons = unsupported_dtypes(x=x, delta=delta, weight=weight, bias=bias, carried=carried)
    if _rows(x) is None:
        reasons.append(f"x has strides {list(x.stride())}: its rows are not contiguous, or not at one distance")
    if x.shape[-1] > LARGEST_WIDTH:
        reasons.append(f"width {x.shape[-1]} is more than {LARGEST_WIDTH}")
    return reasons


def variants(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, carried: Tensor | None = None
) -> Sequence[Variant]:
    """:func:`run` in every configuration worth timing for these tensors, the preferred first."""
    worth_timing = configs(x.shape[-1])[: 1 if INTERPRETED else None]
    return [(str(config), partial(run, config=config)) for config in worth_timing]


IMPLEMENTATIONS = {"add_layer_norm": Implementation(run, unsupported_reasons, variants)}
