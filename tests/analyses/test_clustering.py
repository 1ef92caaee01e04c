"""Groups from inner products: cases known beforehand, and k-means' own conditions."""

import pytest
import torch
from tolerances import FLOAT64
from torch import Tensor

from clipfast import InputError
from clipfast.analyses.clustering import kernel_k_means


def clouds(per_group: int = 12, groups: int = 3, width: int = 5, spread: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    centres = 4 * torch.eye(width, dtype=torch.float64)[:groups]
    truth = torch.arange(groups * per_group) % groups
    return centres[truth] + spread * torch.randn(len(truth), width, generator=generator, dtype=torch.float64), truth


def test_clouds_apart_are_found() -> None:
    points, truth = clouds()
    assert torch.equal(kernel_k_means(points @ points.T, 3), truth)  # numbered in the order in which they come


def test_every_point_is_nearest_to_the_mean_of_its_group() -> None:
    points = torch.randn(60, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = kernel_k_means(points @ points.T, 5)
    assert groups.unique().tolist() == [0, 1, 2, 3, 4]
    means = torch.stack([points[groups == group].mean(0) for group in range(5)])
    distances = (points[:, None] - means).square().sum(2)
    own = distances.gather(1, groups[:, None])[:, 0]
    assert float((own - distances.amin(1)).max()) <= FLOAT64


def test_only_differences_count() -> None:
    points, truth = clouds()
    moved = points + 7
    assert torch.equal(kernel_k_means(moved @ moved.T, 3), truth)


def test_things_alike_are_one_group() -> None:
    points = torch.tensor([[0.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    assert kernel_k_means(points @ points.T, 4).tolist() == [0, 1, 0, 1]
    assert kernel_k_means(torch.ones(3, 3), 2).tolist() == [0, 0, 0]
    assert kernel_k_means(torch.ones(1, 1), 2).tolist() == [0]
    assert kernel_k_means(points @ points.T, 1).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("products", "count", "message"),
    [
        (torch.zeros(2, 3), 2, r"products have shape \[2, 3\]"),
        (torch.zeros(0, 0), 2, r"products have shape \[0, 0\]"),
        (torch.full((2, 2), torch.inf), 2, "not finite"),
        (torch.eye(2), 0, "0 groups were asked for"),
    ],
)
def test_arguments_that_do_not_fit(products: Tensor, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        kernel_k_means(products, count)
