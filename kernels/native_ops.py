"""The operations in C++ for the CPU: which of them, how their arguments become pointers, and what they refuse.

The mathematics is in ``csrc/``, a file per operation; here are allocation and strides. Results are allocated here, so
the library holds no memory but scratch of its own.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.dispatch import Implementation


def _unreadable(**tensors: Tensor) -> list[str]:
    """The reasons why memory does not hold what these tensors say."""
    reasons = [f"{name} is on {tensor.device}" for name, tensor in tensors.items() if tensor.device.type != "cpu"]
    return reasons or [f"{name} is a negated view" for name, tensor in tensors.items() if tensor.is_neg()]


def moments(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> None:
    """Adds :func:`clipfast.kernels.reference.moments` to ``total`` and ``second``, all of it in float64."""
    images, groups, entries = codes.shape
    columns = entries + shared.shape[1]
    if not (images and groups and columns):
        return
    given = (codes, shared, centre)
    dtype = torch.float64 if torch.float64 in {each.dtype for each in given} else torch.float32
    codes, shared, centre = (each.to(dtype) for each in given)  # what is smaller is widened, exactly
    native.call(
        "moments",
        dtype == torch.float64,
        codes,
        *codes.stride(),
        shared,
        *shared.stride(),
        centre.contiguous(),
        images,
        groups,
        entries,
        columns,
        total,
        second,
    )


def span(texts: Tensor, factor: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.span`, one thread per head; of float32 texts in float64, too."""
    groups, count, rank = texts.shape
    picks = torch.full((groups, size), -1, dtype=torch.long)
    variance, directions = texts.new_zeros(groups, size), texts.new_zeros(groups, size, rank)
    if groups and rank:
        native.call(
            "span",
            texts.dtype == torch.float64,
            texts,
            *texts.stride(),
            factor.double().contiguous(),
            groups,
            count,
            rank,
            size,
            floor,
            picks,
            variance,
            directions,
        )
    return picks, variance, directions


def _refuses_moments(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> list[str]:
    return _unreadable(codes=codes, shared=shared, centre=centre)


def _refuses_span(texts: Tensor, factor: Tensor, size: int, floor: float) -> list[str]:
    return _unreadable(texts=texts, factor=factor)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "moments": Implementation(moments, _refuses_moments),
    "span": Implementation(span, _refuses_span),
}
"""By the operations' names in :mod:`clipfast.kernels.ops`."""
