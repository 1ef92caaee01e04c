"""TEXTSPAN in plain torch, many heads at a time."""

import torch
from torch import Tensor

from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import EQUAL


def span(texts: Tensor, factor: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.span` for many heads at once, without deflating texts or covariance.

    Removing a direction ``w`` changes every variance by products with two vectors: with ``P`` the projection away from
    earlier directions, ``u = P S w``, ``s = A w`` and ``x = A u``, it is ``v ← v − s (2 x − s w·u)``. In float64
    whatever the texts are: as variances fall, such differences lose the digits that float32 has.
    """
    groups, count, rank = texts.shape
    picks = torch.full((groups, size), -1, dtype=torch.long, device=texts.device)
    variances, directions = texts.new_zeros(groups, size), texts.new_zeros(groups, size, rank)
    together = max(1, 2**24 // max(count * rank, 1))  # heads: what they take in float64 stays around 256 MB
    for start in range(0, groups, together):
        part = slice(start, start + together)
        _span(texts[part], factor[part], floor, picks[part], variances[part], directions[part])
    return picks, variances, directions


def _span(texts: Tensor, factor: Tensor, floor: float, picks: Tensor, variances: Tensor, directions: Tensor) -> None:
    columns = texts.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format)  # [G, R, T]
    groups, rank, _ = columns.shape
    factor = factor.double()
    covariance = factor @ factor.transpose(1, 2)
    left = (factor.transpose(1, 2) @ columns).square_().sum(1)  # [G, T], the variance that each text explains
    known = left.new_zeros(groups, min(picks.shape[1], rank), rank)
    everyone = torch.arange(groups, device=texts.device)
    going = torch.ones(groups, dtype=torch.bool, device=texts.device)
    first, tiny = left.amax(1), torch.finfo(torch.float64).tiny
    limit = left.new_full((groups,), floor * tiny)
    for step in range(known.shape[1]):
        best = left.amax(1)
        going &= best > limit
        if not bool(going.any()):
            break
        limit = floor * first.clamp_min(tiny)
        pick = (left >= (best - EQUAL * first)[:, None]).to(torch.uint8).argmax(1)  # the first of equals
        direction = columns[everyone, :, pick]
        for _ in range(2):  # Gram-Schmidt twice is exact to rounding
            direction = _without(direction, known[:, :step])
            direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(tiny)
        shadow = _without(torch.einsum("grs,gs->gr", covariance, direction), known[:, :step])
        known[:, step] = direction
        picks[:, step] = torch.where(going, pick, -1)
        variances[:, step] = torch.where(going, left[everyone, pick], 0)
        directions[:, step] = torch.where(going[:, None], direction, 0)
        along, across = (torch.stack([direction, shadow], 1) @ columns).unbind(1)  # [G, T] each
        left -= along * (2 * across - along * (direction * shadow).sum(1, keepdim=True))


def _without(x: Tensor, known: Tensor) -> Tensor:
    """``x [G, R]`` less its components along the orthonormal rows of ``known [G, S, R]``."""
    return x - torch.einsum("gsr,gs->gr", known, torch.einsum("gsr,gr->gs", known, x))


IMPLEMENTATIONS = {"span": Implementation(span)}
