"""Naming heads without data: the directions that a head's weights can write, pursued by the same texts.

A head writes ``x̂ · W_VO`` of a normalised token ``x̂``, where ``W_VO = γ W_V W_O γ' P`` holds the LayerNorm before the
attention, the head's values and its way out to the embedding. Were tokens white, its outputs had the covariance
``W_VOᵀ W_VO``, whose axes and spreads are the singular vectors and values of ``W_VO``: TEXTSPAN pursues that one in
place of the covariance over images. Source of the decomposition by SVD: arXiv 2603.24653.

``H`` heads of a layer, ``E`` head_dim, ``W`` width of the residual stream, ``D`` embed_dim, ``T`` texts.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from clipfast.analyses import spans as spanning
from clipfast.analyses import textspan as pursuit
from clipfast.analyses.spans import HeadSpans
from clipfast.analyses.textspan import Method, TextSpan
from clipfast.basis import Basis
from clipfast.errors import InputError
from clipfast.indices import resolve_heads
from clipfast.towers.tower import Block, Tower


class HasWeights(Protocol):
    """A model with a vision tower and the basis of its contributions."""

    backend: str

    @property
    def tower(self) -> Tower:
        """The vision tower."""

    def basis(self) -> Basis:
        """The model's part of every contribution."""


@torch.no_grad()
def weight_spans(
    model: HasWeights, heads: Sequence[tuple[int, int]] | None = None, rank: int | None = None
) -> HeadSpans:
    """Where the outputs of heads would vary if tokens were white, by the singular vectors of each ``W_VO``.

    Args:
        model: the model.
        heads: (layer, head) pairs, layers negative from the end; all heads for None.
        rank: how many singular vectors count, the largest first; all above rounding for None.

    Returns:
        One per head, in the order asked for; ``mean`` is zero, as nothing is known of it.

    Raises:
        InputError: no such head, or a rank below one.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}, expected at least 1")
    tower = model.tower
    if special := tower.special():
        raise InputError(f"spans of weights are for vision transformers as CLIP's, and this has {', '.join(special)}")
    basis = model.basis()
    pairs = _resolve(tower, heads)
    share = spanning.noise(tower.dtype)
    spans = {}
    for layer in sorted({layer for layer, _ in pairs}):
        block = tower.blocks[layer]
        values = block.query_key_value()[2].weight.detach().double() * _norm_weight(block)
        values = values - values.mean(1, keepdim=True)  # the LayerNorm before takes every token's mean away
        codes = values.unflatten(0, (tower.heads, -1))  # [H, E, W]
        covariance = codes @ codes.transpose(1, 2)
        spans[layer] = spanning.of_codes(basis.values(layer).double(), covariance, covariance, share, rank)
    rows = [(spans[layer], head) for layer, head in pairs]
    axes = torch.stack([layer[0][head] for layer, head in rows])
    return HeadSpans(
        axes=axes,
        factor=torch.stack([layer[1][head] for layer, head in rows]),
        mean=axes.new_zeros(len(rows), basis.columns),
        ranks=tuple(layer[2][head] for layer, head in rows),
        notes=tuple(layer[3][head] for layer, head in rows),
        noise=share,
    )


def weight_textspan(
    model: HasWeights,
    text_features: Tensor,
    size: int,
    heads: Sequence[tuple[int, int]] | None = None,
    *,
    rank: int | None = None,
    method: Method = "greedy",
) -> dict[tuple[int, int], TextSpan]:
    """The texts that span what each head's weights can write, without any image.

    Args:
        model: the model.
        text_features: ``[T, D]``.
        size: how many texts to pick per head.
        heads: (layer, head) pairs, layers negative from the end; all heads for None.
        rank: how many singular vectors count; all above rounding for None.
        method: ``"greedy"`` or ``"omp"``, see :func:`clipfast.textspan`.

    Returns:
        A :class:`.TextSpan` per (layer, head), in the order asked for. ``explained`` and ``variance`` are shares of
        ``‖W_VO‖²``; ``mean`` is zero.

    Raises:
        InputError: texts of another width, no such head, or a method that needs the outputs.
    """
    pursuit.check_texts(text_features, model.tower.embed_dim)
    pursuit.check_size(size)
    if pursuit.check_method(method) == "somp":
        raise InputError("somp sums absolute projections of outputs: without images choose greedy or omp")
    pairs = _resolve(model.tower, heads)
    spans = weight_spans(model, pairs, rank)
    return dict(zip(pairs, pursuit.pursue(spans, text_features, size, method, model.backend), strict=True))


def _norm_weight(block: Block) -> Tensor:
    assert block.ln_1 is not None
    return block.ln_1.weight.detach().double()


def _resolve(tower: Tower, heads: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """(layer, head) pairs with layers counted from 0; all heads for None."""
    if heads is None:
        return [(layer, head) for layer in range(tower.layers) for head in range(tower.heads)]
    return resolve_heads(heads, tower.layers, tower.heads)
