"""Linear layers on the CPU: torch's products, in a format that the CPU multiplies, and what follows them in C++.

A CPU without instructions for 16 bits is no reason to wait: torch then multiplies bfloat16 and float16 number by
number, eight times as slowly as float32. Here the weights are widened, a piece at a time that fits the cache, torch's
float32 product is formed, and bias, activation and the one rounding are a pass over it while it is there. Nothing is
rounded in between, so the results are closer to the exact ones, too.

MKL divides the rows of ``x`` among its threads, whatever the shapes, and every thread reads the whole weight. For the
tokens of a few images that is what takes the time, so there the product is formed the other way round, ``W xᵀ``: the
threads divide the weight. It comes out turned, and the pass that adds the bias turns it back.
"""

from functools import cache

import torch
from torch import Tensor

from clipfast.kernels import buffers, native
from clipfast.kernels.linear import eager
from clipfast.kernels.reference import Activation

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As ``csrc/formats.h`` numbers them; the last two are widened as they are read."""
ACTIVATIONS: dict[str | None, int] = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, None: 3}
"""As ``csrc/activation.h`` numbers them."""
PIECE = 2**20
"""Weights that are widened at a time: 4 MB of float32."""
FEW = (32, 512)
"""Rows for which threads divide a weight: fewer are no matter of threads, more repay the reading."""
LARGE = 3 * 2**19
"""Entries of such a weight: 6 MB, which no core keeps near."""
ALIGNED = 8
"""Numbers between the starts of a turned product's rows are a multiple of this: MKL takes a third longer otherwise."""


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a fast product of this format on this CPU: oneDNN's, where it is 16 bits wide."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    asked = torch.ops.mkldnn
    fast = asked._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else asked._is_mkldnn_fp16_supported
    return bool(fast())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`clipfast.kernels.reference.linear`."""
    if not multiplies(x.dtype):
        return _in_pieces(x, weight, bias, None)
    if divides_weight(x, weight):
        return _in_one(x, weight, bias, None)
    return eager.linear(x, weight, bias)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """:func:`clipfast.kernels.reference.linear_activation`: the product, then the activation in one pass.

    In float32 that pass adds the bias, too. In 16 bits oneDNN's product would be rounded without it, once more than
    needed.
    """
    if not multiplies(x.dtype):
        return _in_pieces(x, weight, bias, activation)
    if divides_weight(x, weight):
        return _in_one(x, weight, bias, activation)
    exact = x.dtype == torch.float32
    hidden = eager.linear(x, weight, None if exact else bias)
    if hidden.numel():
        flat = hidden.view(-1, weight.shape[0])
        activate(flat, bias.contiguous() if exact else None, activation, flat)
    return hidden


def activate(x: Tensor, bias: Tensor | None, activation: Activation | None, out: Tensor) -> None:
    """``out ← f(x + bias)``, both ``[rows, columns]`` with contiguous columns; a float32 ``x`` into any format.

    ``x`` may also be the transpose of such a matrix, in float32 and not of the memory of ``out``.
    """
    rows, columns = x.shape
    what = bias, rows, columns, ACTIVATIONS[activation], FORMATS[out.dtype], out, out.stride(0)
    if x.stride(1) != 1 and x.stride(0) == 1:
        native.call("activation_turned", x, x.stride(1), *what)
    else:
        native.call("activation", FORMATS[x.dtype], x, x.stride(0), *what)


def divides_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether threads had better divide the weight ``[M, I]`` than the rows of ``x [..., I]``.

    However many there are: results do not depend on their number.
    """
    if x.dtype != torch.float32 or weight.numel() < LARGE or not torch.backends.mkl.is_available():
        return False
    return FEW[0] <= x.numel() // weight.shape[1] <= FEW[1]


def _in_one(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    columns, depth = weight.shape
    out = buffers.empty(x, *x.shape[:-1], columns)
    flat, into = x.reshape(-1, depth), out.view(-1, columns)
    shift = None if bias is None else bias.contiguous()
    if torch.get_num_threads() == 1:  # nothing to divide: MKL gives the same bits this way, before the bias is added
        torch.mm(flat, weight.T, out=into)
        activate(into, shift, activation, into)
        return out
    turned = buffers.empty(x, columns, -(-len(flat) // ALIGNED) * ALIGNED)
    torch.mm(weight, flat.T, out=turned[:, : len(flat)])
    activate(turned[:, : len(flat)].T, shift, activation, into)
    return out


def _in_pieces(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    columns, depth = weight.shape
    out = buffers.empty(x, *x.shape[:-1], columns)
    if not out.numel():
        return out
    flat = out.view(-1, columns)
    wide = x.reshape(len(flat), depth).float()
    shift = None if bias is None else bias.float().contiguous()
    pieces = max(1, columns * depth // PIECE)
    step = -(-columns // pieces)
    for start in range(0, columns, step):
        part = slice(start, start + step)
        piece = weight[part].float()
        activate(wide @ piece.T, None if shift is None else shift[part], activation, flat[:, part])
    return out
