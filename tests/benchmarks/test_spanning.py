"""The published algorithm in the TEXTSPAN benchmark, and the check of its picks."""

import torch
from torch import Tensor

import clipfast
from benchmarks import spanning
from clipfast.analyses.spans import of_outputs


def outputs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(200, 12, generator=generator, dtype=torch.float64) * 0.8 ** torch.arange(12)
    return weights @ torch.randn(12, 32, generator=generator, dtype=torch.float64) + 1


def test_published_algorithm_makes_the_same_picks() -> None:
    data, features = outputs(), spanning.texts(100, 32).double()
    span = clipfast.textspan(data, features, 8)
    assert spanning.on_outputs(data, features, 8, span.rank) == list(span.picks)


def test_wrong_pick_exceeds_the_bound() -> None:
    data, features = outputs(), spanning.texts(100, 32).double()
    spans, picks = of_outputs(data, None), list(clipfast.textspan(data, features, 8).picks)
    inside = features @ spans.axes[0].T
    assert spanning.largest_miss(inside, spans.factor[0], picks) <= spanning.GAP
    picks[5] = next(text for text in range(100) if text not in picks)
    assert spanning.largest_miss(inside, spans.factor[0], picks) > 100 * spanning.GAP
