"""Attention of one query per image: pooling heads, and a class token alone.

Axes: ``B`` images, ``N`` tokens, ``H`` heads, ``E`` head_dim, ``W`` width.
"""

from typing import Any

from torch import Tensor

from clipfast.kernels.checks import NONEMPTY, check_same_device, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import HEAD_DIM, HEADS, IMAGES, TOKENS, Examples
from clipfast.kernels.reference import accumulation_dtype
from clipfast.kernels.registration import register

__all__ = ["query_row", "query_row_from_tokens"]


def query_row(query: Tensor, key: Tensor, value: Tensor, *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    """Attention of one query per image and head (:func:`clipfast.kernels.reference.query_row`).

    Args:
        query: ``[B, H, E]``; a learned query that is the same for every image may be expanded.
        key: ``[B, N, H, E]``.
        value: ``[B, N, H, E]``.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``z [B, H, E]`` and ``alpha [B, H, N]``, both float32, float64 for float64.

    Raises:
        ValueError: wrong shape or no tokens.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("query", query, (None, None, NONEMPTY))
    images, heads, head_dim = query.shape
    check_shape("key", key, (images, None, heads, head_dim))
    check_shape("value", value, tuple(key.shape))
    if not key.shape[1]:
        raise ValueError("key and value have no tokens: there is nothing to attend to")
    check_same_device(query=query, key=key, value=value)
    result: tuple[Tensor, Tensor] = _QUERY_ROW(query, key, value, backend)
    return result


def query_row_from_tokens(
    query: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    *,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention of one query, straight from the tokens (:func:`clipfast.kernels.reference.query_row_from_tokens`).

    Args:
        query: ``[B, H, E]``.
        tokens: ``[B, N, W]``, what keys and values are projected from.
        key_weight: ``[H, E, W]``.
        value_weight: ``[H, E, W]``.
        value_bias: ``[H, E]``.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``z [B, H, E]`` and ``alpha [B, H, N]``, both float32, float64 for float64.

    Raises:
        ValueError: wrong shape.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("query", query, (None, None, NONEMPTY))
    images, heads, head_dim = query.shape
    check_shape("tokens", tokens, (images, None, None))
    width = tokens.shape[2]
    check_shape("key_weight", key_weight, (heads, head_dim, width))
    check_shape("value_weight", value_weight, (heads, head_dim, width))
    check_shape("value_bias", value_bias, (heads, head_dim))
    check_same_device(
        query=query, tokens=tokens, key_weight=key_weight, value_weight=value_weight, value_bias=value_bias
    )
    result: tuple[Tensor, Tensor] = _QUERY_ROW_FROM_TOKENS(query, tokens, key_weight, value_weight, value_bias, backend)
    return result


def _empty_results(query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """``z`` and ``alpha`` for ``tokens [B, N, ...]``."""
    images, heads, head_dim = query.shape
    dtype = accumulation_dtype(tokens.dtype)
    z = tokens.new_empty(images, heads, head_dim, dtype=dtype)
    return z, tokens.new_empty(images, heads, tokens.shape[1], dtype=dtype)


def _fake(query: Tensor, key: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_results(query, key)


def _fake_from_tokens(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return _empty_results(query, tokens)


def _example_arguments(examples: Examples) -> list[Any]:
    return [examples.query, examples.draw(IMAGES, TOKENS, HEADS, HEAD_DIM), examples.value]


def _example_arguments_from_tokens(examples: Examples) -> list[Any]:
    return [examples.query, examples.tokens, examples.head_weight, examples.head_weight, examples.head_bias]


_QUERY_ROW = register("query_row", _fake, _example_arguments)
_QUERY_ROW_FROM_TOKENS = register("query_row_from_tokens", _fake_from_tokens, _example_arguments_from_tokens)
