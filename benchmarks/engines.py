"""The engines of a pass compared: processes with threads, and Ray with processes.

``python -m benchmarks.engines`` collects JPEG files in tar shards in three ways: in one process with a thread per core,
in a process per core with one thread each, and in as many Ray actors. Runs of two of them alternate. The number of
images is chosen so that a run takes two minutes. Two figures are taken from a run: its seconds from start to end, which
include starting the workers, and its images per second while 5 to 95 % of the images are done.

Threads are compared with processes by images per second, because a long pass starts its workers once. Ray is compared
with processes by the whole time. Shards have the same photographs again and again; every image is read and decoded.
"""

import argparse
import io
import math
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import clipfast
from benchmarks import cases, photographs
from benchmarks.results import FOLDER, Results
from clipfast.bench.measuring import Bar, Check, Comparison, quantiles, require
from clipfast.dataset.collecting import Silent, collect
from clipfast.dataset.engines.engine import Engine
from clipfast.dataset.engines.local import LocalEngine
from clipfast.dataset.engines.ray import RayEngine
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.merging import merge_units
from clipfast.dataset.passes import PassOptions
from clipfast.dataset.worker import Progress

QUESTION = "engines"
SENTENCE = "How fast is a pass in processes against threads, and with Ray against processes?"
PROCESSES, RAY = 0.97, 1.1
"""Least speed of processes relative to threads, and the most time of Ray relative to processes."""
DRAWN, BATCH, LEAST = 32, 8, 4
"""Photographs that are drawn; images in a batch; the fewest shards per worker."""
KEPT = {"codes": "float16"}
_MIDDLE = 0.05, 0.95


class Clock(Silent):
    """Notes when how many images were done."""

    def __init__(self) -> None:
        self._done: list[tuple[float, int]] = [(time.perf_counter(), 0)]

    def progressed(self, worker: str, progress: Progress) -> None:
        """Notes a report."""
        self._done.append((time.perf_counter(), self._done[-1][1] + progress.done))

    def rate(self) -> float:
        """Images per second between two shares of all images."""
        total = self._done[-1][1]
        first, last = (next(point for point in self._done if point[1] >= share * total) for share in _MIDDLE)
        return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else math.nan


@dataclass(frozen=True)
class Run:
    """One pass.

    Attributes:
        seconds: from start to end.
        rate: images per second in the middle.
    """

    seconds: float
    rate: float


class Case:
    """A model and shards of images.

    Args:
        name: of the model.
        workers: processes, and threads of the one process.
        unit: images in a shard.
        seconds: that a run is to take.
        folder: for all files.
    """

    def __init__(self, name: str, workers: int, unit: int, seconds: float, folder: Path) -> None:
        torch.set_num_threads(workers)
        self.name, self.workers, self._folder = name, workers, folder
        self._collections = folder / "first"
        self._model = clipfast.wrap(cases.module(name, "cpu"))
        drawn = folder / "photographs"
        drawn.mkdir()
        self._files = [path.read_bytes() for path in photographs.draw(drawn, DRAWN)]
        self._shards = [self._shard(number, unit) for number in range(2)]
        first = self.run(None, workers, "serial")
        count = max(LEAST * workers, math.ceil(seconds * first.rate / unit))
        self._shards += [self._shard(number, unit) for number in range(2, count)]
        self.images = count * unit

    def _shard(self, number: int, unit: int) -> Path:
        path = self._folder / f"{number:05}.tar"
        with tarfile.open(path, "w") as shard:
            for place in range(unit):
                member = tarfile.TarInfo(f"{number:05}-{place:05}.jpg")
                content = self._files[(number * unit + place) % len(self._files)]
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
        return path

    def run(self, engine: Engine | None, threads: int, name: str) -> Run:
        """Collects all shards.

        Args:
            engine: the engine; None for this process.
            threads: of each worker.
            name: of the collection, which stays.
        """
        clock, folder = Clock(), self._collections / name
        options = PassOptions(kept=KEPT, batch_size=BATCH)
        started = time.perf_counter()
        collect(open_inputs(self._shards), folder, self._model, options, engine=engine, events=clock, threads=threads)
        return Run(time.perf_counter() - started, clock.rate())

    def collect_to(self, folder: Path) -> None:
        """Puts collections into another folder from now on."""
        self._collections = folder

    def manifest(self, name: str) -> Manifest:
        """What a run has left."""
        return Manifest(self._collections / name)


Side = Callable[[str], Run]


