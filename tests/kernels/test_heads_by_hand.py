"""Moments and TEXTSPAN in numbers that anyone can verify: the definitions themselves, and as they are called."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from measures import error
from tolerances import FLOAT64
from torch import Tensor

from clipfast.kernels import ops, reference


def exactly(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def called_moments(codes: Tensor, shared: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    total, second = torch.zeros(centre.shape).double(), torch.zeros(*centre.shape, centre.shape[1]).double()
    ops.moments(codes, shared, centre, total, second)
    return total, second


@pytest.mark.parametrize("moments", [reference.moments, called_moments], ids=["definition", "called"])
def test_moments(moments: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Two images, heads of one entry: (3, 10) and (5, 20) less (4, 10); (7, 10) and (1, 20) less (0, 20)."""
    total, second = moments(exactly([[[3], [7]], [[5], [1]]]), exactly([[10], [20]]), exactly([[4, 10], [0, 20]]))
    assert error(total, exactly([[0, 10], [8, -10]])) == 0
    assert error(second, exactly([[[2, 10], [10, 100]], [[50, -70], [-70, 100]]])) == 0


EITHER = pytest.mark.parametrize("span", [reference.span, ops.span], ids=["definition", "called"])
TEXTS, FACTOR = exactly([[[1, 0], [1, 1]]]), exactly([[[2, 0], [0, 1]]])  # covariance (4, 0; 0, 1)


@EITHER
def test_span(span: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Variances 4 and 4 + 1: the second text. It leaves (1/2, −1/2) of the first, with a variance of 4/4 + 1/4."""
    picks, variance, directions = span(TEXTS, FACTOR, 2, 1e-10)
    assert picks.tolist() == [[1, 0]]
    assert error(variance, exactly([[5, 5 / 4]])) <= FLOAT64
    assert error(directions, exactly([[[sqrt(1 / 2), sqrt(1 / 2)], [sqrt(1 / 2), -sqrt(1 / 2)]]])) <= FLOAT64


@EITHER
def test_span_ends_at_the_floor_and_with_the_coordinates(span: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """The second variance is a quarter of the first; there is no third direction in a plane."""
    assert span(TEXTS, FACTOR, 3, 0.26)[0].tolist() == [[1, -1, -1]]
    picks, variance, directions = span(TEXTS, FACTOR, 3, 0.24)
    assert picks.tolist() == [[1, 0, -1]]
    assert variance[0, 2] == 0
    assert not directions[0, 2].any()


@EITHER
def test_span_takes_the_first_of_equals(span: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """(1, 1) and (1, −1) explain 5 each."""
    assert span(exactly([[[0, 1], [1, 1], [1, -1]]]), FACTOR, 1, 1e-10)[0].tolist() == [[1]]
    assert span(exactly([[[0, 1], [1, -1], [1, 1]]]), FACTOR, 1, 1e-10)[0].tolist() == [[1]]


@EITHER
def test_span_of_outputs_that_go_together(span: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """Covariance (1, 1; 1, 1): (2, 1) explains 3². It leaves (1/5, −2/5) of (1, 0), which explains (1/5 − 2/5)²."""
    picks, variance, _ = span(exactly([[[1, 0], [2, 1]]]), exactly([[[1, 0], [1, 0]]]), 2, 1e-10)
    assert picks.tolist() == [[1, 0]]
    assert error(variance, exactly([[9, 1 / 25]])) <= FLOAT64
