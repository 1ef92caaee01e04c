"""Where a head's outputs vary: the few dimensions of the embedding that they span, and their covariance in them.

TEXTSPAN projects texts on the span of *uncentred* outputs and pursues their *centred* covariance. Both follow from the
outputs themselves or from moments of their codes, alike.

``G`` heads, ``H`` heads of a layer, ``R`` dimensions of a span, ``D`` embed_dim, ``X`` entries of a code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDINGS = 8
"""Singular values and deviations below so many roundings of the largest are noise."""

_FLOAT64_FLOOR = 1e-12  # shares of a variance that float64 sums of products still tell from zero
_ORTHONORMAL = 1e-13  # how far products of orthonormal rows may be off
_LIFT = 1e-15


def noise(dtype: torch.dtype) -> float:
    """The share of the largest variance below which outputs computed in ``dtype`` hold nothing but rounding."""
    return max((ROUNDINGS * torch.finfo(dtype).eps) ** 2, _FLOAT64_FLOOR)


@dataclass(frozen=True)
class HeadSpans:
    """Where the outputs of ``G`` heads vary, in coordinates of each head's own span.

    Attributes:
        axes: ``[G, R, D]``, orthonormal rows that span each head's uncentred outputs, zero beyond its rank.
        factor: ``[G, R, R]``, ``L`` with the covariance ``L Lᵀ`` (unbiased) in these coordinates.
        mean: ``[G, D]``.
        ranks: rank of each head.
        notes: of each head.
        noise: share of a head's largest variance that is rounding, see :func:`noise`.
    """

    axes: Tensor
    factor: Tensor
    mean: Tensor
    ranks: tuple[int, ...]
    notes: tuple[tuple[str, ...], ...]
    noise: float

    def select(self, groups: Sequence[int]) -> "HeadSpans":
        """Some of the heads."""
        index = torch.tensor(groups, dtype=torch.long, device=self.axes.device)
        ranks, notes = tuple(self.ranks[group] for group in groups), tuple(self.notes[group] for group in groups)
        return HeadSpans(self.axes[index], self.factor[index], self.mean[index], ranks, notes, self.noise)


def numerical_rank(values: Tensor, share: float, rank: int | None) -> tuple[int, tuple[str, ...]]:
    """How many of the eigenvalues of a second moment stand above noise, at most ``rank``, and a note where it is less.

    Args:
        values: ``[R]``, descending.
        share: of the largest, below which they are noise.
        rank: the largest rank to keep; None for all.
    """
    real = int((values > share * values[:1].clamp_min(0)).sum()) if len(values) else 0
    if rank is None or rank <= real:
        return min(real, rank or real), ()
    return real, (f"rank {rank} is more than the numerical rank {real} of the outputs: clamped",)


def of_outputs(head_outputs: Tensor, rank: int | None) -> HeadSpans:
    """The span of one head's outputs ``[K, D]``."""
    outputs = head_outputs.double()
    _, values, axes = torch.linalg.svd(outputs, full_matrices=False)
    share = noise(head_outputs.dtype)
    kept, notes = numerical_rank(values.square(), share, rank)
    axes = axes[:kept]
    mean = outputs.mean(0)
    centred = (outputs - mean) @ axes.T  # [K, R]
    triangular = torch.linalg.qr(centred, mode="r")[1] / max(len(outputs) - 1, 1) ** 0.5
    factor = torch.zeros(kept, kept, dtype=torch.float64, device=outputs.device)
    factor[:, : len(triangular)] = triangular.T
    return HeadSpans(axes[None], factor[None], mean[None], (kept,), (notes,), share)


def of_codes(
    folded: Tensor, moment: Tensor, covariance: Tensor, share: float, rank: int | None
) -> tuple[Tensor, Tensor, list[int], list[tuple[str, ...]]]:
    """Axes ``[H, R, D]``, factors ``[H, R, R]``, ranks and notes of a layer's heads.

    Args:
        folded: ``[H, X, D]``, code to contribution.
        moment: ``[H, X, X]``, uncentred second moment of the codes.
        covariance: ``[H, X, X]`` of the codes.
        share: what part of the largest variance is rounding.
        rank: the largest rank to keep; None for all.
    """
    orthonormal, triangular = _orthonormal(folded)  # [H, R, D], [H, X, R]
    projection = triangular.transpose(1, 2)
    values, vectors = torch.linalg.eigh(projection @ moment @ triangular)  # ascending
    values, vectors = values.flip(1), vectors.flip(2)
    kept, notes = zip(*(numerical_rank(row, share, rank) for row in values), strict=True)
    own = torch.arange(values.shape[1], device=values.device) < torch.tensor(kept, device=values.device)[:, None]
    vectors = vectors * own[:, None]  # nothing beyond the rank
    axes = vectors.transpose(1, 2) @ orthonormal
    projection = vectors.transpose(1, 2) @ projection  # [H, R, X]
    return axes, _factor(projection @ covariance @ projection.transpose(1, 2)), list(kept), list(notes)


def _orthonormal(folded: Tensor) -> tuple[Tensor, Tensor]:
    """``folded [H, X, D]`` as a matrix ``[H, X, R]`` times orthonormal rows ``[H, R, D]``.

    Cholesky factors of the small Gram matrices, twice, are as exact as a QR decomposition of the wide matrix and take
    a tenth of its time, unless rows are nearly dependent: then it is the decomposition. Source: Yamamoto et al. 2015,
    "CholeskyQR2".
    """
    if folded.shape[1] <= folded.shape[2]:
        lengths = folded.norm(dim=2, keepdim=True).clamp_min(torch.finfo(folded.dtype).tiny)
        rows, triangular = folded / lengths, torch.diag_embed(lengths[..., 0])
        for _ in range(2):
            lower, failed = torch.linalg.cholesky_ex(rows @ rows.transpose(1, 2))
            if bool(failed.any()):
                break
            rows = torch.linalg.solve_triangular(lower, rows, upper=False)
            triangular = triangular @ lower
        else:
            drift = rows @ rows.transpose(1, 2) - torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
            if float(drift.abs().max()) < _ORTHONORMAL:
                return rows, triangular
    wide, upper = torch.linalg.qr(folded.transpose(1, 2))
    return wide.transpose(1, 2), upper.transpose(1, 2)


def _factor(covariance: Tensor) -> Tensor:
    """``L`` with ``L Lᵀ = covariance`` for covariances ``[H, R, R]`` that may be singular."""
    largest = covariance.diagonal(dim1=1, dim2=2).amax(1)
    # Far below the noise of any input, and enough for a factor to exist.
    lift = _LIFT * largest[:, None] * (covariance.diagonal(dim1=1, dim2=2) > 0)
    lower, failed = torch.linalg.cholesky_ex(covariance + torch.diag_embed(lift))
    if not bool(failed.any()):
        return lower
    spread, modes = torch.linalg.eigh(covariance)
    return modes * spread.clamp_min(0).sqrt()[:, None]