def alternate(a: Side, b: Side, count: int) -> tuple[list[Run], list[Run]]:
    """Runs of both, A B, B A, A B, …"""
    runs: tuple[list[Run], list[Run]] = ([], [])
    for pair in range(count):
        for place in (0, 1) if pair % 2 == 0 else (1, 0):
            runs[place].append((a, b)[place](f"{'ab'[place]}{pair}"))
    return runs


def sides(case: Case) -> dict[str, Side]:
    """The three ways."""
    workers = case.workers
    return {
        "threads": lambda name: case.run(LocalEngine(1), workers, f"threads-{name}"),
        "processes": lambda name: case.run(LocalEngine(workers), 1, f"processes-{name}"),
        "Ray": lambda name: case.run(RayEngine(workers), 1, f"Ray-{name}"),
    }


def equal_bits(one: Manifest, other: Manifest) -> Check:
    """How many units have other bits."""
    pairs = zip(one.records(), other.records(), strict=True)
    return Check("units with other bits", float(sum(first.files != second.files for first, second in pairs)), 0.0)


def equal_means(one: Manifest, other: Manifest) -> Check:
    """Threads add numbers in another order, so that the last bits may differ."""
    first, second = merge_units(one).means(), merge_units(other).means()
    return Check("mean contributions", cases.relative(first, second), cases.BOUND)


def measure(case: Case, first: str, second: str, pairs: int, results: Results) -> Bar:
    """Compares two ways and writes the result.

    Args:
        case: what is collected.
        first: the way whose speed is asked for.
        second: the one it is compared with.
        pairs: how many runs of each.
        results: gets the result.
    """
    a, b = sides(case)[first], sides(case)[second]
    runs_a, runs_b = alternate(a, b, pairs)
    prefixes = first, second
    compared = [case.manifest(f"{prefix}-{side}0") for prefix, side in zip(prefixes, "ab", strict=True)]
    checks = [(equal_means if second == "threads" else equal_bits)(*compared)]
    require(checks)
    speed = quantiles([one.rate / other.rate for one, other in zip(runs_a, runs_b, strict=True)])
    whole = quantiles([one.seconds / other.seconds for one, other in zip(runs_a, runs_b, strict=True)])
    if second == "threads":
        bar = Bar(f"{case.name}: images per second of processes over threads", speed["median"], PROCESSES, True)
    else:
        bar = Bar(f"{case.name}: seconds of Ray over processes", whole["median"], RAY, False)
    seconds = [tuple(run.seconds for run in runs) for runs in (runs_a, runs_b)]
    results.compared(
        f"{case.name}, {first} and {second}",
        Comparison(seconds[0], seconds[1], tuple(checks)),
        a=first,
        b=second,
        settings={
            "model": case.name,
            "workers": case.workers,
            "images": case.images,
            "batch": BATCH,
            "kept": KEPT,
            "files": f"JPEG, {photographs.SIZE[0]}x{photographs.SIZE[1]}, drawn, in tar shards",
            "dtype": "float32",
            "device": "cpu",
        },
        bars=(bar,),
        figures={
            "images_per_second": {
                first: quantiles([run.rate for run in runs_a]),
                second: quantiles([run.rate for run in runs_b]),
            },
            "speed_in_the_middle": speed,
            "time_from_start_to_end": whole,
        },
    )
    for name, runs in ((first, runs_a), (second, runs_b)):
        print(f"{case.name}, {name}: " + ", ".join(f"{run.rate:.2f} images/s in {run.seconds:.0f} s" for run in runs))
    print(bar)
    return bar


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the result; returns 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.engines", description=SENTENCE)
    parser.add_argument("--model", action="append", help="repeatable (ViT-B-32)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one per core)")
    parser.add_argument("--unit", type=int, default=64, help="images of a shard (64)")
    parser.add_argument("--seconds", type=float, default=130.0, help="that a run is to take at least (130)")
    parser.add_argument("--pairs", type=int, default=7, help="runs of each side (7)")
    parser.add_argument("--only", choices=["processes", "ray"], help="one of the two comparisons")
    parser.add_argument("--temporary", type=Path, default=None, help="where shards and collections are")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    options = parser.parse_args(arguments)
    results = Results(QUESTION, SENTENCE, folder=options.out)
    bars = []
    for name in options.model or ["ViT-B-32"]:
        with tempfile.TemporaryDirectory(dir=options.temporary) as folder:
            case = Case(name, options.workers, options.unit, options.seconds, Path(folder))
            for first, second in (("processes", "threads"), ("Ray", "processes")):
                if options.only in (None, first.lower()):
                    with tempfile.TemporaryDirectory(dir=folder) as place:
                        case.collect_to(Path(place))
                        bars.append(measure(case, first, second, options.pairs, results))
    return 0 if all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
