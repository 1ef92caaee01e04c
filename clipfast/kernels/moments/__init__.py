"""First and second moments of every head's codes.

Axes: ``B`` images, ``G`` heads of all layers, ``E`` entries of a code, ``X`` entries that all heads share.
"""

from typing import Any

import torch
from torch import Tensor

from clipfast.kernels.checks import check_same_device, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import HEAD_DIM, HEADS, IMAGES, Examples
from clipfast.kernels.registration import register

__all__ = ["moments"]


def moments(
    codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor, *, backend: str = AUTO
) -> None:
    """Adds a batch to the first two moments of every head's codes (:func:`clipfast.kernels.reference.moments`).

    Args:
        codes: ``[B, G, E]``.
        shared: ``[B, X]``.
        centre: ``[G, E + X]`` in the dtype of ``codes``; the same for every batch.
        total: ``[G, E + X]``, float64, contiguous; changed in place.
        second: ``[G, E + X, E + X]``, float64, contiguous; changed in place.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Raises:
        ValueError: wrong shape or dtype.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    check_shape("codes", codes, (None, None, None))
    check_shape("shared", shared, (codes.shape[0], None))
    groups, columns = codes.shape[1], codes.shape[2] + shared.shape[1]
    check_shape("centre", centre, (groups, columns))
    check_shape("total", total, (groups, columns))
    check_shape("second", second, (groups, columns, columns))
    for name, sums in (("total", total), ("second", second)):
        if sums.dtype != torch.float64 or not sums.is_contiguous():
            raise ValueError(f"{name} is {sums.dtype}, expected contiguous torch.float64")
    check_same_device(codes=codes, shared=shared, centre=centre, total=total, second=second)
    _MOMENTS(codes, shared, centre, total, second, backend)


def _fake(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor, backend: str) -> None:
    pass


def _example_arguments(examples: Examples) -> list[Any]:
    columns = HEAD_DIM + 3
    codes = examples.draw_float32(IMAGES, HEADS, HEAD_DIM)
    shared, centre = examples.draw_float32(IMAGES, 3), examples.draw_float32(HEADS, columns)
    sums = (torch.zeros(shape, dtype=torch.float64) for shape in ((HEADS, columns), (HEADS, columns, columns)))
    return [codes, shared, centre, *(zeros.to(examples.device) for zeros in sums)]


_MOMENTS = register("moments", _fake, _example_arguments, mutates_args=("total", "second"))
