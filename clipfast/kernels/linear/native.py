"""Linear layers on the CPU: torch's products, in a dtype that the CPU multiplies fast, and a pass in C++.

The pass is ``csrc/activation.cpp``.

On a CPU without instructions for products of 16 bits, torch multiplies bfloat16 and float16 in a scalar loop, eight
times as slowly as float32. There the weights are widened to float32, as many rows at a time as fit the cache, torch
forms the product, and one pass over it adds the bias, applies the activation and rounds to 16 bits while the product is
in the cache. Nothing else is rounded, so results are also more accurate.

On AMD's CPUs MKL divides the rows of ``x`` among its threads, whatever the shapes, and every thread reads the whole
weight. For the tokens of a few images reading it takes most of the time. There the transposed product ``W xᵀ`` is
formed instead, for which the threads divide the weight, and the pass that adds the bias transposes it back. On Intel's
CPUs MKL's own division is faster: 5 to 30 % for 50 to 200 rows, on two cores of a Xeon with AVX-512 or AVX2.

In float32 another library may form the product, where it is asked for or installed
(:mod:`clipfast.kernels.linear.libraries`).
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from clipfast.kernels import buffers, native
from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.linear import eager, libraries
from clipfast.kernels.reference import Activation

CPUINFO = Path("/proc/cpuinfo")
CHUNK_NUMEL = 2**20
"""Weights that are widened at a time: 4 MB of float32."""
ROW_RANGE = (32, 512)
"""For so many rows of ``x`` threads divide the weight. With fewer it does not help, with more it does not matter."""
MIN_WEIGHT_NUMEL = 3 * 2**19
"""Weights of at least so many entries are divided: 6 MB, more than a core's own caches hold."""
ROW_ALIGNMENT = 8
"""Rows of a transposed product start at multiples of this many floats: MKL takes a third longer otherwise."""


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch has a fast product of this dtype on this CPU: for 16 bits that is oneDNN's."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    onednn = torch.ops.mkldnn
    supported = onednn._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else onednn._is_mkldnn_fp16_supported
    return bool(supported())


@cache
def _mkl_divides_rows() -> bool:
    """Whether torch's product is that of MKL, on a CPU where MKL always divides the rows among its threads."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        return "GenuineIntel" not in CPUINFO.read_text()
    except OSError:
        return True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`clipfast.kernels.reference.linear`."""
    if not multiplies(x.dtype):
        return _widened_product(x, weight, bias, None)
    product = libraries.choose(x, weight, bias, None, _torch_product)
    return product(x, weight, bias, None)


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """:func:`clipfast.kernels.reference.linear_activation`."""
    if not multiplies(x.dtype):
        return _widened_product(x, weight, bias, activation)
    product = libraries.choose(x, weight, bias, activation, _torch_product)
    return product(x, weight, bias, activation)


def _torch_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """Torch's product, then the activation in one pass.

    In float32 the pass adds the bias, too. In 16 bits oneDNN's product adds it, or the sum would be rounded twice.
    """
    if divides_weight(x, weight):
        return _transposed_product(x, weight, bias, activation)
    if activation is None:
        return eager.linear(x, weight, bias)
    pass_adds_bias = x.dtype == torch.float32
    hidden = eager.linear(x, weight, None if pass_adds_bias else bias)
    if hidden.numel():
        flat = hidden.view(-1, weight.shape[0])
        activate(flat, bias.contiguous() if pass_adds_bias and bias is not None else None, activation, flat)
    return hidden


def activate(x: Tensor, bias: Tensor | None, activation: Activation | None, out: Tensor) -> None:
    """``out ← f(x + bias)``, both ``[rows, columns]`` with contiguous columns, ``out`` in any dtype of the library.

    Args:
        x: in the dtype of ``out`` or float32; ``out`` itself may be passed. In float32 it may also be the transpose of
            a contiguous matrix that shares no memory with ``out``.
        bias: ``[columns]``, float32 and contiguous.
        activation: its name, None for none.
        out: the result.
    """
    native.library().activation(x, bias, activation, out)


def divides_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether threads should divide the weight ``[M, I]`` rather than the rows of ``x [..., I]``.

    It does not depend on the number of threads.
    """
    if x.dtype != torch.float32 or weight.numel() < MIN_WEIGHT_NUMEL or not _mkl_divides_rows():
        return False
    return ROW_RANGE[0] <= x.numel() // weight.shape[1] <= ROW_RANGE[1]


def _transposed_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    columns, depth = weight.shape
    out = buffers.empty(x, *x.shape[:-1], columns)
    rows, flat = x.reshape(-1, depth), out.view(-1, columns)
    shift = None if bias is None else bias.contiguous()
    if torch.get_num_threads() == 1:  # nothing to divide; before the bias is added MKL gives the same bits either way
        torch.mm(rows, weight.T, out=flat)
        activate(flat, shift, activation, flat)
        return out
    transposed = buffers.empty(x, columns, -(-len(rows) // ROW_ALIGNMENT) * ROW_ALIGNMENT)
    torch.mm(weight, rows.T, out=transposed[:, : len(rows)])
    activate(transposed[:, : len(rows)].T, shift, activation, flat)
    return out


def _widened_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    columns, depth = weight.shape
    out = buffers.empty(x, *x.shape[:-1], columns)
    if not out.numel():
        return out
    flat = out.view(-1, columns)
    wide = x.reshape(len(flat), depth).float()
    shift = None if bias is None else bias.float().contiguous()
    chunks = max(1, columns * depth // CHUNK_NUMEL)
    step = -(-columns // chunks)
    for start in range(0, columns, step):
        chunk = slice(start, start + step)
        activate(wide @ weight[chunk].float().T, None if shift is None else shift[chunk], activation, flat[:, chunk])
    return out


def _linear_unsupported_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    return native.library().linear_unsupported_reasons(x, weight, bias)


def _linear_auto_skip_reasons(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """Where torch's own product is as fast, or where autograd and a compiler must see it."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return []
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return ["gradients are enabled, and only torch's own product has them"]
    if divides_weight(x, weight) or libraries.considered(x, weight):
        return []
    return ["torch's own product is as fast for these shapes"]


def _linear_activation_unsupported_reasons(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation
) -> list[str]:
    return native.library().linear_activation_unsupported_reasons(x, weight, bias)


IMPLEMENTATIONS = {
    "linear": Implementation(linear, _linear_unsupported_reasons, auto_skip_reasons=_linear_auto_skip_reasons),
    "linear_activation": Implementation(linear_activation, _linear_activation_unsupported_reasons),
}
