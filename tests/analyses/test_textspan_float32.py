"""Texts in float32: coordinates rounded to float32 pick the texts that float64 picks, and nothing else depends on them.

The picks are followed in float64: at each of them no other text may explain more than 1e-4 more. That holds while texts
explain at least 1e-9 of the first pick's variance; the features' own rounding to float32 decides between those below.
"""

import pytest
import torch
from measures import error
from tolerances import FLOAT64
from torch import Tensor

from clipfast.analyses.spans import HeadSpans
from clipfast.analyses.textspan import TextSpan, pursue
from clipfast.kernels.dispatch import BACKENDS

GAP = 1e-4  # of two texts that are closer than this either may be picked
WIDTH, RANK, TEXTS, SIZE = 512, 48, 1000, 48
NOISE = 1e-12


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


class Drawn:
    """A head whose deviations fall by ``decay`` from axis to axis, and texts for it."""

    def __init__(self, decay: float) -> None:
        self.generator = torch.Generator().manual_seed(5)
        self.axes = torch.linalg.qr(self.normal(WIDTH, RANK))[0].T
        covariance = torch.cov((self.normal(2000, RANK) * decay ** torch.arange(RANK)).T)
        factor = torch.linalg.cholesky(covariance)
        mean = self.normal(WIDTH)
        self.spans = HeadSpans(self.axes[None], factor[None], mean[None], (RANK,), ((),), NOISE)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def some(self, count: int) -> Tensor:
        return torch.randint(count, (TEXTS,), generator=self.generator)

    def random(self, alike: float) -> Tensor:
        """Texts that share ``alike`` of their square with all others, as CLIP's do."""
        return unit(self.normal(TEXTS, WIDTH)) * (1 - alike) ** 0.5 + unit(self.normal(1, WIDTH)) * alike**0.5

    def near(self, apart: float) -> Tensor:
        """Two hundred texts, each five times, so far apart."""
        return unit(self.normal(200, WIDTH)).repeat(TEXTS // 200, 1) + apart * unit(self.normal(TEXTS, WIDTH))

    def aligned(self, apart: float) -> Tensor:
        """Texts along the head's axes: what they explain falls as the variances do."""
        return self.axes[self.some(RANK)] + apart * unit(self.normal(TEXTS, WIDTH))

    def composed(self, apart: float) -> Tensor:
        """Sums of two of thirty words: after thirty picks so much is left of every text, and the head varies on."""
        words = unit(self.normal(30, WIDTH))
        return words[self.some(30)] + words[self.some(30)] + apart * unit(self.normal(TEXTS, WIDTH))


def misses(spans: HeadSpans, features: Tensor, result: TextSpan) -> list[float]:
    """By which share each pick misses the best."""
    left, covariance = features.double() @ spans.axes[0].T, spans.factor[0] @ spans.factor[0].T
    missed = []
    for pick in result.picks:
        variance = ((left @ covariance) * left).sum(1)
        best = float(variance.max())
        missed.append((best - float(variance[pick])) / best)
        direction = unit(left[pick])
        left = left - torch.outer(left @ direction, direction)
        away = torch.eye(RANK, dtype=torch.float64) - torch.outer(direction, direction)
        covariance = away @ covariance @ away
    return missed


HARD = [
    *[pytest.param("random", alike) for alike in (0.0, 0.9)],
    *[pytest.param("near", apart) for apart in (1e-2, 1e-4, 1e-6)],
    *[pytest.param("aligned", apart) for apart in (1e-1, 1e-3, 1e-5)],
    pytest.param("composed", 1e-3),
]


@pytest.mark.parametrize("decay", [1.0, 0.9, 0.75])
@pytest.mark.parametrize(("kind", "how"), HARD)
def test_the_picks_of_float64(kind: str, how: float, decay: float) -> None:
    drawn = Drawn(decay)
    features = unit(getattr(drawn, kind)(how)).float()
    [result], [exact] = (pursue(drawn.spans, texts, SIZE) for texts in (features, features.double()))
    assert len(result.picks) == len(exact.picks)
    assert max(misses(drawn.spans, features, result)) <= GAP


@pytest.mark.parametrize("method", ["greedy", "omp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_picks_hold_is_exact(method: str, dtype: torch.dtype) -> None:
    """The same features in float64 explain the same to rounding of float64, whatever the picks were found in."""
    drawn = Drawn(0.9)
    features = unit(drawn.random(0.9)).to(dtype)
    [result], [exact] = (
        pursue(drawn.spans, texts, 20, method)  # type: ignore[arg-type]
        for texts in (features, features.double())
    )
    assert result.picks == exact.picks
    assert result.directions.dtype == result.explained.dtype == torch.float64
    assert error(result.directions, exact.directions) <= FLOAT64
    assert error(result.explained, exact.explained) <= FLOAT64
    outputs = drawn.normal(50, WIDTH)
    assert error(result.reconstruct(outputs), exact.reconstruct(outputs)) <= FLOAT64
    inside = unit(
        features[result.picks[0]].double() @ drawn.axes.T
    )  # the first direction is its text's own, not its negative
    assert error(result.directions[0], inside @ drawn.axes) <= FLOAT64


def test_a_pick_that_float64_finds_to_be_noise_is_dropped() -> None:
    """Of the variance along the second text, 0.25 in float32 and 0.25 - 3e-8 in float64, noise is 0.25 - 1.5e-8."""
    below = 1 - 2.9e-8  # 1 in float32
    axes = torch.tensor([[1.0, 0.0], [0.0, below]], dtype=torch.float64)
    factor = torch.tensor([[1.0, 0.0], [0.0, 0.5 * below]], dtype=torch.float64)
    spans = HeadSpans(axes[None], factor[None], torch.zeros(1, 2).double(), (2,), ((),), 0.25 - 2**-26)
    [result] = pursue(spans, torch.eye(2), 2)
    assert result.picks == (0,)
    assert len(result.directions) == len(result.explained) == 1
    [kept] = pursue(spans, torch.diag(torch.tensor([1.0, 1.01])), 2)
    assert kept.picks == (0, 1)


def test_more_heads_than_are_pursued_together() -> None:
    """Alike heads have alike texts, wherever they stand."""
    drawn = Drawn(0.9)
    features = unit(drawn.random(0.5)).float()
    [alone] = pursue(drawn.spans, features, 5)
    many = pursue(drawn.spans.select([0] * 100), features, 5)
    assert len(many) == 100
    for result in many:
        assert result.picks == alone.picks
        assert error(result.directions, alone.directions) <= FLOAT64


@pytest.mark.parametrize("backend", [each.name for each in BACKENDS])
def test_with_every_backend_that_runs_here(backend: str) -> None:
    """Some refuse float64, which the second pursuit is of."""
    refused = next(each for each in BACKENDS if each.name == backend).unsupported_reasons()
    if refused:
        pytest.skip(", ".join(refused))
    drawn = Drawn(0.9)
    features = unit(drawn.random(0.5)).float()
    [result], [expected] = (pursue(drawn.spans, features, 5, backend=each) for each in (backend, "auto"))
    assert result.picks == expected.picks
    assert error(result.directions, expected.directions) <= FLOAT64
