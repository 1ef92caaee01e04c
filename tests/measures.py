"""How far apart two results are; NaN anywhere is never close."""

import torch
from torch import Tensor


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in float64; shapes must agree."""
    assert actual.shape == expected.shape, f"{list(actual.shape)} is not {list(expected.shape)}"
    if not actual.numel():
        return 0.0
    return float((actual.detach().double() - expected.detach().double()).abs().max())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """:func:`error` over the largest expected value."""
    return error(actual, expected) / max(float(expected.detach().double().abs().max()), torch.finfo(torch.float64).tiny)


def relative_norm(have: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is right: the error of all entries together."""
    return float((have.double() - expected.double()).norm() / expected.double().norm())
