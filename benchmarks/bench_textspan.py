"""The speed of TEXTSPAN for every head of a ViT-L-14.

All heads are computed in one call from moments, without cached results. This is compared with the published algorithm,
which works on the outputs of all images one head at a time, and with the same operations in plain torch.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import spanning
from benchmarks.cases import relative
from benchmarks.results import Results
from benchmarks.spanning import SIZE, TEXTS, Subject
from clipfast.analyses.spans import of_outputs
from clipfast.bench.measuring import Bar, Check, compare
from clipfast.kernels import native, ops

QUESTION = "textspan"
SENTENCE = "How long do the texts that span every head take?"
IMAGES = 1000
PUBLISHED = {"images": 50_000, "heads": spanning.LAYERS * spanning.HEADS}
"""Size that the time of the published algorithm is extrapolated to."""
SECONDS, TIMES = 5.0, 1000.0
"""Most seconds for all heads, and least speed relative to the published algorithm."""

pytestmark = pytest.mark.skipif(bool(native.unsupported_reasons()), reason="; ".join(native.unsupported_reasons()))


@pytest.fixture(scope="module")
def subject(settings: dict[str, Any]) -> Subject:
    torch.set_num_threads(settings["threads"])
    return spanning.subject(IMAGES)


def test_all_heads(
    benchmark: BenchmarkFixture, subject: Subject, results: Results, settings: dict[str, Any], pairs: int, say: Any
) -> None:
    def spanned(backend: str) -> list[Any]:
        return list(spanning.fresh(subject.moments, backend).textspan(subject.texts, SIZE).values())

    def verify() -> list[Check]:
        spans, groups = subject.moments.spans(), list(range(0, PUBLISHED["heads"], 24))
        return [
            Check(f"best text missed, {backend}", spanning.misses(spans, subject.texts, results, groups), spanning.GAP)
            for backend, results in (("native", spanned("native")), ("eager", spanned("eager")))
        ]

    comparison = compare(lambda: spanned("native"), lambda: spanned("eager"), verify, count=pairs, warmup=0)
    median = comparison.to_json("native", "eager")["a"]["seconds"]["median"]
    bar = Bar("seconds for all heads of a ViT-L-14", median, SECONDS, at_least=False)
    shape = {"heads": PUBLISHED["heads"], "texts": TEXTS, "size": SIZE, "embed_dim": spanning.EMBED_DIM}
    results.compared("all heads", comparison, a="native", b="eager", settings=shape | settings, bars=(bar,))
    say(bar, f"{comparison.ratio:.3g} times as fast as eager, best text missed by {comparison.error:.1e}")
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(spanned, args=("native",), rounds=3)  # type: ignore[no-untyped-call]


def test_against_the_outputs(
    benchmark: BenchmarkFixture, subject: Subject, results: Results, settings: dict[str, Any], pairs: int, say: Any
) -> None:
    """All heads from moments against the outputs of one head; the latter's time is scaled to all heads and images."""
    spans = of_outputs(subject.outputs, None)
    rank, features = spans.ranks[0], subject.texts.double() @ spans.axes[0].T

    def on_outputs() -> list[int]:
        return spanning.on_outputs(subject.outputs, subject.texts, SIZE, rank)

    def verify() -> list[Check]:
        span = subject.moments.textspan(subject.texts, SIZE, heads=[spanning.HEAD])[spanning.HEAD]
        sides = (("moments", list(span.picks)), ("outputs", on_outputs()))
        return [
            # Late picks have little variance left, where the published algorithm rounds more: compare the first thirty.
            Check(
                f"best text missed, {name}", spanning.largest_miss(features, spans.factor[0], picks[:30]), spanning.GAP
            )
            for name, picks in sides
        ]

    comparison = compare(
        lambda: spanning.fresh(subject.moments, "native").textspan(subject.texts, SIZE),
        on_outputs,
        verify,
        count=pairs,
        warmup=0,
    )
    factor = PUBLISHED["heads"] * PUBLISHED["images"] / IMAGES
    times = comparison.ratio * factor
    name = "all heads from moments, against the outputs of 50,000 images (extrapolated)"
    bar = Bar(
        f"times as fast as on the outputs of {PUBLISHED['images']} images, extrapolated", times, TIMES, at_least=True
    )
    shape = {
        "texts": TEXTS,
        "size": SIZE,
        "embed_dim": spanning.EMBED_DIM,
        "extrapolated": {
            "measured": f"b: one head, {IMAGES} images; a: all {PUBLISHED['heads']} heads",
            "to": PUBLISHED,
            "factor": factor,
            "how": "b is taken to grow linearly in heads and in images",
            "left out": "the pass over the images, which both need: for outputs, or for moments of them",
        },
    }
    results.compared(
        name,
        comparison,
        a="all heads from moments",
        b=f"one head, outputs of {IMAGES} images",
        settings=shape | settings,
        bars=(bar,),
    )
    say(bar, f"measured {comparison.ratio:.3g} against one head of {IMAGES} images")
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(on_outputs, rounds=1)  # type: ignore[no-untyped-call]


