"""The contribution of every token through every head, and text maps per head.

Axes: ``B`` images, ``N`` tokens, ``H`` heads, ``E`` head_dim, ``T`` texts, ``D`` embed_dim.
"""

from typing import Any

from torch import Tensor

from clipfast.kernels.checks import check_same_device, check_shape, check_weighted_values
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import HEAD_DIM, HEADS, IMAGES, WIDTH, Examples
from clipfast.kernels.registration import register

__all__ = ["head_maps", "token_contributions"]


def token_contributions(
    alpha: Tensor,
    value: Tensor,
    basis: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    backend: str = AUTO,
) -> Tensor:
    """The contribution of every token through every head (:func:`clipfast.kernels.reference.token_contributions`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        basis: ``[H, E, D]``.
        shift: ``[B, D]``, added to every token's part of every head; nothing for None.
        scale: ``[B]``, multiplies the result; 1 for None.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[B, N, H, D]`` in the dtype of ``basis``.

    Raises:
        ValueError: wrong shape.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_weighted_values(alpha, value, basis, "basis")
    if shift is not None:
        check_shape("shift", shift, (value.shape[0], basis.shape[2]))
    if scale is not None:
        check_shape("scale", scale, (value.shape[0],))
    check_same_device(alpha=alpha, shift=shift, scale=scale)
    result: Tensor = _TOKEN_CONTRIBUTIONS(alpha, value, basis, shift, scale, backend)
    return result


def head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, *, backend: str = AUTO) -> Tensor:
    """Per-token text scores of every head (:func:`clipfast.kernels.reference.head_maps`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        text_basis: ``[H, E, T]``.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[B, H, N, T]`` in the dtype of ``alpha``.

    Raises:
        ValueError: wrong shape.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_weighted_values(alpha, value, text_basis, "text_basis")
    result: Tensor = _HEAD_MAPS(alpha, value, text_basis, backend)
    return result


def _fake(
    alpha: Tensor, value: Tensor, basis: Tensor, shift: Tensor | None, scale: Tensor | None, backend: str
) -> Tensor:
    images, tokens, heads, _ = value.shape
    return basis.new_empty(images, tokens, heads, basis.shape[2])


def _fake_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, backend: str) -> Tensor:
    images, tokens, heads, _ = value.shape
    return alpha.new_empty(images, heads, tokens, text_basis.shape[2])


def _example_arguments(examples: Examples) -> list[Any]:
    basis = examples.draw_float32(HEADS, HEAD_DIM, WIDTH)
    return [
        examples.alpha,
        examples.value,
        basis,
        examples.draw_float32(IMAGES, WIDTH),
        examples.draw_float32(IMAGES),
    ]


def _example_arguments_maps(examples: Examples) -> list[Any]:
    return [examples.alpha, examples.value, examples.text_basis]


_TOKEN_CONTRIBUTIONS = register("token_contributions", _fake, _example_arguments)
_HEAD_MAPS = register("head_maps", _fake_maps, _example_arguments_maps)
