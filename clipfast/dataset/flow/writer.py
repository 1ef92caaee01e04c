"""Writing what a unit leaves: moments, a table of its images, and arrays."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from clipfast.analyses.moments import Moments
from clipfast.contributions import Contributions
from clipfast.dataset.arrays import ArrayWriter
from clipfast.dataset.images_table import ImageTable
from clipfast.dataset.samples import Sample, Status
from clipfast.files import flush_tree

MOMENTS = "moments.safetensors"
_WAITING = 4
"""Parts that wait to be written."""
_SHOWN = 20


class UnitWriter:
    """Takes the parts of one unit. A thread writes the table and the arrays.

    Args:
        folder: a new folder for its files.
        kept: what is kept per image, and in which dtype.
        moments: empty ones of the model.

    Raises:
        OSError: a file cannot be written.

    Attributes:
        statuses: how many images have each status.
        failures: the first images that failed.
        seconds: time spent writing so far.
        moments_seconds: time spent on the moments so far.
    """

    def __init__(self, folder: Path, kept: Mapping[str, str | None], moments: Moments) -> None:
        self._folder, self._moments = folder, moments
        with _naming(folder):
            self._table = ImageTable(folder)
            self._arrays = ArrayWriter(folder, kept) if any(kept.values()) else None
        self.statuses: Counter[str] = Counter()
        self.failures: list[Sample] = []
        self.seconds = self.moments_seconds = 0.0
        self._parts: Queue[_Part | None] = Queue(_WAITING)
        self._error: BaseException | None = None
        self._closed = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._thread = threading.Thread(target=self._run, name="clipfast-writer", daemon=True)
        self._thread.start()

    def write(self, samples: Sequence[Sample], contributions: Contributions | None) -> None:
        """Takes samples, and the contributions of those without a failure, in their order.

        Waits where several parts are not written yet. On a GPU it does not wait for the contributions.

        Raises:
            InputError: a number that is too large for the dtype that is kept; perhaps of an earlier part.
            OSError: a file cannot be written; perhaps one of an earlier part.
        """
        if contributions is not None:
            started = time.perf_counter()
            self._moments.update(contributions)
            self.moments_seconds += time.perf_counter() - started
        for sample in samples:
            status = Status.OK if sample.failure is None else sample.failure.status
            self.statuses[status.value] += 1
            if sample.failure is not None and len(self.failures) < _SHOWN:
                self.failures.append(sample)
        self._parts.put(_Part(samples, contributions))
        self._raise()

    def finish(self) -> None:
        """Writes what waits, and flushes every file to the disk.

        Raises:
            InputError: as :meth:`write`; or contributions that are not finite.
            OSError: a file cannot be written.
        """
        self._end()
        self._raise()
        started = time.perf_counter()
        self._moments.settle()
        self.moments_seconds += time.perf_counter() - started
        started = time.perf_counter()
        with _naming(self._folder):
            if self._arrays is not None:
                self._arrays.finish()
            self._table.finish()
            if self._moments.count:
                self._moments.save(self._folder / MOMENTS, with_basis=False)
            flush_tree(self._folder)
        self.seconds += time.perf_counter() - started

    def close(self) -> None:
        """Ends the thread; what it has not written yet is dropped. Nothing to do after :meth:`finish`."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._parts.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        part = self._parts.get()
        while part is not None:
            if self._error is None and not self._closed:  # else parts are taken all the same: nobody may wait for room
                started = time.perf_counter()
                try:
                    self._write(part)
                except BaseException as error:
                    self._error = error
                self.seconds += time.perf_counter() - started
            part = None  # it may hold memory of a GPU
            part = self._parts.get()

    def _write(self, part: "_Part") -> None:
        with _naming(self._folder), part.on_device(self._streams):
            self._table.add(part.samples, part.contributions)
            if part.contributions is not None and self._arrays is not None:
                self._arrays.add(part.contributions)


class _Part:
    """Samples with their contributions, which a GPU may still be at."""

    def __init__(self, samples: Sequence[Sample], contributions: Contributions | None) -> None:
        self.samples, self.contributions = samples, contributions
        self._ready: torch.cuda.Event | None = None
        if contributions is not None and contributions.codes.is_cuda:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(contributions.codes.device))

    def on_device(self, streams: dict[torch.device, torch.cuda.Stream]) -> Any:
        """A block that copies them without waiting for what was queued after them."""
        if self._ready is None or self.contributions is None:
            return nullcontext()
        device = self.contributions.codes.device
        stream = streams.get(device)
        if stream is None:
            stream = streams[device] = torch.cuda.Stream(device)
        stream.wait_event(self._ready)
        return torch.cuda.stream(stream)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Gives an error of a file the name of the folder where the error itself has none, as those of Parquet and Zarr."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(folder)) from error
