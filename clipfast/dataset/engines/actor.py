"""A worker of the Ray engine: an actor that computes units, and says how far it is while it does."""

import logging
import os
import pickle
import platform
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from pathlib import Path

from clipfast.dataset.engines.raised import Raised
from clipfast.dataset.manifest import current_run
from clipfast.dataset.worker import Job, Outcome, Progress, Worker
from clipfast.errors import InputError
from clipfast.inputs import printable

_PATIENCE = 60.0  # seconds, for a network file system to show a file that another node has replaced
_MOST = 1000  # reports that wait


@dataclass(frozen=True)
class Begin:
    """What an actor needs first.

    Attributes:
        job: a pickled :class:`~clipfast.dataset.worker.Job`.
        path: where the driver finds modules.
        device: where the actor computes.
        threads: that it computes with.
        level: of the driver's logger.
        landmarks: files and folders of the images that the driver sees.
    """

    job: bytes
    path: Sequence[str]
    device: str
    threads: int
    level: int
    landmarks: Sequence[str]


@dataclass(frozen=True)
class Started:
    """Where a worker runs.

    Attributes:
        host: name of the machine.
        pid: its process id there.
    """

    host: str
    pid: int


Report = Progress | logging.LogRecord


class Actor:
    """What Ray makes an actor of. ``start`` and ``run`` are called in one thread, ``reports`` in another one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reports: list[Report] = []
        self._worker: Worker | None = None

    def start(self, begin: Begin) -> Started | Raised:
        """Loads the model."""
        try:
            sys.path.extend(path for path in begin.path if path not in sys.path)
            logger = logging.getLogger("clipfast")
            logger.setLevel(begin.level)
            logger.propagate = False
            logger.handlers[:] = [_Keeping(self._report)]
            job: Job = pickle.loads(begin.job)
            check_sees(job.folder, job.run, begin.landmarks)
            self._worker = Worker(replace(job, device=begin.device, threads=begin.threads))
        except BaseException as error:
            return Raised.of(error)
        return Started(platform.node(), os.getpid())

    def run(self, unit: int) -> tuple[Outcome | Raised, list[Report]]:
        """Computes a unit; also gives the reports that nobody has asked for."""
        assert self._worker is not None
        try:
            return self._worker.run(unit, self._report), self.reports()
        except BaseException as error:
            return Raised.of(error), self.reports()

    def reports(self) -> list[Report]:
        """What was done since the last call."""
        with self._lock:
            reports, self._reports = self._reports, []
        return reports

    def _report(self, report: Report) -> None:
        with self._lock:
            if len(self._reports) < _MOST:
                self._reports.append(report)


class _Keeping(QueueHandler):
    """Keeps log records as text."""

    def __init__(self, keep: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._keep = keep

    def enqueue(self, record: logging.LogRecord) -> None:
        """Keeps a record."""
        self._keep(record)


def check_sees(folder: Path, run: str, landmarks: Sequence[str]) -> None:
    """Checks that this node sees the collection and the images.

    Args:
        folder: the collection.
        run: the name of the run.
        landmarks: files and folders of the images.

    Raises:
        InputError: it does not.
    """
    node = f"node {platform.node()} of the Ray cluster"
    deadline = time.monotonic() + _PATIENCE
    while (found := current_run(folder)) != run:
        if found is None or time.monotonic() > deadline:
            what = "does not see" if found is None else "sees another collection in"
            raise InputError(f"{node} {what} {folder}: give an --out on a file system that all its nodes share")
        time.sleep(1)
    for path in landmarks:
        if not os.path.exists(path):
            raise InputError(
                f"{node} does not see {printable(path)}: put the images on a file system that all its nodes share"
            )
