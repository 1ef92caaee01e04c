"""One worker of a pass: the function from a unit to its record, the same for every engine."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipfast.analyses.moments import Moments
from clipfast.dataset.arrays import files
from clipfast.dataset.flow.batches import Batches
from clipfast.dataset.flow.decoder import Decoder
from clipfast.dataset.flow.decomposer import Decomposer
from clipfast.dataset.flow.jpegs import is_available, on_device
from clipfast.dataset.flow.reader import Reader
from clipfast.dataset.flow.writer import UnitWriter
from clipfast.dataset.guard import counting
from clipfast.dataset.labelling import Labeller, LabelNotes
from clipfast.dataset.manifest import Manifest, Record, current_run
from clipfast.dataset.notes import Notes
from clipfast.dataset.plan import Input, Unit
from clipfast.errors import ClipfastError, InputError
from clipfast.files import flush_folder
from clipfast.model import Model

_BETWEEN_REPORTS = 0.5  # seconds


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; it can be pickled.

    Attributes:
        folder: the collection.
        run: the name of the run (:func:`~clipfast.dataset.manifest.locked`).
        inputs: of the pass.
        labeller: gives samples their labels and groups, and leaves some out; None where there are no labels.
        model: a file that :func:`save_model` wrote; empty for an engine that hands its model over.
        device: where the model computes.
        threads: that torch computes with, and that decode; None for torch's own number.
    """

    folder: Path
    run: str
    inputs: tuple[Input, ...]
    labeller: Labeller | None = None
    model: str = ""
    device: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class Progress:
    """How far a worker has come within a unit.

    Attributes:
        unit: its number.
        done: images since the last report of this unit.
        failed: those of them that failed.
        seconds: time since the last report, by stage: ``read``, ``decode``, ``compute``, ``write``. Stages overlap.
    """

    unit: int
    done: int
    failed: int
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Outcome:
    """What became of a unit.

    Attributes:
        unit: its number.
        statuses: how many images have each status.
        problem: why it could not be read to its end; None where it could.
        failures: id and reason of the first images that failed.
        notes: what was passed over, by reason.
        labels: what did not fit together about labels.
    """

    unit: int
    statuses: Mapping[str, int]
    problem: str | None = None
    failures: tuple[tuple[str, str], ...] = ()
    notes: Notes = field(default_factory=Notes)
    labels: LabelNotes = field(default_factory=LabelNotes)


Report = Callable[[Progress], None]


class StaleRunError(ClipfastError):
    """Another run has taken over the collection."""


