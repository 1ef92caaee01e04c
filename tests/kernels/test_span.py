"""TEXTSPAN where it is hard: variances that fall to 1e-10 of the first, texts that are nearly alike, golden outputs.

A backend's picks are followed in float64: at each of them no other text may explain more than 1e-4 more, and they must
not end before the floor nor go on after it.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from builders import ROOT
from contracting import DEVICES
from torch import Tensor

from clipfast.kernels import dispatch, ops, reference

GOLDEN = ROOT.parent / "shared" / "golden" / "textspan.npz"
GAP = 1e-4  # of two texts that are closer than this either may be picked
FLOOR = 1e-10
BACKENDS = [
    pytest.param(backend.name, id=backend.name)
    for backend in dispatch.BACKENDS
    if backend is dispatch.EAGER or (not backend.unsupported_reasons() and backend.implementation("span") is not None)
]
INTERPRETED = "triton" not in DEVICES


class Drawn:
    """Texts and the factor of a covariance, in float32 as they come out of a model."""

    def __init__(self, seed: int, rank: int, texts: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.rank, self.count = rank, texts
        self.axes = self.turn()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def turn(self) -> Tensor:
        return torch.linalg.qr(self.normal(self.rank, self.rank))[0]

    def factor(self, decay: float, axes: Tensor) -> Tensor:
        """Of the covariance of 2000 outputs whose standard deviation falls by ``decay`` from axis to axis."""
        outputs = (self.normal(2000, self.rank) * decay ** torch.arange(self.rank)) @ axes
        values, vectors = torch.linalg.eigh(torch.cov(outputs.T))
        return (vectors * values.clamp_min(0).sqrt())[None].float()

    def spread(self, decay: float, alike: float) -> tuple[Tensor, Tensor]:
        """Texts in all directions that share ``alike`` of their square with all others, as CLIP's do."""
        unit = torch.nn.functional.normalize
        common, own = unit(self.normal(1, self.rank)), unit(self.normal(self.count, self.rank))
        texts = unit(own * (1 - alike) ** 0.5 + common * alike**0.5)
        return texts[None].float(), self.factor(decay, self.axes)

    def aligned(self, decay: float, noise: float) -> tuple[Tensor, Tensor]:
        """Texts along the axes of the covariance, a thousandth apart: variance falls as the covariance does."""
        texts = self.axes[torch.randint(self.rank, (self.count,), generator=self.generator)]
        texts = texts * (1 + 1e-3 * self.normal(self.count, 1)) + noise * self.normal(self.count, self.rank)
        return texts[None].float(), self.factor(decay, self.axes)

    def shrinking(self, decay: float, texts_decay: float) -> tuple[Tensor, Tensor]:
        """What is left of the texts falls as well, along other axes than the covariance."""
        texts = (self.normal(self.count, self.rank) * texts_decay ** torch.arange(self.rank)) @ self.turn()
        return texts[None].float(), self.factor(decay, self.axes)


def follow(texts: Tensor, factor: Tensor, picks: Tensor) -> Iterator[tuple[float, float]]:
    """Of one head, before each pick: the best variance in float64, and by which share of it the pick misses it."""
    left, covariance = texts[0].double(), factor[0].double() @ factor[0].double().T
    for pick in picks[0].tolist():
        variance = ((left @ covariance) * left).sum(1)
        best = float(variance.max())
        yield best, (best - float(variance[pick])) / best if pick >= 0 else 0.0
        direction = left[pick] / left[pick].norm()
        left = left - torch.outer(left @ direction, direction)
        away = torch.eye(len(direction), dtype=torch.float64) - torch.outer(direction, direction)
        covariance = away @ covariance @ away


def misses(texts: Tensor, factor: Tensor, picks: Tensor) -> list[float]:
    """By which share each pick misses the best; an assertion that it ends where it should."""
    result: list[float] = []
    first = None
    for (best, miss), pick in zip(follow(texts, factor, picks), picks[0].tolist(), strict=True):
        first = best if first is None else first
        if pick < 0:
            assert best <= FLOOR * first * (1 + GAP), "ended too early"
            assert (picks[0, len(result) :] == -1).all()
            return result
        assert best >= FLOOR * first * (1 - GAP), "went on too long"
        result.append(miss)
    return result


