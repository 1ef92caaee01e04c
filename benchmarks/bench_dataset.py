"""The speed of a pass over tar shards of JPEGs: reading, decoding, computing and writing together.

A pass (:func:`clipfast.dataset.collecting.collect`: one worker, an empty folder to merged moments) is compared with
its two main parts, each with every core to itself: decoding the same shards into batches, and decomposing those batches
from memory and adding them to moments. If both shared the cores without any loss, and nothing else took time, a pass
would take the sum of their times: images per second are then the harmonic combination of theirs.

The two parts run one after the other, in pairs with the pass.
"""

import io
import statistics
import tarfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pytest_benchmark.fixture import BenchmarkFixture

import clipfast
from benchmarks import cases
from benchmarks.results import Results
from clipfast.bench.measuring import Bar, Check, compare, seconds
from clipfast.dataset.collecting import collect
from clipfast.dataset.collection import Collection
from clipfast.dataset.flow.batches import Batch, Batches
from clipfast.dataset.flow.decoder import Decoder, Mode
from clipfast.dataset.flow.difference import difference, first_samples
from clipfast.dataset.flow.reader import Reader
from clipfast.dataset.inputs.tars import ShardInput
from clipfast.dataset.passes import PassOptions
from clipfast.dataset.plan import Unit
from clipfast.images import decode_image
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene

QUESTION = "dataset"
SENTENCE = "A pass over tar shards of JPEGs: what do reading, sharing the cores and writing cost?"
IMAGES = {"scenes": 1024, "ViT-B-32": 256, "ViT-B-16": 256}
"""Models, and images in a pass: a few seconds."""
SMALLER = ("scenes", "ViT-B-32")
"""Models for the cases without a bar."""
BATCH, SHARD = 8, 256
SIDES, QUALITY, GRAIN = (256, 500), 90, 8
"""Least and largest side of an image, JPEG's quality, and the standard deviation of the noise."""
SHARE = 0.9
"""Least speed relative to the harmonic combination."""


