"""Inputs of the TEXTSPAN benchmark, and the published algorithm that works on the outputs of a head.

The tower has the heads, widths and weights of a ViT-L-14, on which the time of TEXTSPAN depends, but its images are one
patch, so that a thousand of them take seconds.
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
HEAD = (21, 5)  # the head whose outputs are kept
GAP = 1e-4  # relative difference in variance below which either of two texts may be picked


@dataclass(frozen=True)
class Subject:
    """Moments of every head of the tower, and the outputs of one head on the same images.

    Attributes:
        moments: moments of all heads.
        outputs: outputs of :data:`HEAD`, ``[K, D]``.
        texts: text features, ``[T, D]``, float32.
    """

    moments: Moments
    outputs: Tensor
    texts: Tensor


def subject(images: int, batch: int = 50) -> Subject:
    """Random weights, noise images, and random texts with a common component, as in CLIP."""
    torch.manual_seed(0)
    visual = VisionTransformer(
        image_size=14, patch_size=14, width=1024, layers=LAYERS, heads=HEADS, mlp_ratio=4.0, output_dim=EMBED_DIM
    ).eval()
    cases.randomize(visual)
    model = clipfast.wrap(visual)
    pixels = cases.noise(visual, images)
    moments, outputs = Moments(model), []
    for start in range(0, images, batch):
        contributions = model.decompose(pixels[start : start + batch])
        moments.update(contributions)
        outputs.append(contributions.head(*HEAD))
    return Subject(moments, torch.cat(outputs), texts(TEXTS, EMBED_DIM))


def texts(count: int, width: int) -> Tensor:
    """Unit features, ``[count, width]``; half of the squared norm of each is common to all."""
    common = cases.unit_texts(width, count=1, seed=3)
    return cases.unit(cases.unit_texts(width, count=count) + common)


def on_outputs(outputs: Tensor, features: Tensor, size: int, rank: int) -> list[int]:
    """TEXTSPAN as in arXiv 2310.05916 (algorithm 1), which projects outputs ``[K, D]`` and texts ``[T, D]``."""
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
    """A copy of the moments without cached results."""
    copy = Moments(backend=backend)
    copy.merge(moments)
    return copy


def largest_miss(features: Tensor, factor: Tensor, picks: list[int], floor: float = 1e-9) -> float:
    """The largest relative difference between the variance of a pick and that of the best text, in float64.

    Args:
        features: ``[T, R]`` in coordinates of the head's span.
        factor: ``[R, R]``.
        picks: in the order they were made.
        floor: fraction of the first pick's variance below which rounding decides the pick, and the check stops.
    """
    residual, covariance = features.double(), factor.double() @ factor.double().T
    first, worst = 0.0, 0.0
    for pick in picks:
        variance = ((residual @ covariance) * residual).sum(1)
        best = float(variance.max())
        first = first or best
        if best < floor * first:
            break
        worst = max(worst, 1 - float(variance[pick]) / best)
        direction = residual[pick] / residual[pick].norm()
        residual = residual - torch.outer(residual @ direction, direction)
        projector = torch.eye(len(direction), dtype=residual.dtype) - torch.outer(direction, direction)
        covariance = projector @ covariance @ projector
    return worst


def misses(spans: HeadSpans, features: Tensor, results: list[TextSpan], groups: list[int]) -> float:
    """:func:`largest_miss` over some of the heads."""
    return max(
        largest_miss(features.double() @ spans.axes[group].T, spans.factor[group], list(results[group].picks))
        for group in groups
    )
