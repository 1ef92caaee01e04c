"""Linear layers: alone, with an activation, added to the residual stream, and of a few rows in full precision.

Axes: ``K`` columns in, ``M`` columns out.
"""

from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import dispatch
from clipfast.kernels.checks import check_dtype, check_same_device, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import IMAGES, WIDTH, Examples
from clipfast.kernels.reference import Activation, accumulation_dtype
from clipfast.kernels.registration import register

__all__ = ["add_linear", "linear", "linear_activation", "linear_unrounded"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = AUTO) -> Tensor:
    """A linear layer, ``x Wᵀ + b`` (:func:`clipfast.kernels.reference.linear`).

    ``"eager"`` is torch's own product, which autograd and torch.compile see through. ``"auto"`` takes it wherever it is
    as fast as any, and wherever gradients are enabled or the call is compiled; only 16-bit formats on the CPU are
    always the native backend's.

    Args:
        x: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]``, or None.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[..., M]`` in the dtype of ``x``.

    Raises:
        ValueError: wrong shape or dtype.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    result: Tensor
    inputs = (x, weight, bias)
    choice = _LINEAR.known(inputs, backend)
    if choice is not None:
        result = choice.run(*inputs)
        return result
    check_shape("weight", weight, (None, None))
    check_shape("x", x, (*[None] * (x.ndim - 1), weight.shape[1]))
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
    check_same_device(x=x, weight=weight, bias=bias)
    check_dtype(x.dtype, weight=weight, bias=bias)
    if torch.compiler.is_compiling():
        if _traced(x, backend):
            return F.linear(x, weight, bias)
        result = _LINEAR.op(x, weight, bias, backend)
        return result
    choice = _LINEAR.direct(inputs, backend)
    if choice is None:  # torch sees through its own product, and need not be told of the operation
        choice = dispatch.choose("linear", inputs, backend)
        if choice.backend != dispatch.EAGER.name:
            result = _LINEAR.op(*inputs, backend)
            return result
    result = choice.run(*inputs)
    return result


BACKENDS_WITH_LINEAR = ("native",)
"""Backends besides eager that implement ``linear``: while a call is traced, its folder cannot be searched for them."""


def _traced(x: Tensor, backend: str) -> bool:
    """Whether a compiled call is torch's own product, as :func:`dispatch.choose` would say where it can be traced."""
    if backend == AUTO:
        return x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16)
    return backend not in BACKENDS_WITH_LINEAR


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation, *, backend: str = AUTO
) -> Tensor:
    """The first linear layer of an MLP with its activation (:func:`clipfast.kernels.reference.linear_activation`).

    Args:
        x: ``[..., K]``.
        weight: ``[M, K]``.
        bias: ``[M]``.
        activation: ``"gelu"`` (exact), ``"gelu_tanh"`` or ``"quick_gelu"``.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[..., M]`` in the dtype of ``x``.

    Raises:
        ValueError: wrong shape or unknown activation.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    result: Tensor
    inputs = (x, weight, bias, activation)
    choice = _LINEAR_ACTIVATION.known(inputs, backend)
    if choice is not None:
        result = choice.run(*inputs)
        return result
    check_shape("weight", weight, (None, None))
    check_shape("x", x, (*[None] * (x.ndim - 1), weight.shape[1]))
    check_shape("bias", bias, (weight.shape[0],))
    check_same_device(x=x, weight=weight, bias=bias)
    if activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}, expected one of {', '.join(get_args(Activation))}")
    result = _LINEAR_ACTIVATION(x, weight, bias, activation, backend)
    return result


def add_linear(x: Tensor, h: Tensor, weight: Tensor, *, backend: str = AUTO) -> None:
    """Adds a product to the residual stream, ``x ← x + h Wᵀ`` (:func:`clipfast.kernels.reference.add_linear`).

    This is a matrix product's own β = 1: its sums are rounded once, after ``x`` is added. A product of its own would be
    rounded, written, read, and rounded again with the stream. A bias has no place in it:
    :func:`~clipfast.kernels.layer_norm.add_layer_norm` takes ``carried`` ones.

    Args:
        x: ``[..., W]``, contiguous; changed in place.
        h: ``[..., K]``.
        weight: ``[W, K]``.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Raises:
        ValueError: wrong shape or dtype, or ``x`` is not contiguous.
        BackendUnavailable: the backend does not exist.
    """
    inputs = (x, h, weight)
    choice = _ADD_LINEAR.known(inputs, backend)
    if choice is not None:
        choice.run(*inputs)
        return
    check_shape("weight", weight, (None, None))
    check_shape("h", h, (*[None] * (h.ndim - 1), weight.shape[1]))
    check_shape("x", x, (*h.shape[:-1], weight.shape[0]))
    check_same_device(x=x, h=h, weight=weight)
    check_dtype(x.dtype, h=h, weight=weight)
    if not x.is_contiguous():
        raise ValueError("x is not contiguous")
    _ADD_LINEAR(*inputs, backend)


def linear_unrounded(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = AUTO) -> Tensor:
    """A linear layer of a few rows in float32 (:func:`clipfast.kernels.reference.linear_unrounded`).

    On a GPU factors of 16 bits are multiplied on tensor cores; nothing is rounded but the float32 sums.

    Args:
        x: ``[R, K]``.
        weight: ``[M, K]``.
        bias: ``[M]``.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[R, M]``, float32, float64 for float64.

    Raises:
        ValueError: wrong shape or dtype.
        BackendUnavailable: the backend does not exist.
    """
    result: Tensor
    inputs = (x, weight, bias)
    choice = _LINEAR_UNROUNDED.known(inputs, backend)
    if choice is not None:
        result = choice.run(*inputs)
        return result
    check_shape("weight", weight, (None, None))
    check_shape("x", x, (None, weight.shape[1]))
    check_shape("bias", bias, (weight.shape[0],))
    check_same_device(x=x, weight=weight, bias=bias)
    check_dtype(x.dtype, weight=weight, bias=bias)
    result = _LINEAR_UNROUNDED(*inputs, backend)
    return result


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: str, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_add(x: Tensor, h: Tensor, weight: Tensor, backend: str) -> None:
    return None


def _fake_unrounded(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=accumulation_dtype(weight.dtype))


def _example_arguments(examples: Examples) -> list[Any]:
    return [examples.tokens, examples.draw(WIDTH, WIDTH), examples.draw(WIDTH)]


def _example_arguments_activation(examples: Examples) -> list[Any]:
    return [*_example_arguments(examples), "quick_gelu"]


def _example_arguments_add(examples: Examples) -> list[Any]:
    return [examples.tokens, examples.draw(*examples.tokens.shape[:2], 2 * WIDTH), examples.draw(WIDTH, 2 * WIDTH)]


def _example_arguments_unrounded(examples: Examples) -> list[Any]:
    return [examples.draw(IMAGES, 2 * WIDTH), examples.draw(WIDTH, 2 * WIDTH), examples.draw(WIDTH)]


_LINEAR = register("linear", _fake, _example_arguments)
_LINEAR_ACTIVATION = register("linear_activation", _fake_activation, _example_arguments_activation)
_ADD_LINEAR = register("add_linear", _fake_add, _example_arguments_add, mutates_args=("x",))
_LINEAR_UNROUNDED = register("linear_unrounded", _fake_unrounded, _example_arguments_unrounded)
