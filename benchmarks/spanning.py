"""What TEXTSPAN is measured on, and what it is compared with: the algorithm on the outputs themselves.

The tower has the shape of a ViT-L-14 but for its images, which are one patch: heads, widths and weights are what
TEXTSPAN's time depends on, and a thousand images take seconds.
"""

from dataclasses import dataclass

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

import clipfast
from benchmarks import cases
from clipfast import Moments
from clipfast.analyses.spans import HeadSpans
from clipfast.analyses.textspan import TextSpan

TEXTS = 3500
SIZE = 60  # texts picked per head
LAYERS, HEADS, EMBED_DIM = 24, 16, 768
HEAD = (21, 5)  # whose outputs are kept
GAP = 1e-4  # of two texts that are closer than this either may be picked


@dataclass(frozen=True)
class Subject:
    """Moments of every head of the tower, and the same images' outputs of one head.

    Attributes:
        moments: of all heads.
        outputs: ``[K, D]`` of :data:`HEAD`.
        texts: ``[T, D]``, float32.
    """

    moments: Moments
    outputs: Tensor
    texts: Tensor


def subject(images: int, batch: int = 50) -> Subject:
    """Random weights, noise for images, random texts that have half of their square in common as CLIP's have."""
    torch.manual_seed(0)
    visual = VisionTransformer(
        image_size=14, patch_size=14, width=1024, layers=LAYERS, heads=HEADS, mlp_ratio=4.0, output_dim=EMBED_DIM
    ).eval()
    cases.randomize(visual)
    model = clipfast.wrap(visual)
    pixels = cases.noise(visual, images)
    moments, outputs = Moments(model), []
    for start in range(0, images, batch):
        found = model.decompose(pixels[start : start + batch])
        moments.update(found)
        outputs.append(found.head(*HEAD))
    return Subject(moments, torch.cat(outputs), texts(TEXTS, EMBED_DIM))


def texts(count: int, width: int) -> Tensor:
    """Unit features, ``[count, width]``, each with half of its square in common with all others."""
    common = cases.unit_texts(width, count=1, seed=3)
    return cases.unit(cases.unit_texts(width, count=count) + common)


def on_outputs(outputs: Tensor, features: Tensor, size: int, rank: int) -> list[int]:
    """TEXTSPAN as arXiv 2310.05916 states it (algorithm 1): outputs ``[K, D]`` and texts ``[T, D]`` shrink."""
    axes = torch.linalg.svd(outputs, full_matrices=False)[2][:rank]
    outputs, features = outputs - outputs.mean(0), features @ axes.T @ axes
    picks = []
    for _ in range(size):
        picks.append(int((outputs @ features.T).var(0).argmax()))
        direction = features[picks[-1]] / features[picks[-1]].norm()
        outputs = outputs - torch.outer(outputs @ direction, direction)
        features = features - torch.outer(features @ direction, direction)
    return picks


def fresh(moments: Moments, backend: str) -> Moments:
    """The same moments with nothing computed from them yet."""
    copied = Moments(backend=backend)
    copied.merge(moments)
    return copied


def largest_miss(features: Tensor, factor: Tensor, picks: list[int], floor: float = 1e-9) -> float:
    """By which share a head's picks miss the best text at most, followed in float64.

    Args:
        features: ``[T, R]`` in coordinates of the head's span.
        factor: ``[R, R]``.
        picks: in their order.
        floor: of the first pick's variance, below which rounding of the features decides.
    """
    left, covariance = features.double(), factor.double() @ factor.double().T
    first, worst = 0.0, 0.0
    for pick in picks:
        variance = ((left @ covariance) * left).sum(1)
        best = float(variance.max())
        first = first or best
        if best < floor * first:
            break
        worst = max(worst, 1 - float(variance[pick]) / best)
        direction = left[pick] / left[pick].norm()
        left = left - torch.outer(left @ direction, direction)
        away = torch.eye(len(direction), dtype=left.dtype) - torch.outer(direction, direction)
        covariance = away @ covariance @ away
    return worst


def misses(spans: HeadSpans, features: Tensor, found: list[TextSpan], groups: list[int]) -> float:
    """:func:`largest_miss` over some of the heads."""
    return max(
        largest_miss(features.double() @ spans.axes[group].T, spans.factor[group], list(found[group].picks))
        for group in groups
    )
