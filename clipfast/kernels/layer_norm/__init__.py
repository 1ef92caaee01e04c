"""The residual stream's LayerNorm, and the statistics of a LayerNorm's input.

Axes: ``B`` images, ``W`` width.
"""

from typing import Any

from torch import Tensor

from clipfast.kernels.checks import check_same_device, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import IMAGES, TOKENS, WIDTH, Examples
from clipfast.kernels.reference import accumulation_dtype
from clipfast.kernels.registration import register

__all__ = ["add_layer_norm", "layer_statistics"]


def add_layer_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    carried: Tensor | None = None,
    *,
    backend: str = AUTO,
) -> Tensor:
    """Adds a term to the residual stream in place and returns its LayerNorm.

    Defined by :func:`clipfast.kernels.reference.add_layer_norm`.

    Args:
        x: ``[..., W]``; changed in place unless ``delta`` is None.
        delta: ``[..., W]`` in the dtype of ``x``, or None.
        weight: ``[W]``, of any precision: statistics are taken in at least float32.
        bias: ``[W]``.
        eps: ε of the LayerNorm.
        carried: ``[W]``, what belongs to every row of the stream and is never added to ``x``: biases, of any precision.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[..., W]`` in the dtype of ``x``.

    Raises:
        ValueError: wrong shape.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    result: Tensor
    inputs = (x, delta, weight, bias, eps, carried)
    choice = _ADD_LAYER_NORM.known(inputs, backend)
    if choice is not None:
        result = choice.run(*inputs)
        return result
    check_shape("x", x, (None,) * max(1, x.ndim))
    check_shape("weight", weight, (x.shape[-1],))
    check_shape("bias", bias, (x.shape[-1],))
    if delta is not None:
        check_shape("delta", delta, tuple(x.shape))
    if carried is not None:
        check_shape("carried", carried, (x.shape[-1],))
    check_same_device(x=x, delta=delta, weight=weight, bias=bias, carried=carried)
    result = _ADD_LAYER_NORM(*inputs, backend)
    return result


def layer_statistics(residual: Tensor, eps: float, *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a LayerNorm's input (:func:`clipfast.kernels.reference.layer_statistics`).

    Args:
        residual: ``[B, W]``.
        eps: ε of the LayerNorm.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``mean [B]`` and ``std [B]``, float32, float64 for float64.

    Raises:
        ValueError: wrong shape.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("residual", residual, (None, None))
    result: tuple[Tensor, Tensor] = _LAYER_STATISTICS(residual, eps, backend)
    return result


def _fake(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, carried: Tensor | None, backend: str
) -> Tensor:
    return x.new_empty(x.shape)


def _fake_statistics(residual: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(residual.dtype)
    mean = residual.new_empty(residual.shape[0], dtype=dtype)
    return mean, residual.new_empty(residual.shape[0], dtype=dtype)


def _example_arguments(examples: Examples) -> list[Any]:
    delta, weight, bias = (examples.draw(*shape) for shape in ((IMAGES, TOKENS, WIDTH), (WIDTH,), (WIDTH,)))
    return [examples.tokens, delta, weight, bias, 1e-5, None]


def _example_arguments_statistics(examples: Examples) -> list[Any]:
    return [examples.draw_float32(IMAGES, WIDTH), 1e-5]


_ADD_LAYER_NORM = register("add_layer_norm", _fake, _example_arguments, mutates_args=("x",))
_LAYER_STATISTICS = register("layer_statistics", _fake_statistics, _example_arguments_statistics)
