"""Moments in plain torch, in float64."""

import torch
from torch import Tensor

from clipfast.kernels.dispatch import Implementation


def moments(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> None:
    """Adds :func:`clipfast.kernels.reference.moments` to ``total`` and ``second``, all of it in float64.

    ``second`` stays exactly symmetric, which matrix products alone do not promise.
    """
    codes, shared, centre = codes.double(), shared.double(), centre.double()
    x = torch.cat([codes, shared[:, None].expand(-1, codes.shape[1], -1)], 2) - centre  # [B, G, E + X]
    total += x.sum(0)
    x = x.transpose(0, 1)  # [G, B, E + X]
    products = x.transpose(1, 2) @ x
    second += (products + products.transpose(1, 2)) / 2


IMPLEMENTATIONS = {"moments": Implementation(moments)}
