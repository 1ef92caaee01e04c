"""The speed and memory of a decomposed forward against the published code, on the same weights and images.

Needs ``--reference PATH``, a checkout of github.com/yossigandelsman/clip_prs whose requirements are installed in this
environment. The checkout runs in its own process; the runs of the two sides interleave.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import clipfast
from benchmarks import cases
from benchmarks.reference import Reference, to
from benchmarks.results import Results
from clipfast.bench.measuring import Check, Comparison, require
from clipfast.bench.measuring import pairs as interleave
from clipfast.bench.memory import Peak, peak_memory

QUESTION = "reference"
SENTENCE = "How much faster and smaller is a decomposed forward than the published code?"
SETUPS = {
    "ViT-B-32 tokens": ("ViT-B-32", 2, True),
    "ViT-B-32 heads": ("ViT-B-32", 8, False),
    "ViT-B-16 tokens": ("ViT-B-16", 1, True),
}
"""Model, batch, and whether tokens are kept. Batch 2 is the published default."""
BOUND = 1e-4
"""Error bound. The published LayerNorm computes its variance as E[x²] − E[x]², which loses precision in float32."""


@pytest.fixture
def checkout(pytestconfig: pytest.Config) -> Path:
    path = pytestconfig.getoption("--reference")
    if path is None:
        pytest.skip("no --reference PATH to a checkout of the published code")
    return Path(path)


@pytest.mark.parametrize("name", SETUPS, ids=lambda name: name.replace(" ", "-"))
def test_against_published(
    benchmark: BenchmarkFixture,
    checkout: Path,
    name: str,
    results: Results,
    settings: dict[str, Any],
    pairs: int,
    say: Any,
    tmp_path: Path,
) -> None:
    model_name, batch, spatial = SETUPS[name]
    threads, device = settings["threads"], settings["device"]
    torch.set_num_threads(threads)
    module = cases.module(model_name, device)
    images = cases.noise(module.visual, batch, device)
    model = clipfast.wrap(module)

    def subject() -> tuple[Any, torch.Tensor]:
        return cases.all_tokens(model, images) if spatial else cases.heads_only(model, images)

    process = Reference(checkout, model_name, module.visual, images, spatial=spatial, threads=threads, folder=tmp_path)
    with process as other:
        published = to(other.result(), images.device)
        contributions, array = subject()
        errors = {
            "tokens" if spatial else "heads": cases.relative(array, published.attentions),
            "mlps": cases.relative(contributions.start_and_mlps(), published.start_and_mlps),
            "embedding": cases.difference(cases.unit(contributions.embedding), cases.unit(published.embedding)),
        }
        checks = [Check(f"{what} against the published code's", error, BOUND) for what, error in errors.items()]
        checks += cases.against_plain(contributions, contributions.heads(), cases.plain(module, images))
        require(checks)
        del published, contributions, array
        measured = interleave(subject, other.run, pairs=pairs, warmup=1)
        reported = other.peak()
    comparison = Comparison(measured.seconds_a, measured.seconds_b, tuple(checks))
    target = f"benchmarks.cases:{'all_tokens' if spatial else 'heads_only'}_call"
    memory = (
        peak_memory(target, name=model_name, batch=batch, **settings),
        Peak(reported["loaded_mb"], reported["peak_mb"], "in its own process", None, reported.get("device_peak_mb")),
    )
    results.compared(
        name,
        comparison,
        a="decomposed",
        b="published code",
        settings={"model": model_name, "batch": batch, "tokens": spatial, "dtype": "float32", **settings},
        memory=memory,
    )
    say(
        f"{name}, batch {batch}: {comparison.ratio:.3g} times as fast as the published code, "
        f"peak {memory[0].peak_mb:.0f} against {memory[1].peak_mb:.0f} MB, largest error {comparison.error:.1e}"
    )
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(subject, rounds=3, warmup_rounds=1)  # type: ignore[no-untyped-call]
