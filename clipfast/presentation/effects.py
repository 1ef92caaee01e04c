"""Direct effects of terms: the similarity with a text, or with the embedding itself, as a sum over terms.

``B`` images, ``L`` layers kept, ``H`` heads, ``D`` embed_dim, ``T`` texts.
"""

import torch
from torch import Tensor

from clipfast.basis import autocast_disabled
from clipfast.contributions import Contributions, Scores
from clipfast.errors import InputError


def shares(contributions: Contributions) -> Scores:
    """What every term adds to ``embedding / norm``: its product with that unit vector.

    Returns:
        :class:`.Scores` with ``T = 1``; the terms of an image sum to 1.
    """
    scale = 1 / (contributions.std * contributions.norm)
    with torch.no_grad(), autocast_disabled(contributions.codes):
        unit = contributions.embedding.to(contributions.norm) / contributions.norm[:, None]  # [B, D]
        residual = torch.einsum("bkd,bd->bk", contributions.start_and_mlps(), unit)
        constants = contributions.basis.constants(contributions.mean, contributions.std, contributions.layers)
        heads = contributions.codes.new_empty(contributions.codes.shape[:3])  # [B, L, H]
        for position, layer in enumerate(contributions.layers):
            folded = torch.einsum("hed,bd->bhe", contributions.basis.values(layer), unit)
            constant = (constants[:, position] * unit).sum(1) * scale  # [B]
            heads[:, position] = (contributions.codes[:, position] * folded).sum(-1) + constant[:, None]
        rest = (contributions.rest * unit).sum(1)
    return Scores(start=residual[:, :1], heads=heads[..., None], mlps=residual[:, 1:, None], rest=rest[:, None])


def in_order(contributions: Contributions, scores: Scores) -> Tensor:
    """Scores ``[B, terms, T]`` in the order of :attr:`.Contributions.terms`."""
    parts = [scores.start[:, None]]
    for layer in range(contributions.basis.layers):
        if layer in contributions.layers:
            parts.append(scores.heads[:, contributions.layers.index(layer)])
        parts.append(scores.mlps[:, layer : layer + 1])
    if contributions.terms[-1] == "rest":
        parts.append(scores.rest[:, None])
    return torch.cat(parts, 1)


def check_features(text_features: object) -> Tensor:
    """``text_features`` if it is a tensor, else an :class:`InputError` that says what to give."""
    if not isinstance(text_features, Tensor):
        raise InputError(
            f"text_features is a {type(text_features).__name__}: give features [texts, embed_dim], such as "
            "model.encode_text(texts)"
        )
    return text_features
