"""The operations of a transformer's layers, as :mod:`clipfast.kernels.ops` offers them: see there.

Axes: ``K`` columns in, ``M`` columns out, ``W`` width, ``B`` images.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.checks import expect, expect_dtype, expect_together
from clipfast.kernels.dispatch import AUTO, check
from clipfast.kernels.library import call
from clipfast.kernels.native_linear import divides_weight, product
from clipfast.kernels.reference import Activation


def layer_statistics(residual: Tensor, eps: float, *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a LayerNorm's input (:func:`.reference.layer_statistics`).

    Args:
        residual: ``[B, W]``.
        eps: ε of the LayerNorm.
        backend: see above.

    Returns:
        ``mean [B]`` and ``std [B]``, float32 (float64 for float64).

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    expect("residual", residual, (None, None))
    result: tuple[Tensor, Tensor] = call("layer_statistics", residual, eps, backend)
    return result


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = AUTO) -> Tensor:
    """A linear layer, ``x Wᵀ + b`` (:func:`.reference.linear`).

    Torch's own product, which nothing here beats; except on the CPU for 16 bits where that has no product for them,
    which takes torch eight times as long as float32, and for the tokens of a few images.

    Args:
        x: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]``, or None.
        backend: see above.

    Returns:
        ``[..., M]`` in the dtype of ``x``.

    Raises:
        ValueError: wrong shape or dtype, or unknown backend.
    """
    expect("weight", weight, (None, None))
    expect("x", x, (*[None] * (x.ndim - 1), weight.shape[1]))
    if bias is not None:
        expect("bias", bias, (weight.shape[0],))
    expect_together(x=x, weight=weight, bias=bias)
    expect_dtype(x.dtype, weight=weight, bias=bias)
    compiled = torch.compiler.is_compiling()
    watched = compiled or torch.is_grad_enabled()  # a compiler and gradients shall see through it
    low = x.dtype in (torch.bfloat16, torch.float16)
    if x.device.type == "cpu" and (low or (not watched and divides_weight(x, weight))):
        result: Tensor = call("linear", x, weight, bias, backend)
        return result
    if not compiled:
        check(backend)
    return F.linear(x, weight, bias) if watched or x.device.type != "cpu" else product(x, weight, bias)


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation, *, backend: str = AUTO
) -> Tensor:
    """The first linear layer of an MLP with its activation (:func:`.reference.linear_activation`).

    Args:
        x: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]``.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"quick_gelu"``.
        backend: see above.

    Returns:
        ``[..., M]`` in the dtype of ``x``.

    Raises:
        ValueError: wrong shape, unknown activation or backend.
    """
    expect("weight", weight, (None, None))
    expect("x", x, (*[None] * (x.ndim - 1), weight.shape[1]))
    expect("bias", bias, (weight.shape[0],))
    expect_together(x=x, weight=weight, bias=bias)
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(get_args(Activation))}")
    result: Tensor = call("linear_activation", x, weight, bias, activation, backend)
    return result


def add_layer_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, *, backend: str = AUTO
) -> Tensor:
    """Adds a term to the residual stream, in place, and returns its LayerNorm (:func:`.reference.add_layer_norm`).

    Args:
        x: ``[..., W]``; changed in place unless ``delta`` is None.
        delta: ``[..., W]`` in the dtype of ``x``, or None.
        weight: ``[W]``, of any precision: statistics are taken in at least float32.
        bias: ``[W]``.
        eps: ε of the LayerNorm.
        backend: see above.

    Returns:
        ``[..., W]`` in the dtype of ``x``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    expect("x", x, (None,) * max(1, x.ndim))
    expect("weight", weight, (x.shape[-1],))
    expect("bias", bias, (x.shape[-1],))
    if delta is not None:
        expect("delta", delta, tuple(x.shape))
    expect_together(x=x, delta=delta, weight=weight, bias=bias)
    result: Tensor = call("add_layer_norm", x, delta, weight, bias, eps, backend)
    return result
