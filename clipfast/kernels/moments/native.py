"""Moments in C++ for the CPU (``csrc/moments.cpp``)."""

import torch
from torch import Tensor

from clipfast.kernels import native
from clipfast.kernels.dispatch import Implementation


def moments(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> None:
    """Adds :func:`clipfast.kernels.reference.moments` to ``total`` and ``second``, computed in float64."""
    float64 = torch.float64 in (codes.dtype, shared.dtype, centre.dtype)
    dtype = torch.float64 if float64 else torch.float32  # smaller dtypes are widened, exactly
    native.library().moments(codes.to(dtype), shared.to(dtype), centre.to(dtype).contiguous(), total, second)


def _unsupported_reasons(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> list[str]:
    return native.library().moments_unsupported_reasons(codes, shared, centre, total, second)


IMPLEMENTATIONS = {"moments": Implementation(moments, _unsupported_reasons)}
