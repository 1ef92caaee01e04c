"""The speed from JPEG files to results, including reading and decoding.

``Model.batches(paths)`` reads the files, and every batch is decomposed as in ``bench_forward`` (heads, attention, 16
text maps). This is compared with the usual open_clip loop (a ``DataLoader`` with open_clip's preprocessing and
``encode_image``), and with the same decomposition of pixels already in memory.

Decoding and computing both use every core of a CPU. If they shared the cores perfectly, a pass would take the time of
computing plus the core time of decoding divided by the number of threads. The second bar compares the pipeline with
that time.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import clipfast
from benchmarks import cases, photographs
from benchmarks.results import Results
from clipfast.bench.measuring import Bar, Check, compare, quantiles

QUESTION = "pipeline"
SENTENCE = "From JPEG files to results: does reading the images eat the gain?"
MODELS = ("ViT-B-32", "ViT-B-16", "scenes")
BATCH, IMAGES = 8, 48
SPEED, SHARING = 1.0, 0.9
"""Least speed relative to open_clip's loop, and relative to perfect sharing of the cores."""


class Case:
    """One model and its image files."""

    def __init__(self, name: str, paths: list[Path], settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.name, self.paths = name, paths
        self.module = cases.module(name, settings["device"])
        self.model = clipfast.wrap(self.module)
        self.texts = cases.unit_texts(self.model.tower.embed_dim, settings["device"])
        self.pixels = list(self.model.batches(paths, BATCH))
        self.settings = {"model": name, "batch": BATCH, "images": len(paths), "texts": cases.TEXTS, "dtype": "float32"}
        width, height = photographs.SIZE
        self.settings |= {"files": f"JPEG, {width}x{height}, quality {photographs.QUALITY}, drawn"} | settings

    def from_files(self) -> Tensor:
        """Reads and decomposes every batch; returns the embeddings ``[K, D]`` of all images."""
        return torch.cat([self._embedding(pixels) for pixels in self.model.batches(self.paths, BATCH)])

    def from_pixels(self) -> Tensor:
        """Decomposes the batches in memory; returns the embeddings ``[K, D]`` of all images."""
        return torch.cat([self._embedding(pixels) for pixels in self.pixels])

    def _embedding(self, pixels: Tensor) -> Tensor:
        contributions, _ = cases.explain(self.model, pixels, self.texts)
        return contributions.embedding

    def verify(self, loop: photographs.Loop) -> list[Check]:
        """Checks that pixels are equal to the bit, the embeddings, and every term of the last batch."""
        loop_embeddings = loop()
        pixels = torch.cat(list(loop.batches)).to(loop_embeddings.device)
        contributions, heads = cases.explain(self.model, self.pixels[-1], self.texts)
        embeddings = (cases.unit(self.from_files()), cases.unit(loop_embeddings))
        return [
            Check("pixels against those of open_clip's loop", cases.difference(torch.cat(self.pixels), pixels), 0.0),
            Check("embeddings against those of open_clip's loop", cases.difference(*embeddings), cases.BOUND),
            *cases.against_plain(contributions, heads, loop_embeddings[-len(heads) :]),
        ]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return photographs.draw(tmp_path_factory.mktemp("photographs"), IMAGES)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, paths: list[Path], settings: dict[str, Any]) -> Case:
    return Case(request.param, paths, settings)


def test_against_the_loop(benchmark: BenchmarkFixture, case: Case, results: Results, pairs: int, say: Any) -> None:
    loop, chosen = photographs.best_loop(case.module, case.paths, BATCH)
    comparison = compare(case.from_files, loop, lambda: case.verify(loop), count=pairs, warmup=1)
    bar = Bar(f"{case.name}: times as fast as open_clip's loop", comparison.ratio, SPEED, at_least=True)
    results.compared(
        f"{case.name}, from files",
        comparison,
        a="decomposed",
        b="open_clip's loop",
        settings=case.settings | {"loader": chosen},
        bars=(bar,),
    )
    say(bar, f"the loop with {chosen['num_workers']} workers; largest error {comparison.error:.1e}")
    benchmark.group = case.name
    benchmark.extra_info |= {"ratio": comparison.ratio, "error": comparison.error}
    benchmark.pedantic(case.from_files, rounds=1)  # type: ignore[no-untyped-call]


def test_against_pixels_in_memory(
    benchmark: BenchmarkFixture, case: Case, results: Results, pairs: int, say: Any
) -> None:
    def verify() -> list[Check]:
        return [Check("embeddings", cases.difference(case.from_files(), case.from_pixels()), 0.0)]

    comparison = compare(case.from_files, case.from_pixels, verify, count=pairs, warmup=1)
    threads, decoding = case.settings["threads"], photographs.decoding(case.model, case.paths)
    timings = list(zip(comparison.seconds_a, comparison.seconds_b, strict=True))
    over = quantiles([files / pixels for files, pixels in timings])
    sharing = quantiles([(pixels + decoding / threads) / files for files, pixels in timings])
    bar = Bar(f"{case.name}: of the speed of perfect sharing", sharing["median"], SHARING, at_least=True)
    results.compared(
        f"{case.name}, files and pixels",
        comparison,
        a="from files",
        b="from pixels in memory",
        settings=case.settings,
        bars=(bar,),
        figures={
            "time_over_that_of_pixels": over,
            "decoding_core_seconds": decoding,
            "of_the_speed_of_perfect_sharing": sharing,
        },
    )
    per_image = 1e3 * decoding / len(case.paths)
    say(
        bar,
        f"{over['median']:.3g} times the time of pixels in memory; an image takes {per_image:.3g} ms of a core to read",
    )
    benchmark.group = case.name
    benchmark.extra_info |= {"ratio": comparison.ratio, "over": over["median"]}
    benchmark.pedantic(case.from_pixels, rounds=1)  # type: ignore[no-untyped-call]