def random_heads(heads: int, rank: int) -> tuple[Tensor, Tensor]:
    """Texts and factors of heads whose standard deviations fall to a hundredth."""
    generator = torch.Generator().manual_seed(4)
    texts = torch.randn(heads, TEXTS, rank, generator=generator)
    covariance = torch.randn(heads, 1000, rank, generator=generator) * 0.93 ** torch.arange(rank)
    covariance = covariance.transpose(1, 2) @ covariance / 1000
    return texts / texts.norm(dim=2, keepdim=True), torch.linalg.cholesky(covariance)


@pytest.mark.parametrize("heads", [4, 144])
def test_span(
    benchmark: BenchmarkFixture, heads: int, results: Results, settings: dict[str, Any], pairs: int, say: Any
) -> None:
    torch.set_num_threads(settings["threads"])
    texts, factor = random_heads(heads, 64)

    def spanned(backend: str) -> Tensor:
        return ops.span(texts, factor, SIZE, backend=backend)[0]

    def verify() -> list[Check]:
        return [
            Check(
                f"best text missed, {backend}",
                max(
                    spanning.largest_miss(texts[head], factor[head], picks[head].tolist())
                    for head in range(0, heads, max(1, heads // 4))
                ),
                spanning.GAP,
            )
            for backend, picks in (("native", spanned("native")), ("eager", spanned("eager")))
        ]

    comparison = compare(lambda: spanned("native"), lambda: spanned("eager"), verify, count=pairs)
    seconds = comparison.to_json("native", "eager")["a"]["seconds"]["median"]
    bars = {
        4: Bar("span of 4 heads: times as fast as eager", comparison.ratio, 8.0, at_least=True),
        144: Bar("span of 144 heads: seconds", seconds, 1.0, at_least=False),
    }
    shape = {"heads": heads, "texts": TEXTS, "rank": 64, "size": SIZE, "dtype": "float32"}
    results.compared(
        f"span of {heads} heads", comparison, a="native", b="eager", settings=shape | settings, bars=(bars[heads],)
    )
    say(bars[heads], f"{comparison.ratio:.3g} times as fast as eager, {seconds:.3g} s")
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(spanned, args=("native",), rounds=3)  # type: ignore[no-untyped-call]


def test_moments(benchmark: BenchmarkFixture, results: Results, settings: dict[str, Any], pairs: int, say: Any) -> None:
    torch.set_num_threads(settings["threads"])
    heads, batch = PUBLISHED["heads"], 64
    generator = torch.Generator().manual_seed(5)
    codes, shared, centre = (
        torch.randn(*shape, generator=generator) for shape in ((batch, heads, 64), (batch, 3), (heads, 67))
    )

    def accumulate(backend: str) -> Callable[[], tuple[Tensor, Tensor]]:
        total, second = (torch.zeros(heads, *[67] * axes, dtype=torch.float64) for axes in (1, 2))

        def add() -> tuple[Tensor, Tensor]:
            ops.moments(codes, shared, centre, total, second, backend=backend)
            return total, second

        return add

    def verify() -> list[Check]:
        return [
            Check(name, relative(result, expected), 1e-12)
            for name, result, expected in zip(
                ("total", "second"), accumulate("native")(), accumulate("eager")(), strict=True
            )
        ]

    comparison = compare(accumulate("native"), accumulate("eager"), verify, count=pairs)
    shape = {"images": batch, "heads": heads, "entries": 64, "shared": 3, "dtype": "float32"}
    results.compared("moments", comparison, a="native", b="eager", settings=shape | settings)
    say(f"moments: {comparison.ratio:.3g} times as fast as eager")
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(accumulate("native"), rounds=3)  # type: ignore[no-untyped-call]
