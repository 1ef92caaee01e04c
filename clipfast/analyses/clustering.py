"""k-means on inner products: groups of things whose coordinates are too many to write down.

``P`` things, ``K`` groups.
"""

from typing import Final

import torch
from torch import Tensor

from clipfast.errors import InputError

_ROUNDS: Final = 100
_SAME: Final = 1e-9  # of the largest distance: rounding of float64


def kernel_k_means(products: Tensor, count: int) -> Tensor:
    """Groups of least squared distance to their means, from the inner products of all things alone.

    Deterministic: the first centre is the thing farthest from the mean of all, each further one the thing farthest from
    the centres before it, of equal ones the first. Assignments and means alternate until no assignment changes (Lloyd's
    algorithm), at most 100 times.

    Args:
        products: ``[P, P]``, inner products.
        count: groups at most, ``K``; fewer where things are alike.

    Returns:
        ``[P]`` int64 on the CPU, the group of each thing: 0, 1, … in the order in which their first members come.

    Raises:
        InputError: no square matrix, values that are not finite, or a count below one.
    """
    if products.ndim != 2 or products.shape[0] != products.shape[1] or not len(products):
        raise InputError(f"products have shape {list(products.shape)}, expected [things, things]")
    if not bool(products.isfinite().all()):
        raise InputError("products have values that are not finite")
    if count < 1:
        raise InputError(f"{count} groups were asked for: expected at least 1")
    products = products.detach().to("cpu", torch.float64)
    groups = _seeded(products, count)
    for _ in range(_ROUNDS):
        nearest = _first_least(_distances(products, groups))
        if torch.equal(nearest, groups):
            break
        groups = _renumbered(nearest)
    return _renumbered(groups)


def _seeded(products: Tensor, count: int) -> Tensor:
    squares = products.diagonal()
    distances = squares - 2 * products.mean(1) + products.mean()
    smallest = _SAME * float(distances.max())
    centres: list[int] = []
    nearest = distances
    for _ in range(min(count, len(products))):
        if centres and float(nearest.max()) <= smallest:
            break
        centre = int((nearest == nearest.max()).nonzero()[0, 0])
        centres.append(centre)
        own = (squares + squares[centre] - 2 * products[:, centre]).clamp_min(0)
        nearest = own if len(centres) == 1 else torch.minimum(nearest, own)
    to_centres = squares[:, None] + squares[centres] - 2 * products[:, centres]
    return _renumbered(_first_least(to_centres))


def _distances(products: Tensor, groups: Tensor) -> Tensor:
    """Squared distance of everything to the mean of every group, less its own square: ``[P, K]``."""
    member = torch.nn.functional.one_hot(groups).to(products)  # [P, K], every group has members
    member = member / member.sum(0)
    to_mean = products @ member
    return (member * to_mean).sum(0) - 2 * to_mean


def _first_least(distances: Tensor) -> Tensor:
    """The column of the least entry of every row, of equal ones the first."""
    least = distances == distances.amin(1, keepdim=True)
    return (least.cumsum(1) == 0).sum(1)


def _renumbered(groups: Tensor) -> Tensor:
    """The same groups, numbered in the order in which they come."""
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.tolist()))}
    return torch.tensor([numbers[group] for group in groups.tolist()], dtype=torch.long)
