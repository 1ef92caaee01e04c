"""Is a decomposed forward faster than the plain one it explains?

Decomposed: ``Model.decompose(images, texts=[16, D], maps="summed", attention=True)`` and ``.heads()``. Plain:
open_clip's ``encode_image`` on the same module under ``torch.inference_mode()``. float32, batch 8, two threads.
"""

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import clipfast
from benchmarks import cases
from benchmarks.results import Results
from clipfast.bench.measuring import Bar, Call, Check, compare
from clipfast.bench.memory import peak_memory

QUESTION = "forward"
SENTENCE = "Is a decomposed forward (heads, attention, 16 text maps) faster than open_clip's plain forward?"
BATCH = 8
SPEED = {"ViT-B-32": 1.05, "ViT-B-16": 1.05, "ViT-L-14": 1.0}
"""Least factor over the plain forward."""
MEMORY = 1.15
"""Most peak memory of the process over the plain forward's."""


class Case:
    """One model with its images, and the two calls on it."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.name = name
        self.arguments = {"name": name, "batch": BATCH, **settings}
        self.module = cases.module(name, settings["device"])
        self.images = cases.noise(self.module.visual, BATCH, settings["device"])
        self.model = clipfast.wrap(self.module)
        self.texts = cases.unit_texts(self.model.tower.embed_dim, settings["device"])
        self.decomposed: Call = lambda: cases.explain(self.model, self.images, self.texts)
        self.plain: Call = lambda: cases.plain(self.module, self.images)

    def verify(self) -> list[Check]:
        """The decomposition against the plain forward, and its parts against each other."""
        found, heads = cases.explain(self.model, self.images, self.texts)
        checks = cases.against_plain(found, heads, cases.plain(self.module, self.images))
        attention = float((found.attention.sum(-1) - 1).abs().max())
        scores = (heads.sum((1, 2)) @ self.texts.T, found.maps.sum(1))
        return [
            *checks,
            Check("rows of attention against 1", attention, cases.BOUND),
            Check("maps summed over tokens against the heads' scores", cases.difference(*scores), cases.BOUND),
        ]


@pytest.fixture(scope="module", params=SPEED)
def case(request: pytest.FixtureRequest, settings: dict[str, Any]) -> Case:
    return Case(request.param, settings)


def test_decomposed(
    benchmark: BenchmarkFixture, case: Case, results: Results, settings: dict[str, Any], pairs: int, say: Any
) -> None:
    comparison = compare(case.decomposed, case.plain, case.verify, count=pairs)
    memory = (
        peak_memory("benchmarks.cases:explain_call", **case.arguments),
        peak_memory("benchmarks.cases:plain_call", **case.arguments),
    )
    resident = memory[0].peak_mb / memory[1].peak_mb
    bars = [
        Bar(f"{case.name}: times as fast as plain", comparison.ratio, SPEED[case.name], at_least=True),
        Bar(f"{case.name}: peak memory over plain", resident, MEMORY, at_least=False),
    ]
    if memory[0].device_peak_mb and memory[1].device_peak_mb:
        on_device = memory[0].device_peak_mb / memory[1].device_peak_mb
        bars.append(Bar(f"{case.name}: peak device memory over plain", on_device, MEMORY, at_least=False))
    results.compared(
        case.name,
        comparison,
        a="decomposed",
        b="plain open_clip",
        settings={"model": case.name, "batch": BATCH, "texts": cases.TEXTS, "dtype": "float32", **settings},
        memory=memory,
        bars=tuple(bars),
    )
    say(*bars, f"largest error {comparison.error:.1e}")
    benchmark.group = case.name
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(case.decomposed, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]


def test_plain(benchmark: BenchmarkFixture, case: Case) -> None:
    benchmark.group = case.name
    benchmark.pedantic(case.plain, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
