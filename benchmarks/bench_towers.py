"""The speed of a decomposed forward against the plain forward, for models of other packages.

Decomposed: ``Model.decompose(images, texts=[16, D], attention=True)`` and ``.heads()``; before SigLIP's attention pool
every term of the blocks, ``depth="all"``. Plain: the module's own forward under ``torch.inference_mode()``. Float32,
batch 8, two threads.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import tower_cases
from benchmarks.cases import difference, instructions, unit
from benchmarks.results import Results
from clipfast.bench.checks import BOUNDS
from clipfast.bench.measuring import Bar, Check, compare
from clipfast.bench.memory import peak_memory

QUESTION = "towers"
SENTENCE = "Is a decomposed forward of another package's model faster than that package's plain forward?"
BATCH = 8
SPEED, MEMORY = 1.0, 1.1
"""Least speed and largest peak memory of the process, relative to the plain forward."""
UPSTREAM_TIME, UPSTREAM_MEMORY = 1.5, 2.0
"""Largest time and peak memory of every term before an attention pool, relative to the plain forward."""
BOUND = BOUNDS[torch.float32]


@pytest.mark.parametrize("name", tower_cases.MODELS)
def test_decomposed(
    benchmark: BenchmarkFixture, name: str, results: Results, settings: dict[str, Any], pairs: int, say: Any
) -> None:
    module, model, images, texts = tower_cases.start(name, BATCH, settings["threads"])

    def verify() -> list[Check]:
        contributions, heads = tower_cases.explain(model, images, texts)
        own = unit(model.encode_image(images, normalize=False))
        scores = (heads.sum((1, 2)) @ texts.T, contributions.maps.sum(1))
        return [
            Check("embedding against the module's own", difference(unit(contributions.embedding), own), BOUND),
            Check("sum of all terms against the embedding", contributions.max_error(), BOUND),
            Check("maps summed over tokens against the heads' scores", difference(*scores), BOUND),
        ]

    _measure(
        name,
        lambda: tower_cases.explain(model, images, texts),
        lambda: tower_cases.plain(module, images),
        verify,
        ("explain", 1 / SPEED, MEMORY),
        results,
        settings,
        pairs,
        say,
    )
    benchmark.pedantic(lambda: tower_cases.explain(model, images, texts), rounds=1)  # type: ignore[no-untyped-call]


def test_upstream(
    benchmark: BenchmarkFixture, results: Results, settings: dict[str, Any], pairs: int, say: Any
) -> None:
    name = "SigLIP B/16"
    module, model, images, _ = tower_cases.start(name, BATCH, settings["threads"])

    def verify() -> list[Check]:
        contributions, _ = tower_cases.upstream(model, images)
        own = unit(model.encode_image(images, normalize=False))
        return [
            Check("embedding against the module's own", difference(unit(contributions.embedding), own), BOUND),
            Check("sum of all terms against the embedding", contributions.max_error(), BOUND),
        ]

    _measure(
        f"{name}, every term before its pool",
        lambda: tower_cases.upstream(model, images),
        lambda: tower_cases.plain(module, images),
        verify,
        ("upstream", UPSTREAM_TIME, UPSTREAM_MEMORY),
        results,
        settings,
        pairs,
        say,
    )
    benchmark.pedantic(lambda: tower_cases.upstream(model, images), rounds=1)  # type: ignore[no-untyped-call]


def _measure(
    case: str,
    decomposed: Callable[[], object],
    plain: Callable[[], object],
    verify: Callable[[], list[Check]],
    bars: tuple[str, float, float],
    results: Results,
    settings: dict[str, Any],
    pairs: int,
    say: Any,
) -> None:
    """Compares, writes the result and prints it."""
    kind, most_time, most_memory = bars
    name = case.partition(",")[0]
    arguments = {"name": name, "batch": BATCH, "threads": settings["threads"]}
    comparison = compare(decomposed, plain, verify, count=pairs, warmup=1)
    memory = (
        peak_memory(f"benchmarks.tower_cases:{kind}_call", **arguments),
        peak_memory("benchmarks.tower_cases:plain_call", **arguments),
    )
    limits = (
        Bar(f"{case}: times as fast as plain", comparison.ratio, 1 / most_time, at_least=True),
        Bar(f"{case}: peak memory over plain", memory[0].peak_mb / memory[1].peak_mb, most_memory, at_least=False),
    )
    results.compared(
        case,
        comparison,
        a="decomposed",
        b="plain",
        settings=arguments | {"texts": tower_cases.TEXTS} | instructions(),
        memory=memory,
        bars=limits,
    )
    say(*limits, f"largest error {comparison.error:.1e}")
