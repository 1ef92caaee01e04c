"""Linear layers in 8 bits: rows rounded to float8 with a scale each, and products of such rows.

Numbers are ``float8_e4m3fn``: a sign, four bits of exponent, three of mantissa, no infinities, at most 448. They are
passed as their bits in ``uint8``, because torch compares and prints no tensors of float8; ``bits.view(
torch.float8_e4m3fn)`` are the numbers.

Axes: ``K`` columns in, ``M`` columns out.
"""

from typing import Any, get_args

import torch
from torch import Tensor

from clipfast.kernels.checks import NONEMPTY, check_dtype, check_same_device, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import WIDTH, Examples
from clipfast.kernels.reference import Activation
from clipfast.kernels.registration import register

__all__ = ["quantize_rows", "scaled_linear"]


def quantize_rows(x: Tensor, activation: Activation | None = None, *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    """Rounds rows to float8, each with a scale (:func:`clipfast.kernels.reference.quantize_rows`).

    Args:
        x: ``[..., K]``.
        activation: is applied first, in float32: ``"gelu"`` (exact), ``"gelu_tanh"``, ``"quick_gelu"``, or None.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``values [..., K]``, bits of float8 in uint8, and ``scale [...]`` in float32: a row is ``values · scale``. A row
        of zeros has scale 1; products of a row that holds a NaN or an infinity are NaN.

    Raises:
        ValueError: wrong shape or dtype, or unknown activation.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("x", x, (*[None] * (x.ndim - 1), NONEMPTY))
    check_dtype(x.dtype, x=x)
    if activation is not None and activation not in get_args(Activation):
        raise ValueError(f"activation is {activation!r}, expected None or one of {', '.join(get_args(Activation))}")
    result: tuple[Tensor, Tensor] = _QUANTIZE_ROWS(x, activation, backend)
    return result


def scaled_linear(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = AUTO,
) -> Tensor:
    """A linear layer of rows in float8 (:func:`clipfast.kernels.reference.scaled_linear`).

    On a GPU it needs compute capability 9.0 (Hopper) and sizes that are multiples of 16. Elsewhere it is emulated: the
    same factors, multiplied and summed in float32.

    Args:
        values: ``[..., K]``, as :func:`quantize_rows` gives them.
        scale: ``[...]``, float32.
        weight: ``[M, K]``, as :func:`quantize_rows` gives it.
        weight_scale: ``[M]``, float32.
        bias: ``[M]``, bfloat16, or None.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[..., M]``, bfloat16.

    Raises:
        ValueError: wrong shape or dtype.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("weight", weight, (None, None))
    check_shape("values", values, (*[None] * (values.ndim - 1), weight.shape[1]))
    check_shape("scale", scale, tuple(values.shape[:-1]))
    check_shape("weight_scale", weight_scale, (weight.shape[0],))
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],))
    check_same_device(values=values, scale=scale, weight=weight, weight_scale=weight_scale, bias=bias)
    for name, tensor in (("values", values), ("weight", weight)):
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{name} is {tensor.dtype}, expected torch.uint8")
    check_dtype(torch.float32, scale=scale, weight_scale=weight_scale)
    check_dtype(torch.bfloat16, bias=bias)
    result: Tensor = _SCALED_LINEAR(values, scale, weight, weight_scale, bias, backend)
    return result


def _fake_quantize(x: Tensor, activation: str | None, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _fake_scaled(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, backend: str
) -> Tensor:
    return values.new_empty(*values.shape[:-1], weight.shape[0], dtype=torch.bfloat16)


def _example_arguments_quantize(examples: Examples) -> list[Any]:
    return [examples.tokens, "gelu"]


def _example_arguments_scaled(examples: Examples) -> list[Any]:
    rows = examples.draw_float32(*examples.tokens.shape[:2], WIDTH)
    weight, bias = examples.draw_float32(WIDTH, WIDTH), examples.draw_float32(WIDTH)
    pairs = [(t.to(torch.float8_e4m3fn).view(torch.uint8), t.abs().amax(-1)) for t in (rows, weight)]
    return [*pairs[0], *pairs[1], bias.bfloat16()]


# Of the results the scales are compared: bits are no numbers.
_QUANTIZE_ROWS = register("quantize_rows", _fake_quantize, _example_arguments_quantize, compared=(1,))
_SCALED_LINEAR = register("scaled_linear", _fake_scaled, _example_arguments_scaled)
