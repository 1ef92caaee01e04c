"""Joint decomposition: which patch, through which head, towards which of its texts; and heads against each other.

An embedding is a sum over heads, patches and, within a head, over directions: a head's outputs are spanned by few
texts (:mod:`.textspan`), so a patch's part of a head splits into scores for these. Source: arXiv 2310.05916, the joint
decomposition into heads and image tokens.

``B`` images, ``N`` tokens (class token first), ``G`` heads of all layers, ``m`` directions or texts of a head, ``D``
embed_dim, ``R`` rank of a head's outputs.
"""

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from clipfast.analyses.moments import Moments
from clipfast.analyses.textspan import TextSpan
from clipfast.basis import autocast_disabled
from clipfast.contributions import Contributions
from clipfast.errors import InputError

Directions: TypeAlias = TextSpan | Tensor
"""Directions of a head: what a TEXTSPAN picked, ``[m, D]`` orthonormal, or any features ``[m, D]``."""

_ENTRIES = 1 << 24  # of all heads' matrices at once: 128 MB in float64


def patch_scores(contributions: Contributions, layer: int, head: int, directions: Directions) -> Tensor:
    """What each token adds, through one head, along each of the head's directions.

    Args:
        contributions: decomposed with ``tokens=True``.
        layer: layer of the model, negative from the end.
        head: head of that layer.
        directions: the head's :class:`.TextSpan`, or text features ``[m, D]``.

    Returns:
        ``[B, N, m]``, class token first; ``[:, -rows · columns:].unflatten(1, contributions.grid)`` are the patches.
        Summed over tokens they are the head's own scores, ``contributions.head(layer, head) @ directionsᵀ``.

    Raises:
        InputError: no such head, a layer that was not kept, or directions of another width.
        NotKept: decomposed without ``tokens=True``.
    """
    return contributions.text_maps(_rows(directions, contributions), [(layer, head)])


def head_scores(contributions: Contributions, directions: Mapping[tuple[int, int], Directions]) -> Tensor:
    """What each head writes along its own directions: what :class:`.Tops` collects.

    Args:
        contributions: a batch.
        directions: per (layer, head), layers negative from the end; as many for every head.

    Returns:
        ``[B, G, m]``, heads in the order of ``directions``.

    Raises:
        InputError: no heads, a head that does not exist or was not kept, or directions that differ in number or width.
    """
    rows = {pair: _rows(own, contributions) for pair, own in directions.items()}
    sizes = {len(own) for own in rows.values()}
    if len(sizes) != 1:
        counts = f"between {min(sizes)} and {max(sizes)} directions" if sizes else "no directions"
        raise InputError(f"the heads have {counts}: give every head the same number")
    with autocast_disabled(contributions.codes):
        parts = [contributions.head(*pair) @ own.to(contributions.codes).T for pair, own in rows.items()]
    return torch.stack(parts, 1)


def _rows(directions: Directions, contributions: Contributions) -> Tensor:
    rows = directions.directions if isinstance(directions, TextSpan) else directions
    width = contributions.embedding.shape[1]
    if rows.ndim != 2 or rows.shape[1] != width:
        raise InputError(f"directions have shape {list(rows.shape)}, expected [directions, {width}]")
    return rows


def head_overlaps(moments: Moments) -> Tensor:
    """How alike the covariances of what any two heads write are: the head-orthogonality matrix.

    Args:
        moments: of at least two images.

    Returns:
        ``[G, G]`` in the order of ``moments.heads()``, float64: ``<C_i, C_j>_F / (‖C_i‖_F ‖C_j‖_F)``, 0 for heads that
        never vary along a common direction, 1 on the diagonal. A head that does not vary at all has 0 everywhere.

    Raises:
        InputError: fewer than two images.
    """
    spans = moments.spans()
    products = _products(spans.axes.transpose(1, 2) @ spans.factor)
    norm = products.diagonal().sqrt()
    return _shares(products, norm[:, None] * norm)


def subspace_overlaps(moments: Moments, rank: int | None = None) -> Tensor:
    """How much the spaces that two heads write into share: the mean squared cosine of their principal angles.

    Args:
        moments: of at least two images.
        rank: how many dimensions of each head's outputs count, the largest first; all above rounding for None. Two
            random spaces of that rank share about ``rank / D``.

    Returns:
        ``[G, G]`` in the order of ``moments.heads()``, float64: over the principal angles of the smaller space, so 1
        where one space holds the other and 0 where they are orthogonal. The spaces are those of the uncentred outputs,
        as TEXTSPAN's are. A head that writes nothing has 0 everywhere.

    Raises:
        InputError: fewer than two images, or a rank below one.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, expected at least 1")
    spans = moments.spans(rank)
    ranks = torch.tensor(spans.ranks, dtype=spans.axes.dtype, device=spans.axes.device)
    return _shares(_products(spans.axes.transpose(1, 2)), torch.minimum(ranks[:, None], ranks))


def _products(factors: Tensor) -> Tensor:
    """``<F_i F_iᵀ, F_j F_jᵀ>`` of all pairs, ``[G, G]``, from ``F`` ``[G, D, R]``.

    Rows of all ``F_i F_iᵀ`` are made a few at a time and multiplied at once. Never are all ``G`` matrices in memory,
    and it takes ``G² D²`` products where pairs of factors would take ``G² R² D``; symmetry halves it.
    """
    groups, width, _ = factors.shape
    step = max(1, min(width, _ENTRIES // max(groups * width, 1)))
    products = factors.new_zeros(groups, groups)
    for start in range(0, width, step):
        rows = factors[:, start : start + step] @ factors[:, start:].transpose(1, 2)  # [G, step, D − start]
        rows[:, :, rows.shape[1] :] *= 2**0.5  # what lies right of the diagonal block counts for its mirror too
        flat = rows.flatten(1)
        products.addmm_(flat, flat.T)
    return products


def _shares(products: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, products / whole, 0)
