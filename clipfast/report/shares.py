"""How the terms of an embedding add up to its similarity with a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clipfast.contributions import Contributions

MOST_TEXTS = 11
"""Number of texts shown for one image: those with the highest scores."""

_SMALLEST = 0.01


@dataclass(frozen=True)
class TextShares:
    """The cosine similarity of one image with one text, as a sum over terms.

    ``score = start + Σ attention + Σ mlps + rest`` up to rounding.

    Attributes:
        text: the text.
        score: cosine similarity of image and text.
        start: the share of the start of the residual stream.
        layers: the layers of the model that ``attention`` and ``heads`` cover.
        attention: the sum over the heads of each of those layers.
        mlps: the share of the MLP of every layer of the model.
        rest: the attention of all layers that were not kept.
        heads: ``[layer][head]``, the share of each head of ``layers``.
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
        """``part`` as a fraction of the score, or None where the score is too close to 0 for a fraction."""
        return part / self.score if abs(self.score) >= _SMALLEST else None

    def top_heads(self, count: int) -> list[tuple[int, int, float]]:
        """The heads with the largest absolute shares: (layer, head, share)."""
        every = [
            (layer, head, score)
            for layer, row in zip(self.layers, self.heads, strict=True)
            for head, score in enumerate(row)
        ]
        return sorted(every, key=lambda entry: (-abs(entry[2]), entry[:2]))[:count]

    def to_json(self, heads: int = 10) -> dict[str, Any]:
        """The same as JSON, rounded to float32; ``share`` is the fraction of the score."""
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
    """Positions of the texts to show: all of them in order, or the ``most`` highest scores in descending order."""
    order = list(range(len(scores)))
    return order if len(order) <= most else sorted(order, key=lambda text: -scores[text])[:most]


def text_scores(contributions: Contributions, features: Tensor) -> Tensor:
    """Cosine similarities ``[B, T]`` of images with unit-norm text features ``[T, D]``."""
    return (contributions.embedding.to(contributions.norm.dtype) / contributions.norm[:, None]) @ features.to(
        contributions.norm
    ).T


def text_shares(
    contributions: Contributions,
    features: Tensor,
    texts: Sequence[str],
    most: int = MOST_TEXTS,
    scores: Tensor | None = None,
) -> list[list[TextShares]]:
    """The similarity of every image with texts, divided into the shares of terms.

    Args:
        contributions: of ``B`` images.
        features: ``[T, D]``, unit norm.
        texts: ``T`` labels.
        most: the largest number of texts per image, in the order of :func:`best_texts`.
        scores: what :func:`text_scores` gives for these, ``[B, T]``, where it is known already.

    Returns:
        ``[image][text]``.

    Raises:
        InputError: features of another width.
    """
    parts = contributions.scores(features)
    start, heads, mlps, rest = (part.cpu() for part in parts)  # [B, T], [B, L, H, T], [B, layers, T], [B, T]
    similarities = (text_scores(contributions, features) if scores is None else scores).tolist()  # [B, T]
    return [
        [
            TextShares(
                text=texts[column],
                score=similarities[image][column],
                start=float(start[image, column]),
                layers=contributions.layers,
                attention=heads[image, :, :, column].sum(1).tolist(),
                mlps=mlps[image, :, column].tolist(),
                rest=float(rest[image, column]),
                heads=heads[image, :, :, column].tolist(),
            )
            for column in best_texts(similarities[image], most)
        ]
        for image in range(len(contributions))
    ]