def span(backend: str, texts: Tensor, factor: Tensor, size: int) -> Tensor:
    device = DEVICES.get(backend, "cpu")
    picks, variance, _ = ops.span(texts.to(device), factor.to(device), size, backend=backend)
    assert ((variance > 0) == (picks >= 0)).all()
    return picks.cpu()


HARD = [
    *[pytest.param("spread", (decay, alike)) for decay in (0.98, 0.9, 0.7) for alike in (0.0, 0.95, 0.99)],
    *[pytest.param("aligned", (decay, noise)) for decay in (0.9, 0.8, 0.7) for noise in (1e-2, 1e-4, 1e-5)],
    *[pytest.param("shrinking", (decay, falling)) for decay in (1.0, 0.8) for falling in (0.9, 0.8, 0.7)],
]


@pytest.mark.parametrize("rank", [64, 80])
@pytest.mark.parametrize(("kind", "how"), HARD)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.values[0] == "eager" or not INTERPRETED])
def test_picks_are_those_of_float64(backend: str, kind: str, how: tuple[float, float], rank: int) -> None:
    texts, factor = getattr(Drawn(rank, rank, 1000), kind)(*how)
    assert max(misses(texts, factor, span(backend, texts, factor, 60))) <= GAP


SMALL = [("spread", (0.5, 0.99)), ("aligned", (0.5, 1e-5)), ("aligned", (0.4, 1e-4)), ("shrinking", (0.9, 0.5))]


@pytest.mark.parametrize(("kind", "how"), SMALL)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_few_picks_that_fall_fast_are_those_of_float64(backend: str, kind: str, how: tuple[float, float]) -> None:
    """Small enough for an interpreted kernel."""
    texts, factor = getattr(Drawn(0, 20, 300), kind)(*how)
    assert max(misses(texts, factor, span(backend, texts, factor, 20))) <= GAP


def test_float32_would_not_do() -> None:
    """The same texts with ``Y = A L`` kept in float32, ``Y ← Y − (A w)(Lᵀ w)ᵀ``: what the tests above would say."""
    texts, factor = Drawn(64, 64, 1000).aligned(0.7, 1e-5)
    projected, picks, known = texts[0] @ factor[0], [], torch.zeros(0, 64)
    for _ in range(60):
        picks.append(int(projected.square().sum(1).argmax()))
        direction = texts[0, picks[-1]]
        for _ in range(2):
            direction = direction - (direction @ known.T) @ known
        direction = direction / direction.norm()
        known = torch.cat([known, direction[None]])
        projected = projected - torch.outer(texts[0] @ direction, direction @ factor[0])
    followed = follow(texts, factor, torch.tensor([picks]))
    (first, _), *rest = followed
    assert max(miss for best, miss in rest if best > FLOOR * first) > 5 * GAP


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_picks(backend: str) -> None:
    """An independent implementation of the paper, on data: texts on the span of uncentred outputs, centred variance."""
    if not GOLDEN.is_file():
        pytest.skip(f"no golden arrays beside this checkout: {GOLDEN.name}")
    with np.load(GOLDEN) as file:
        outputs, features = (torch.from_numpy(file[name]).double() for name in ("head_outputs", "text_features"))
        rank, expected = int(file["rank"]), file["picks"].tolist()
    span_of_outputs = torch.linalg.svd(outputs, full_matrices=False)[2][:rank]
    inside = outputs @ span_of_outputs.T
    values, vectors = torch.linalg.eigh(torch.cov(inside.T))
    texts, factor = (features @ span_of_outputs.T)[None], (vectors * values.clamp_min(0).sqrt())[None]
    assert reference.span(texts, factor, len(expected), FLOOR)[0].tolist() == [expected]
    assert span(backend, texts.float(), factor.float(), len(expected)).tolist() == [expected]
