"""The speed and memory of a decomposed forward against the definition written out.

The naive implementation forms ``[B, N, N, H, W]`` per layer with tokens and ``[B, N, H, W]`` without
(:mod:`clipfast.bench.naive`). The benchmark compares the same arrays, and also the text maps and heads that most
callers compute from the tokens.

ViT-B-16 with tokens runs at batch 1 and with fewer pairs because the naive implementation takes tens of seconds per
image on two busy cores; its largest tensor has 1.4 GB.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import clipfast
from benchmarks import cases
from benchmarks.results import Results
from clipfast.bench import naive
from clipfast.bench.measuring import Check, compare
from clipfast.bench.memory import peak_memory

QUESTION = "naive"
SENTENCE = "How much faster and smaller is a decomposed forward than the definition written out?"


@dataclass(frozen=True)
class Setup:
    """One comparison.

    Attributes:
        name: name of the case in the results.
        model: an open_clip name.
        batch: images per batch.
        spatial: whether the naive implementation keeps tokens.
        answer: ``"arrays"`` compares the same arrays, ``"maps"`` text maps and heads.
        pairs: upper limit of pairs for a slow case; None for no limit.
    """

    name: str
    model: str
    batch: int
    spatial: bool
    answer: str
    pairs: int | None = None


SETUPS = (
    Setup("ViT-B-32 heads", "ViT-B-32", 8, False, "arrays"),
    Setup("ViT-B-32 tokens", "ViT-B-32", 8, True, "arrays"),
    Setup("ViT-B-32 tokens, as maps", "ViT-B-32", 8, True, "maps"),
    Setup("ViT-B-16 tokens", "ViT-B-16", 1, True, "arrays", pairs=3),
    Setup("ViT-B-16 tokens, as maps", "ViT-B-16", 1, True, "maps", pairs=3),
)


def _target(setup: Setup) -> str:
    if setup.answer == "maps":
        return "benchmarks.cases:explain_call"
    return "benchmarks.cases:all_tokens_call" if setup.spatial else "benchmarks.cases:heads_only_call"


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name.replace(" ", "-").replace(",", ""))
def test_against_naive(
    benchmark: BenchmarkFixture, setup: Setup, results: Results, settings: dict[str, Any], pairs: int, say: Any
) -> None:
    device = settings["device"]
    torch.set_num_threads(settings["threads"])
    module = cases.module(setup.model, device)
    images = cases.noise(module.visual, setup.batch, device)
    model = clipfast.wrap(module)
    texts = cases.unit_texts(model.tower.embed_dim, device)
    subjects: dict[tuple[str, bool], Callable[[], tuple[Any, torch.Tensor]]] = {
        ("arrays", False): lambda: cases.heads_only(model, images),
        ("arrays", True): lambda: cases.all_tokens(model, images),
        ("maps", True): lambda: cases.explain(model, images, texts),
    }
    subject = subjects[setup.answer, setup.spatial]

    def written_out() -> naive.Result:
        return naive.decompose(module.visual, images, spatial=setup.spatial)

    def verify() -> list[Check]:
        expected = written_out()
        contributions, array = subject()
        checks = cases.against_plain(contributions, contributions.heads(), cases.plain(module, images))
        if setup.answer == "arrays":
            return checks + cases.against_naive(contributions, array, expected)
        maps = expected.attentions.sum((1, 3)) @ texts.T  # [B, N, T]
        summed = naive.Result(expected.embedding, expected.heads(), expected.start_and_mlps)
        checks += cases.against_naive(contributions, array, summed)
        return [*checks, Check("maps against the naive ones", cases.relative(contributions.maps, maps), cases.BOUND)]

    count = min(pairs, setup.pairs or pairs)
    comparison = compare(subject, written_out, verify, count=count, warmup=1)
    arguments = {"name": setup.model, "batch": setup.batch, **settings}
    memory = (
        peak_memory(_target(setup), **arguments),
        peak_memory("benchmarks.cases:naive_call", spatial=setup.spatial, **arguments),
    )
    results.compared(
        setup.name,
        comparison,
        a="decomposed",
        b="naive",
        settings={"model": setup.model, "batch": setup.batch, "tokens": setup.spatial, "answer": setup.answer}
        | {"dtype": "float32", **settings},
        memory=memory,
    )
    say(
        f"{setup.name}, batch {setup.batch}: {comparison.ratio:.3g} times as fast as naive, "
        f"peak {memory[0].peak_mb:.0f} against {memory[1].peak_mb:.0f} MB, largest error {comparison.error:.1e}"
    )
    benchmark.group = setup.name
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(subject, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
