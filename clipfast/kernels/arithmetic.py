"""Arithmetic that Triton kernels share, with the same result in the interpreter, which rounds differently."""

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_hip

from clipfast.kernels.launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


def dot_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 exactly, unless torch's own matrix products may use TF32.

    ``fp32_precision`` follows every way to say so, where ``allow_tf32`` raises once another way has been used.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32.

    The interpreter multiplies the raw bits of bfloat16 as if they were integers, so there both are upcast.
    """
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    # AMD's GPUs multiply float32 exactly in their matrix units.
    return tl.dot(a, b, acc, input_precision="ieee" if is_hip() else PRECISION)


@triton.jit
def fma(a, b, c):
    """``a · b + c`` rounded once.

    ``exp2(fma(score, scale, −max))`` stays exact for scores of any size because the product is not rounded before the
    difference is taken. The interpreter rounds twice, so it multiplies in float64 there: same result as a GPU's.
    """
    if _INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b + tl.zeros_like(a), c + tl.zeros_like(a))


@triton.jit
def rounded(b, DTYPE: tl.constexpr):
    """Float32 as ``DTYPE``, to the nearest, ties to even.

    The interpreter truncates to bfloat16, so there the bits are rounded by hand.
    """
    if _INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = b.to(tl.uint32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        b_rounded = (tl.where(b == b, up, 0x7FC00000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        b_rounded = b.to(DTYPE)
    return b_rounded
