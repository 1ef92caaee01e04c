"""Shares of the embedding's variance, against covariances written out."""

import pytest
import torch
from builders import vision_tower
from measures import error
from tolerances import FLOAT64
from torch import Tensor

import clipfast
from clipfast.analyses.variance import TermVariances

IMAGES = 40


@pytest.fixture(scope="module")
def model() -> clipfast.Model:
    return clipfast.wrap(vision_tower(seed=1, dtype=torch.float64))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(IMAGES, 3, 24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def covariance(term: Tensor, whole: Tensor) -> float:
    """``Σ_d Cov(term_d, whole_d)``, written out."""
    return float(((term - term.mean(0)) * (whole - whole.mean(0))).sum() / (len(whole) - 1))


@pytest.mark.parametrize("layers", [None, [1]])
@pytest.mark.parametrize("batch", [IMAGES, 7])
def test_shares_are_covariances_with_the_embedding(
    model: clipfast.Model, images: Tensor, layers: list[int] | None, batch: int
) -> None:
    variances = TermVariances()
    for part in images.split(batch):
        variances.update(model.decompose(part, layers=layers))
    contributions = model.decompose(images, layers=layers)
    whole = model.encode_image(images)
    total = float(whole.var(0).sum())
    heads = contributions.heads().sum(2)
    shares = variances.shares()
    assert shares.layers == contributions.layers
    expected = [covariance(heads[:, position], whole) / total for position in range(len(contributions.layers))]
    assert error(torch.tensor(shares.attention), torch.tensor(expected)) <= FLOAT64
    expected = [covariance(contributions.start_and_mlps()[:, index], whole) / total for index in range(4)]
    assert error(torch.tensor([shares.start, *shares.mlps]), torch.tensor(expected)) <= FLOAT64
    every = (shares.start, *shares.attention, *shares.mlps, shares.rest)
    assert abs(sum(every) - 1) <= FLOAT64
    assert (abs(shares.rest) > FLOAT64) == (layers is not None)


def test_what_has_no_variance(model: clipfast.Model, images: Tensor) -> None:
    variances = TermVariances()
    with pytest.raises(clipfast.InputError, match="the variance of 0 images"):
        variances.shares()
    for _ in range(4):
        variances.update(model.decompose(images[:1]))
    with pytest.raises(clipfast.InputError, match="the same embedding"):
        variances.shares()


def test_other_layers_are_refused(model: clipfast.Model, images: Tensor) -> None:
    variances = TermVariances()
    variances.update(model.decompose(images[:2]))
    with pytest.raises(clipfast.InputError, match="keep other layers"):
        variances.update(model.decompose(images[2:4], layers=[0]))
