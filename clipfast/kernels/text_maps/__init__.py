"""Text maps: scores of every token for every text, summed over heads, and over layers.

Axes: ``B`` images, ``N`` tokens, ``H`` heads, ``E`` head_dim, ``T`` texts, ``W`` width, ``L`` layers.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clipfast.kernels.checks import check_heads, check_out, check_same_device, check_shape, check_weighted_values
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import HEAD_DIM, HEADS, IMAGES, LAYERS, TEXTS, TOKENS, Examples
from clipfast.kernels.registration import register

__all__ = ["layered_text_maps", "text_maps", "text_maps_from_tokens"]


def text_maps(
    alpha: Tensor,
    value: Tensor,
    text_basis: Tensor,
    out: Tensor,
    heads: Tensor | None = None,
    *,
    backend: str = AUTO,
) -> Tensor:
    """Adds per-token text scores, summed over heads, to ``out`` (:func:`clipfast.kernels.reference.text_maps`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        text_basis: ``[H, E, T]``.
        out: ``[B, N, T]``, contiguous, float32 or float64; changed in place.
        heads: integers ``[S]``, which heads to sum over, each once; all for None.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape, or a head that does not exist.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_weighted_values(alpha, value, text_basis, "text_basis")
    check_out(out, (value.shape[0], value.shape[1], text_basis.shape[2]))
    check_same_device(alpha=alpha, out=out)
    check_heads(heads, value.shape[2])
    _TEXT_MAPS(alpha, value, text_basis, out, heads, backend)
    return out


def text_maps_from_tokens(
    alpha: Tensor,
    tokens: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    text_basis: Tensor,
    out: Tensor,
    *,
    backend: str = AUTO,
) -> Tensor:
    """:func:`text_maps`, straight from the tokens (:func:`clipfast.kernels.reference.text_maps_from_tokens`).

    Args:
        alpha: ``[B, H, N]``.
        tokens: ``[B, N, W]``, what values are projected from.
        value_weight: ``[H, E, W]``.
        value_bias: ``[H, E]``.
        text_basis: ``[H, E, T]``.
        out: ``[B, N, T]``, contiguous, float32 or float64; changed in place.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("tokens", tokens, (None, None, None))
    images, count, width = tokens.shape
    check_shape("text_basis", text_basis, (None, None, None))
    heads, head_dim, texts = text_basis.shape
    check_shape("alpha", alpha, (images, heads, count))
    check_shape("value_weight", value_weight, (heads, head_dim, width))
    check_shape("value_bias", value_bias, (heads, head_dim))
    check_out(out, (images, count, texts))
    weights = {"value_weight": value_weight, "value_bias": value_bias, "text_basis": text_basis}
    check_same_device(alpha=alpha, tokens=tokens, out=out, **weights)
    _TEXT_MAPS_FROM_TOKENS(alpha, tokens, value_weight, value_bias, text_basis, out, backend)
    return out


def layered_text_maps(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None = None, *, backend: str = AUTO
) -> Tensor:
    """Per-token text scores summed over layers and heads (:func:`clipfast.kernels.reference.layered_text_maps`).

    Args:
        alpha: ``[B, L, H, N]``.
        values: ``L`` times ``[B, N, H, E]``.
        text_basis: ``[L, H, E, T]``.
        heads: integers ``layer · H + head``, ``[S]``, what to sum over, each once; all for None.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[B, N, T]`` in the dtype of ``alpha``.

    Raises:
        ValueError: wrong shape, or a head that does not exist.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("alpha", alpha, (None, None, None, None))
    images, layers, count, tokens = alpha.shape
    check_shape("text_basis", text_basis, (layers, count, None, None))
    if len(values) != layers:
        raise ValueError(f"values are {len(values)} layers, alpha has {layers}")
    for layer, value in enumerate(values):
        check_shape(f"values[{layer}]", value, (images, tokens, count, text_basis.shape[2]))
    named = {f"values[{layer}]": value for layer, value in enumerate(values)}
    check_same_device(alpha=alpha, text_basis=text_basis, **named)
    check_heads(heads, layers * count)
    result: Tensor = _LAYERED_TEXT_MAPS(alpha, list(values), text_basis, heads, backend)
    return result


def _fake(alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None, backend: str) -> None:
    pass


def _fake_from_tokens(
    alpha: Tensor,
    tokens: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    text_basis: Tensor,
    out: Tensor,
    backend: str,
) -> None:
    pass


def _fake_layered(
    alpha: Tensor, values: list[Tensor], text_basis: Tensor, heads: Tensor | None, backend: str
) -> Tensor:
    return alpha.new_empty(alpha.shape[0], alpha.shape[3], text_basis.shape[3])


def _example_arguments(examples: Examples) -> list[Any]:
    return [examples.alpha, examples.value, examples.text_basis, examples.out, None]


def _example_arguments_from_tokens(examples: Examples) -> list[Any]:
    weights = (examples.head_weight, examples.head_bias)
    return [examples.alpha, examples.tokens, *weights, examples.text_basis, examples.out]


def _example_arguments_layered(examples: Examples) -> list[Any]:
    return [
        examples.draw_float32(IMAGES, LAYERS, HEADS, TOKENS).softmax(-1),
        list(examples.draw(LAYERS, IMAGES, TOKENS, HEADS, HEAD_DIM)),
        examples.draw_float32(LAYERS, HEADS, HEAD_DIM, TEXTS),
        None,
    ]


_TEXT_MAPS = register("text_maps", _fake, _example_arguments, mutates_args=("out",))
_TEXT_MAPS_FROM_TOKENS = register(
    "text_maps_from_tokens", _fake_from_tokens, _example_arguments_from_tokens, mutates_args=("out",)
)
_LAYERED_TEXT_MAPS = register("layered_text_maps", _fake_layered, _example_arguments_layered)