def encoded(number: int) -> bytes:
    """A scene with grain as a JPEG of 256 to 500 pixels a side; the same bytes every time."""
    rng, file = np.random.default_rng(number), io.BytesIO()
    width, height = rng.integers(SIDES[0], SIDES[1] + 1, 2).tolist()
    scene = Image.fromarray(render(sample_scene(0, "test", number))).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(scene) + rng.normal(0, GRAIN, (height, width, 3))
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def draw(folder: Path, images: int) -> list[Path]:
    """Writes tar shards of :data:`SHARD` images each."""
    shards = []
    for first in range(0, images, SHARD):
        shards.append(folder / f"{first:06}.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for number in range(first, min(first + SHARD, images)):
                data, header = encoded(number), tarfile.TarInfo(f"{number:06}.jpg")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return shards


class Case:
    """One model and its shards."""

    def __init__(self, name: str, shards: list[Path], settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.name, self.images = name, IMAGES[name]
        self.model = clipfast.wrap(cases.module(name, settings["device"]))
        self.input = ShardInput("shards", tuple(map(str, shards[: self.images // SHARD])))
        self.threads = settings["threads"]
        self.settings = {"model": name, "batch": BATCH, "images": self.images, "dtype": "float32"}
        sides = f"{SIDES[0]} to {SIDES[1]} pixels a side, quality {QUALITY}, drawn"
        self.settings |= {"files": f"tar shards of {SHARD} JPEGs, {sides}"} | settings
        self.ready = [list(self._decoded(unit)) for unit in self.input.units(SHARD)]
        self.decoding: list[float] = []
        self.computing: list[float] = []

    def _decoded(self, unit: Unit, mode: Mode = "exact") -> Iterator[Batch]:
        decoder = Decoder(self.model, mode)
        samples = Reader([self.input]).read(unit)
        with closing(Batches(decoder, BATCH, self.threads, takes_turns=False).gather(samples)) as batches:
            yield from batches

    def decode(self, mode: Mode = "exact") -> int:
        """Reads and decodes everything; gives the number of images."""
        return sum(len(batch.rows) for unit in self.input.units(SHARD) for batch in self._decoded(unit, mode))

    def compute(self) -> list[clipfast.Moments]:
        """Decomposes the batches in memory; gives the moments of each unit."""
        made = []
        for batches in self.ready:
            moments = clipfast.Moments(self.model)
            for batch in batches:
                moments.update(self.model.decompose(batch.pixels.to(self.model.device), class_token=True))
            moments.settle()
            made.append(moments)
        return made

    def parts(self) -> None:
        """Both parts, one after the other."""
        self.decoding.append(seconds(self.decode))
        self.computing.append(seconds(self.compute))

    def collected(self, folder: Path, **kept: str) -> Collection:
        """A pass into a new folder."""
        options = PassOptions(kept=kept, batch_size=BATCH)
        summary = collect([self.input], folder, self.model, options, threads=self.threads)
        assert summary.statuses == {"ok": self.images}, summary.statuses
        return Collection(folder)

    def whole(self, **kept: str) -> None:
        """A pass whose results are removed."""
        with TemporaryDirectory() as folder:
            self.collected(Path(folder, "collection"), **kept)

    def verify(self) -> list[Check]:
        """Checks pixels against open_clip's preprocessing, and moments of a pass against those of the parts."""
        with tarfile.open(self.input.shards[0]) as tar:
            contents = [tar.extractfile(member).read() for member in tar.getmembers()[:BATCH]]  # type: ignore[union-attr]
        own = torch.stack([self.model.preprocess(decode_image(io.BytesIO(each), "image")) for each in contents])
        expected, *others = self.compute()
        for other in others:
            expected.merge(other)
        with TemporaryDirectory() as folder:
            moments = self.collected(Path(folder, "collection")).moments
            sums = [(moments._sums[name], expected._sums[name]) for name in expected._sums]
        return [
            Check("pixels against open_clip's preprocessing", cases.difference(self.ready[0][0].pixels, own), 0.0),
            Check("images", float(abs(moments.count - self.images) + abs(self.decode() - self.images)), 0.0),
            Check("sums of the pass against those of the parts", max(cases.difference(*pair) for pair in sums), 0.0),
        ]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return draw(tmp_path_factory.mktemp("shards"), max(IMAGES.values()))


@pytest.fixture(scope="module", params=IMAGES)
def case(request: pytest.FixtureRequest, shards: list[Path], settings: dict[str, Any]) -> Case:
    return Case(request.param, shards, settings)


def test_against_its_parts(benchmark: BenchmarkFixture, case: Case, results: Results, pairs: int, say: Any) -> None:
    comparison = compare(case.whole, case.parts, case.verify, count=pairs, warmup=1)
    del case.decoding[:-pairs], case.computing[:-pairs]  # those of the warm-up
    decoding, computing = (statistics.median(times) for times in (case.decoding, case.computing))
    rates = {
        "images_per_second": case.images / statistics.median(comparison.seconds_a),
        "images_per_second_decoding": case.images / decoding,
        "images_per_second_computing": case.images / computing,
    }
    bar = Bar(f"{case.name}: of the speed of its parts combined", comparison.ratio, SHARE, at_least=True)
    results.compared(
        f"{case.name}, a pass",
        comparison,
        a="a pass",
        b="decoding and computing, each alone",
        settings=case.settings,
        bars=(bar,),
        figures=rates,
    )
    say(bar, ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in rates.items()))
    benchmark.group = case.name
    benchmark.extra_info |= {"ratio": comparison.ratio} | rates
    benchmark.pedantic(case.whole, rounds=1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("case", SMALLER, indirect=True)
def test_keeping_codes(benchmark: BenchmarkFixture, case: Case, results: Results, pairs: int, say: Any) -> None:
    def keeping() -> None:
        case.whole(codes="float16", embeddings="float16")

    comparison = compare(keeping, case.whole, case.verify, count=pairs, warmup=1)
    results.compared(
        f"{case.name}, a pass that keeps codes", comparison, a="with codes", b="without", settings=case.settings
    )
    say(f"{case.name}: {1 / comparison.ratio:.3g} times the time with codes and embeddings in float16")
    benchmark.group = case.name
    benchmark.pedantic(keeping, rounds=1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("case", SMALLER, indirect=True)
def test_fast_preprocessing(benchmark: BenchmarkFixture, case: Case, results: Results, pairs: int, say: Any) -> None:
    measured = difference(case.model, first_samples([case.input], case.input.units(SHARD)))
    assert measured is not None

    def verify() -> list[Check]:
        return [Check("images that could not be decoded", float(abs(case.decode("fast") - case.images)), 0.0)]

    comparison = compare(lambda: case.decode("fast"), case.decode, verify, count=pairs, warmup=1)
    results.compared(
        f"{case.name}, fast preprocessing",
        comparison,
        a="decoding, fast",
        b="decoding, exact",
        settings=case.settings,
        figures=measured.to_json(),
    )
    say(f"{case.name}: fast preprocessing decodes {comparison.ratio:.3g} times as fast", measured)
    benchmark.group = case.name
    benchmark.pedantic(case.decode, rounds=1)  # type: ignore[no-untyped-call]