class Worker:
    """Computes units.

    Args:
        job: what to do.
        model: on its device; None to read it from the job's file.

    Raises:
        InputError: the collection is damaged, or the model is not the one that it is of.
    """

    def __init__(self, job: Job, model: Model | None = None) -> None:
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self._job = job
        self._manifest = Manifest(job.folder)
        self._model = load_model(Path(job.model), job.device) if model is None else model
        expected = self._manifest.settings.model["weights"]
        if self._model.fingerprint() != expected:
            raise InputError(f"{job.model or 'the model'} has other weights than those of {job.folder}")
        mode = self._manifest.settings.preprocessing["mode"]
        leaves_jpegs = mode == "fast" and is_available(self._model.device)
        self._decoder = Decoder(self._model, mode, leaves_jpegs=leaves_jpegs)
        self._decomposer = Decomposer(self._model, self._decoder.levels)

    def run(self, number: int, report: Report | None = None) -> Outcome:
        """Computes a unit and writes its record; when this raises, or the process ends, the unit has not changed.

        Args:
            number: of the unit.
            report: called a few times a second with what was done since the last call.

        Raises:
            StaleRunError: another run has taken over; nothing was written.
            InputError: a single image does not fit into memory, or the plan is damaged.
            OSError: a file cannot be written.
        """
        unit = self._manifest.plan.unit(number)
        if self._job.labeller is not None:
            self._job.labeller.take()  # what an interrupted unit has left
        folder = self._manifest.new_folder(number)
        try:
            return self._run(unit, folder, report or (lambda _: None))
        except BaseException:
            if not self._is_named(unit.number, folder):  # an interrupt may come right after the record is written
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _run(self, unit: Unit, folder: Path, report: Report) -> Outcome:
        settings = self._manifest.settings
        reader = Reader(self._job.inputs, self._job.labeller)
        batches = Batches(self._decoder, settings.batch_size, self._job.threads)
        writer = UnitWriter(folder, settings.kept, Moments(self._model))
        meter = _Meter(unit.number, report, lambda: self._seconds(reader, writer))
        with (
            closing(writer),
            closing(reader.read(unit)) as samples,
            closing(on_device(self._decoder, batches.gather(samples))) as gathered,
            closing(self._decomposer.decompose(gathered)) as parts,
        ):
            for part, contributions in parts:
                writer.write(part, contributions)
                meter.count(len(part), sum(sample.failure is not None for sample in part))
            writer.finish()
        meter.flush()
        record = Record(
            unit=unit.number,
            folder=folder.name,
            statuses=dict(writer.statuses),
            files=files(folder),
            source=reader.source,
            problem=None if reader.problem is None else {"kind": reader.problem.kind, "reason": str(reader.problem)},
        )
        self._commit(record)
        failures = tuple((each.id, each.failure.reason) for each in writer.failures if each.failure is not None)
        problem = None if reader.problem is None else str(reader.problem)
        labels = LabelNotes() if self._job.labeller is None else self._job.labeller.take()
        return Outcome(unit.number, record.statuses, problem, failures, reader.notes, labels)

    def _is_named(self, unit: int, folder: Path) -> bool:
        """Whether the record of a unit names these files; True where that cannot be told."""
        if not self._manifest.record_path(unit).exists():
            return False
        try:
            return self._manifest.record(unit).folder == folder.name
        except (InputError, OSError):
            return True

    def _commit(self, record: Record) -> None:
        """Makes the unit count, and removes the files that counted before it."""
        flush_folder(self._manifest.data)
        with counting(self._job.folder):
            if current_run(self._job.folder) != self._job.run:
                raise StaleRunError(f"{self._job.folder} was taken over by another run")
            old = self._manifest.record(record.unit) if self._manifest.record_path(record.unit).exists() else None
            self._manifest.write(record)
        if old is not None and old.folder != record.folder:
            shutil.rmtree(self._manifest.data / old.folder, ignore_errors=True)

    def _seconds(self, reader: Reader, writer: UnitWriter) -> dict[str, float]:
        return {
            "read": reader.seconds,
            "decode": self._decoder.seconds,
            "compute": self._decomposer.seconds + writer.moments_seconds,
            "write": writer.seconds,
        }


class _Meter:
    """Reports what was done, a few times a second."""

    def __init__(self, unit: int, report: Report, seconds: Callable[[], dict[str, float]]) -> None:
        self._unit, self._report, self._seconds = unit, report, seconds
        self._before = seconds()
        self._done = self._failed = 0
        self._at = time.monotonic()

    def count(self, done: int, failed: int) -> None:
        """Counts images; reports if the last report is long enough ago."""
        self._done += done
        self._failed += failed
        if time.monotonic() - self._at > _BETWEEN_REPORTS:
            self.flush()

    def flush(self) -> None:
        """Reports what is not reported yet."""
        now = self._seconds()
        spent = {stage: now[stage] - self._before[stage] for stage in now}
        self._report(Progress(self._unit, self._done, self._failed, spent))
        self._before, self._done, self._failed, self._at = now, 0, 0, time.monotonic()


def save_model(model: Model, path: Path) -> None:
    """Writes a model, preprocessing included, for the workers of one run.

    Raises:
        InputError: it cannot be pickled.
        OSError: the file cannot be written.
    """
    try:
        with open(path, "wb") as file:
            torch.save(model, file)
    except (TypeError, AttributeError, ValueError, RuntimeError, OSError) as error:
        failure = _failure_of_disk(error)
        if failure is not None:
            raise OSError(failure.errno, failure.strerror, str(path)) from None
        raise InputError(
            f"this model cannot be handed to other processes ({error}): collect with engine='serial'"
        ) from None


def _failure_of_disk(error: BaseException | None) -> OSError | None:
    """The error of a file that an error goes back to: torch raises others in place of it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def load_model(path: Path, device: str) -> Model:
    """Reads what :func:`save_model` wrote: weights on the CPU are pages of the file, which all workers share.

    The file is a pickle: only one that this run wrote is read.
    """
    model: Any = torch.load(path, mmap=True, weights_only=False, map_location="cpu")
    if torch.device(device).type != "cpu":
        model.module.to(device)
    assert isinstance(model, Model)
    return model


def default_threads(workers: int) -> int:
    """Threads of each worker that share the cores of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)
