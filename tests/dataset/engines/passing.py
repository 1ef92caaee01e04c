"""Passes over small images with a tiny model, in this process or in one that can be killed."""

import ctypes
import errno
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from builders import vision_tower
from PIL import Image

import clipfast
from clipfast.dataset.collecting import collect
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.merging import merge_units
from clipfast.dataset.passes import PassOptions, Summary
from clipfast.dataset.pieces import files, sized_checksum
from clipfast.dataset.plan import Unit
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.dataset.worker import Outcome, Progress
from clipfast.errors import InputError
from clipfast.model import Model

UNIT = 4
OPTIONS = PassOptions(kept={"codes": "float16", "embeddings": "float32"}, batch_size=2, unit_size=UNIT)


@dataclass(frozen=True)
class Pictures:
    """An input: the files of a folder.

    Attributes:
        folder: with the files.
        pause: seconds before an image is read.
        log: a file that gets a line with the number of a unit, every time that somebody begins to read it.
    """

    folder: Path
    pause: float = 0.0
    log: Path | None = None

    @property
    def name(self) -> str:
        return str(self.folder)

    def units(self, size: int) -> Iterator[Unit]:
        names = sorted(map(str, self.folder.iterdir()))
        for start in range(0, len(names), size):
            some = tuple(names[start : start + size])
            yield Unit("files", str(self.folder), start, start + len(some), files=some)

    def names(self, unit: Unit) -> Iterator[Sample]:
        return (Sample(Path(path).name, path) for path in unit.files)

    def read(self, unit: Unit) -> Iterator[Sample]:
        if self.log is not None:
            with open(self.log, "ab", buffering=0) as log:
                log.write(b"%d\n" % unit.number)
        for path in unit.files:
            time.sleep(self.pause)
            try:
                status = os.stat(path)
            except OSError as error:
                yield Sample(path, path, failure=Failure(Status.MISSING, str(error)))
                continue
            yield Sample(Path(path).name, path, size=status.st_size, modified_ns=status.st_mtime_ns)


@dataclass(frozen=True)
class Troubled(Pictures):
    """The same, with trouble in whoever reads one of its units.

    Attributes:
        unit: where.
        trouble: what.
        once: a file that is made when it happens, so that it does not happen again; None for every time.
    """

    unit: int = 0
    trouble: str = ""
    once: Path | None = None

    def read(self, unit: Unit) -> Iterator[Sample]:
        if unit.number == self.unit and (self.once is None or not self.once.exists()):
            if self.once is not None:
                self.once.touch()
            self._make_trouble()
        return super().read(unit)

    def _make_trouble(self) -> None:
        match self.trouble:
            case "kill" | "stop":
                os.kill(os.getpid(), signal.SIGKILL if self.trouble == "kill" else signal.SIGSTOP)
            case "fault":
                ctypes.string_at(0)
            case "exit":
                os._exit(7)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/array")
            case "input":
                raise InputError("a label is missing")
            case "bug":
                _divide(0)
            case "noise":
                told = {
                    "torch": torch.get_num_threads(),
                    "omp": os.environ.get("OMP_NUM_THREADS"),
                    "sigint": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
                    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
                    "main": sys.modules["__main__"].__file__,
                }
                assert self.once is not None
                self.once.write_text(json.dumps(told))
                print("noise on stdout", flush=True)
                print("noise on stderr", file=sys.stderr, flush=True)
                logging.getLogger("clipfast").warning("%d images are strange", 3)
                logging.getLogger("noise").warning("noise in another log")
                os.system("echo noise of a program")


def _divide(number: int) -> float:
    return 1 / number


class EndsItsWorker(Pictures):
    """The same; ends the process that gets a copy of it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        print("ModuleNotFoundError: no such module", file=sys.stderr, flush=True)
        os._exit(9)


def draw(folder: Path, count: int) -> Path:
    """Images, every seventh of them damaged."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:03}.png"
        if number % 7 == 6:
            path.write_bytes(b"damaged")
        else:
            Image.fromarray(rng.integers(0, 256, (30, 34, 3), dtype=np.uint8)).save(path)
    return folder


def tiny_model() -> Model:
    return clipfast.wrap(vision_tower(seed=5), backend="eager")


@dataclass
class Noted:
    """Events, as they came."""

    units: list[int] = field(default_factory=list)
    progress: list[tuple[str, Progress]] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    losses: list[tuple[str, int, str]] = field(default_factory=list)

    def began(self, manifest: Manifest, units: Sequence[int]) -> None:
        self.units = list(units)

    def progressed(self, worker: str, progress: Progress) -> None:
        self.progress.append((worker, progress))

    def finished(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def lost(self, worker: str, unit: int, reason: str) -> None:
        self.losses.append((worker, unit, reason))


def run(
    images: Pictures, out: Path, engine: Any = None, events: Any = None, options: PassOptions = OPTIONS, **others: Any
) -> Summary:
    return collect([images], out, tiny_model(), options, engine=engine, events=events, threads=1, **others)


def results(folder: Path) -> dict[str, Any]:
    """Everything that a complete collection holds, checked against its records: equal for the same bits."""
    manifest = Manifest(folder)
    assert manifest.complete
    held: dict[str, Any] = {}
    for record in manifest.records():
        assert files(manifest.data / record.folder) == record.files
        held[f"unit {record.unit}"] = (record.files, record.statuses, record.problem)
    assert {path.name for path in manifest.data.iterdir()} == {record.folder for record in manifest.records()}
    moments = merge_units(manifest)
    held["images"] = moments.count
    held["sums"] = {name: tensor.numpy().tobytes() for name, tensor in moments._sums.items()}
    held["merged"] = sized_checksum(folder / "moments.safetensors")
    return held


def children(pid: int) -> set[int]:
    """Process ids of a process's children, whichever of its threads started them."""
    found = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found |= set(map(int, path.read_text().split()))
    return found


def descendants(pid: int) -> set[int]:
    """The same with their children, and so on."""
    found = own = children(pid)
    while own:
        own = set().union(*map(children, own)) - found
        found = found | own
    return found


def title(pid: int) -> str:
    """The command line of a process; empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def processes(pid: int | None = None) -> set[int]:
    """Workers of the local engine among the children of a process, or of this one."""
    return {each for each in children(pid or os.getpid()) if "engines/process.py" in title(each)}


def alive(pid: int) -> bool:
    """Whether a process runs or waits, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 120.0) -> None:
    """Waits until something is so; fails if it never is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
