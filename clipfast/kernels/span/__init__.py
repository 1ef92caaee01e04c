"""TEXTSPAN: the texts that, one after the other, explain most of each head's variance.

Axes: ``G`` heads, ``T`` texts, ``R`` rank of a head's span.
"""

from typing import Any

import torch
from torch import Tensor

from clipfast.kernels.checks import check_same_device, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import HEAD_DIM, HEADS, Examples
from clipfast.kernels.registration import register

__all__ = ["span"]


def span(
    texts: Tensor, factor: Tensor, size: int, floor: float = 1e-10, *, backend: str = AUTO
) -> tuple[Tensor, Tensor, Tensor]:
    """TEXTSPAN of many heads at once (:func:`clipfast.kernels.reference.span`).

    Args:
        texts: ``[G, T, R]``, texts in coordinates of each head's span; float32 or float64.
        factor: ``[G, R, R]``, ``L`` with covariance ``L Lᵀ``, in the dtype of ``texts`` or float64.
        size: texts to pick per head; picking ends earlier where no variance is left.
        floor: share of the first pick's variance below which no variance counts as left.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``picks [G, size]`` (int64, −1 after the end), ``variance [G, size]`` and orthonormal
        ``directions [G, size, R]``, both in the dtype of ``texts``.

    Raises:
        ValueError: wrong shape or dtype, no texts, or a size below 1.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("texts", texts, (None, None, None))
    groups, count, rank = texts.shape
    check_shape("factor", factor, (groups, rank, rank))
    if not count or size < 1:
        raise ValueError(f"{size} of {count} texts cannot be picked: at least one of each is needed")
    if texts.dtype not in (torch.float32, torch.float64) or factor.dtype not in (texts.dtype, torch.float64):
        expected = "texts of float32 or float64, and a factor of the same or of float64"
        raise ValueError(f"texts are {texts.dtype} and factor {factor.dtype}: expected {expected}")
    check_same_device(texts=texts, factor=factor)
    result: tuple[Tensor, Tensor, Tensor] = _SPAN(texts, factor, size, floor, backend)
    return result


def _fake(texts: Tensor, factor: Tensor, size: int, floor: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    groups, _, rank = texts.shape
    picks = texts.new_empty(groups, size, dtype=torch.long)
    return picks, texts.new_empty(groups, size), texts.new_empty(groups, size, rank)


def _example_arguments(examples: Examples) -> list[Any]:
    texts = examples.draw_float32(HEADS, 20, HEAD_DIM)
    return [texts, examples.draw_float32(HEADS, HEAD_DIM, HEAD_DIM), 4, 1e-10]


_SPAN = register("span", _fake, _example_arguments, compared=(1,))  # texts of equal merit may be picked
