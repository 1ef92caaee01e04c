"""Writing what a unit leaves: moments, a table of its images, and arrays."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from clipfast.analyses.moments import Moments
from clipfast.contributions import Contributions
from clipfast.dataset.arrays import ArrayWriter
from clipfast.dataset.images_table import ImageTable
from clipfast.dataset.samples import Sample, Status
from clipfast.files import flush_tree

MOMENTS = "moments.safetensors"


class UnitWriter:
    """Takes the parts of one unit.

    Args:
        folder: a new folder for its files.
        kept: what is kept per image, and in which dtype.
        moments: empty ones of the model.

    Attributes:
        statuses: how many images have each status.
        failures: the first images that failed.
        seconds: time spent writing so far.
        moments_seconds: time spent on the moments so far.
    """

    def __init__(self, folder: Path, kept: Mapping[str, str | None], moments: Moments) -> None:
        self._folder, self._moments = folder, moments
        self._table = ImageTable(folder)
        self._arrays = ArrayWriter(folder, kept) if any(kept.values()) else None
        self.statuses: Counter[str] = Counter()
        self.failures: list[Sample] = []
        self.seconds = self.moments_seconds = 0.0

    def write(self, samples: Sequence[Sample], contributions: Contributions | None) -> None:
        """Takes samples, and the contributions of those without a failure, in their order.

        Raises:
            OSError: a file cannot be written.
        """
        started = time.perf_counter()
        if contributions is not None:
            self._moments.update(contributions)
            contributions = contributions.cpu()
            self.moments_seconds += time.perf_counter() - started
            started = time.perf_counter()
        for sample in samples:
            status = Status.OK if sample.failure is None else sample.failure.status
            self.statuses[status.value] += 1
            if sample.failure is not None and len(self.failures) < 20:
                self.failures.append(sample)
        self._table.add(samples, contributions)
        if contributions is not None and self._arrays is not None:
            self._arrays.add(contributions)
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Writes what waits, and flushes every file to the disk.

        Raises:
            OSError: a file cannot be written.
        """
        self._moments.settle()
        started = time.perf_counter()
        if self._arrays is not None:
            self._arrays.finish()
        self._table.finish()
        if self._moments.count:
            self._moments.save(self._folder / MOMENTS, with_basis=False)
        flush_tree(self._folder)
        self.seconds += time.perf_counter() - started
