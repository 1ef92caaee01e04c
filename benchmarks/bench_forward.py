"""The speed of a decomposed forward against the plain forward.

Decomposed: ``Model.decompose(images, texts=[16, D], maps="summed", attention=True)`` and ``.heads()``. Plain:
open_clip's ``encode_image`` on the same module under ``torch.inference_mode()``, in float32 and with weights and images
in bfloat16 (open_clip's ``pure_bf16``). Batch 8, two threads.
"""

from copy import deepcopy
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import clipfast
from benchmarks import cases
from benchmarks.results import Results
from clipfast.bench.checks import BOUNDS
from clipfast.bench.inputs import DTYPES
from clipfast.bench.measuring import Bar, Call, Check, compare
from clipfast.bench.memory import peak_memory

QUESTION = "forward"
SENTENCE = "Is a decomposed forward (heads, attention, 16 text maps) faster than open_clip's plain forward?"
BATCH = 8
SPEED = {
    ("ViT-B-32", "fp32"): 1.1,
    ("ViT-B-16", "fp32"): 1.1,
    ("ViT-L-14", "fp32"): 1.03,
    ("ViT-B-32", "bf16"): 1.18,
    ("ViT-B-16", "bf16"): 1.18,
    ("ViT-L-14", "bf16"): 1.1,
}
"""Least speed relative to the plain forward; the bfloat16 bars are for CPUs with bfloat16 instructions."""
MEMORY = 1.1
"""Largest peak memory of the process relative to the plain forward."""
ERROR = 1.05
"""Largest error of a 16-bit embedding against float64, relative to the plain forward's error."""


class Case:
    """One model, its images, and the two calls to compare."""

    def __init__(self, name: str, dtype: str, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.name = f"{name} {dtype}"
        self.bar = SPEED[name, dtype]
        self.dtype = DTYPES[dtype]
        self.arguments = {"name": name, "batch": BATCH, "dtype": dtype, **settings}
        self.module = cases.module(name, settings["device"], dtype=self.dtype)
        self.images = cases.noise(self.module.visual, BATCH, settings["device"], dtype=self.dtype)
        self.model = clipfast.wrap(self.module)
        self.texts = cases.unit_texts(self.model.tower.embed_dim, settings["device"])
        self.decomposed: Call = lambda: cases.explain(self.model, self.images, self.texts)
        self.plain: Call = lambda: cases.plain(self.module, self.images)

    def verify(self) -> list[Check]:
        """Checks the decomposition against the plain forward, and its parts against each other."""
        bound = BOUNDS[self.dtype]
        contributions, heads = cases.explain(self.model, self.images, self.texts)
        plain = cases.plain(self.module, self.images)
        checks = cases.against_plain(contributions, heads, plain, bound)
        attention = float((contributions.attention.sum(-1) - 1).abs().max())
        scores = (heads.sum((1, 2)) @ self.texts.T, contributions.maps.sum(1))
        if self.dtype != torch.float32:
            allowed = ERROR * self._error(plain)
            checks.append(Check("embedding against float64's", self._error(contributions.embedding), allowed))
        return [
            *checks,
            Check("rows of attention against 1", attention, bound),
            Check("maps summed over tokens against the heads' scores", cases.difference(*scores), bound),
        ]

    def _error(self, embedding: Tensor, count: int = 2) -> float:
        """Root mean square difference from the float64 embedding of the first images."""
        double: Any = deepcopy(self.module.visual).double()
        with torch.inference_mode():
            expected = cases.unit(double(self.images[:count].double()))
        return float((cases.unit(embedding[:count].double()) - expected).square().mean().sqrt())


@pytest.fixture(scope="module", params=SPEED, ids="-".join)
def case(request: pytest.FixtureRequest, settings: dict[str, Any]) -> Case:
    return Case(*request.param, settings)


def test_decomposed(
    benchmark: BenchmarkFixture, case: Case, results: Results, settings: dict[str, Any], pairs: int, say: Any
) -> None:
    comparison = compare(case.decomposed, case.plain, case.verify, count=pairs, warmup=1)
    memory = (
        peak_memory("benchmarks.cases:explain_call", **case.arguments),
        peak_memory("benchmarks.cases:plain_call", **case.arguments),
    )
    resident = memory[0].peak_mb / memory[1].peak_mb
    bars = [
        Bar(f"{case.name}: times as fast as plain", comparison.ratio, case.bar, at_least=True),
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
        settings=case.arguments | {"texts": cases.TEXTS} | cases.instructions(),
        memory=memory,
        bars=tuple(bars),
    )
    say(*bars, f"largest error {comparison.error:.1e}")
    benchmark.group = case.name
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(case.decomposed, rounds=1)  # type: ignore[no-untyped-call]


def test_plain(benchmark: BenchmarkFixture, case: Case) -> None:
    benchmark.group = case.name
    benchmark.pedantic(case.plain, rounds=1)  # type: ignore[no-untyped-call]
