"""Linear layers in plain torch."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import buffers
from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import Activation, accumulation_dtype

_TILE = 32
"""Numbers in bfloat16 that AMX reads at a time."""


@cache
def _reads_whole_tiles() -> bool:
    """Whether torch's bfloat16 product multiplies by zero what stands after a row: a NaN there spreads.

    oneDNN's does on CPUs with AMX, which reads rows in tiles, up to the end of the last one.
    """
    return bool(torch.cpu._is_amx_tile_supported())  # type: ignore[no-untyped-call]


def _in_tiles(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors with columns of zeros more where rows would be read beyond their end."""
    beyond = -x.shape[-1] % _TILE
    if x.dtype != torch.bfloat16 or not beyond or not x.is_cpu or not _reads_whole_tiles():
        return x, weight
    return F.pad(x, (0, beyond)), F.pad(weight, (0, beyond))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`clipfast.kernels.reference.linear` by torch's own product, into the buffer pool where one is open."""
    x, weight = _in_tiles(x, weight)
    if not buffers.is_open() or torch.is_grad_enabled() or not x.numel():
        return F.linear(x, weight, bias).contiguous()
    columns, depth = weight.shape
    out = buffers.empty(x, *x.shape[:-1], columns)
    rows, flat = x.reshape(-1, depth), out.view(-1, columns)
    if bias is None:
        torch.mm(rows, weight.T, out=flat)
    else:
        torch.addmm(bias, rows, weight.T, out=flat)
    return out


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """:func:`clipfast.kernels.reference.linear_activation`, the activation in place."""
    x, weight = _in_tiles(x, weight)
    hidden = F.linear(x, weight, bias)
    if activation == "quick_gelu":
        if hidden.dtype in (torch.float32, torch.float64):  # x·sigmoid(1.702 x) = silu(1.702 x) / 1.702, in place
            return F.silu(hidden.mul_(1.702), inplace=True).div_(1.702)
        return hidden.mul_(torch.sigmoid(1.702 * hidden))  # in 16 bits 1.702 x would be rounded, or overflow
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_(hidden, approximate=approximate)  # type: ignore[no-any-return]


def add_linear(x: Tensor, h: Tensor, weight: Tensor) -> None:
    """:func:`clipfast.kernels.reference.add_linear` by one product with β = 1, in place."""
    columns, depth = weight.shape
    if x.numel() and depth:
        rows = x.view(-1, columns)
        torch.addmm(rows, h.reshape(-1, depth), weight.T, out=rows)


def linear_unrounded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.linear_unrounded`, of 16-bit factors where torch has float32 sums of them."""
    dtype = accumulation_dtype(weight.dtype)
    if not x.is_cuda or weight.dtype == dtype:
        return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    return torch.mm(x, weight.T, out_dtype=dtype).add_(bias)


IMPLEMENTATIONS = {
    "linear": Implementation(linear),
    "linear_activation": Implementation(linear_activation),
    "add_linear": Implementation(add_linear),
    "linear_unrounded": Implementation(linear_unrounded),
}
