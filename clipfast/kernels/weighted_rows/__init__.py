"""Weighted sums of attention rows: what pooling weights of the last layer read of its tokens.

Axes: ``B`` images, ``G`` weightings, ``N`` tokens, ``H`` heads, ``E`` head_dim.
"""

from typing import Any

from torch import Tensor

from clipfast.kernels.checks import NONEMPTY, check_dtype, check_same_device, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import HEAD_DIM, HEADS, IMAGES, TOKENS, Examples
from clipfast.kernels.reference import accumulation_dtype
from clipfast.kernels.registration import register

__all__ = ["weighted_rows"]


def weighted_rows(qkv: Tensor, weights: Tensor, *, backend: str = AUTO) -> Tensor:
    """Weighted sums of every head's attention rows (:func:`clipfast.kernels.reference.weighted_rows`).

    Args:
        qkv: ``[B, N, 3, H, E]``, any strides with a contiguous last axis; the values are not read.
        weights: ``[B, G, N]`` of the queries, of either sign; float32, float64 for a ``qkv`` in float64.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``[B, G, H, N]`` in the dtype of ``weights``.

    Raises:
        ValueError: wrong shape, dtype or device.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    choice = _WEIGHTED_ROWS.known((qkv, weights), backend)
    if choice is None:
        check_shape("qkv", qkv, (None, None, 3, None, NONEMPTY))
        check_dtype(qkv.dtype, qkv=qkv)
        check_shape("weights", weights, (qkv.shape[0], None, qkv.shape[1]))
        check_dtype(accumulation_dtype(qkv.dtype), weights=weights)
        check_same_device(qkv=qkv, weights=weights)
        rows: Tensor = _WEIGHTED_ROWS(qkv, weights, backend)
    else:
        rows = choice.run(qkv, weights)
    return rows


def _fake(qkv: Tensor, weights: Tensor, backend: str) -> Tensor:
    images, tokens, _, heads, _ = qkv.shape
    return weights.new_empty(images, weights.shape[1], heads, tokens)


def _example_arguments(examples: Examples) -> list[Any]:
    qkv = examples.draw(IMAGES, TOKENS, 3, HEADS, HEAD_DIM)
    return [qkv, examples.draw_float32(IMAGES, 4, TOKENS).to(accumulation_dtype(qkv.dtype))]


_WEIGHTED_ROWS = register("weighted_rows", _fake, _example_arguments)
