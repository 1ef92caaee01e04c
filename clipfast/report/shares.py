"""How the terms of an embedding add up to its similarity with a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clipfast.contributions import Contributions

MOST_TEXTS = 11
"""Texts shown of one image; of more, those with the highest scores."""

_SMALLEST = 0.01


@dataclass(frozen=True)
class TextShares:
    """One image's cosine similarity with one text, as a sum over terms.

    ``score = start + Σ attention + Σ mlps + rest`` up to rounding.

    Attributes:
        text: what was compared with.
        score: cosine similarity of image and text.
        start: what the residual stream held before the first layer.
        layers: the layers of the model that ``attention`` and ``heads`` are about.
        attention: of each of those layers, its heads together.
        mlps: of every layer of the model.
        rest: attention of the layers that were not kept, together.
        heads: ``[layer][head]``, of each head of ``layers``.
    """

    text: str
    score: float
    start: float
    layers: tuple[int, ...]
    attention: list[float]
    mlps: list[float]
    rest: float
    heads: list[list[float]]

    def share(self, part: float) -> float | None:
        """``part`` as a fraction of the score, or None where the score is too near 0 to divide by."""
        return part / self.score if abs(self.score) >= _SMALLEST else None

    def top_heads(self, count: int) -> list[tuple[int, int, float]]:
        """The heads that move the score most, up or down: (layer, head, score)."""
        every = [
            (layer, head, score)
            for layer, row in zip(self.layers, self.heads, strict=True)
            for head, score in enumerate(row)
        ]
        return sorted(every, key=lambda found: (-abs(found[2]), found[:2]))[:count]

    def to_json(self, heads: int = 10) -> dict[str, Any]:
        """Plain numbers, rounded to what float32 holds; ``share`` is the fraction of the score."""
        return {
            "text": self.text,
            "score": rounded(self.score),
            "start": rounded(self.start),
            "attention": {str(layer): rounded(part) for layer, part in zip(self.layers, self.attention, strict=True)},
            "mlps": [rounded(part) for part in self.mlps],
            "rest": rounded(self.rest),
            "top_heads": [
                {"layer": layer, "head": head, "score": rounded(part), "share": _maybe_rounded(self.share(part))}
                for layer, head, part in self.top_heads(heads)
            ],
        }


def rounded(value: float) -> float:
    """A float to seven significant digits."""
    return float(f"{value:.7g}")


def _maybe_rounded(value: float | None) -> float | None:
    return None if value is None else rounded(value)


def best_texts(scores: Sequence[float], most: int) -> list[int]:
    """Which texts to show: all in the order given, or of too many the ``most`` best, highest score first."""
    order = list(range(len(scores)))
    return order if len(order) <= most else sorted(order, key=lambda text: -scores[text])[:most]


def text_scores(found: Contributions, features: Tensor) -> Tensor:
    """Cosine similarities ``[B, T]`` of images with unit-norm text features ``[T, D]``."""
    return (found.embedding.to(found.norm.dtype) / found.norm[:, None]) @ features.to(found.norm).T


def text_shares(
    found: Contributions,
    features: Tensor,
    texts: Sequence[str],
    most: int = MOST_TEXTS,
    scores: Tensor | None = None,
) -> list[list[TextShares]]:
    """Takes every image's similarity with texts apart.

    Args:
        found: of ``B`` images.
        features: ``[T, D]``, unit norm.
        texts: ``T`` labels.
        most: of more texts than that, only the best of each image, in the order of :func:`best_texts`.
        scores: what :func:`text_scores` gives for these, ``[B, T]``, where it is known already.

    Returns:
        ``[image][text]``.

    Raises:
        InputError: features of another width.
    """
    parts = found.scores(features)
    start, heads, mlps, rest = (part.cpu() for part in parts)  # [B, T], [B, L, H, T], [B, layers, T], [B, T]
    similarities = (text_scores(found, features) if scores is None else scores).tolist()  # [B, T]
    return [
        [
            TextShares(
                text=texts[column],
                score=similarities[image][column],
                start=float(start[image, column]),
                layers=found.layers,
                attention=heads[image, :, :, column].sum(1).tolist(),
                mlps=mlps[image, :, column].tolist(),
                rest=float(rest[image, column]),
                heads=heads[image, :, :, column].tolist(),
            )
            for column in best_texts(similarities[image], most)
        ]
        for image in range(len(found))
    ]
