"""Reading a unit in a thread, ahead of those who decode, within bounded memory."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from clipfast.dataset.inputs.reading import Reading
from clipfast.dataset.labelling import Labeller
from clipfast.dataset.notes import Notes
from clipfast.dataset.plan import Input, Unit, UnitError
from clipfast.dataset.samples import Failure, Sample, Status

_BYTES = 32 << 20
_SAMPLES = 512
_TOGETHER = 16
"""Samples that are handed over at once: waking another thread takes longer than reading a small image."""


class Reader:
    """Reads units.

    Args:
        inputs: of the pass.
        labeller: gives samples their labels and groups, and leaves some out; None where there are no labels.

    Attributes:
        seconds: time spent reading so far.
        problem: why the last unit could not be read to its end, None where it could.
        notes: what was passed over in the last unit.
        source: of the last unit, the shard or the table that was read: ``path``, ``size``, ``version``, ``checksum``.
    """

    def __init__(self, inputs: Sequence[Input], labeller: Labeller | None = None) -> None:
        self._inputs, self._labeller = inputs, labeller
        self.seconds = 0.0
        self.problem: UnitError | None = None
        self.notes, self.source = Notes(), dict[str, Any]()

    def read(self, unit: Unit) -> Iterator[Sample]:
        """The samples of a unit in their order, read ahead in a thread; closing the iterator stops it.

        A second sample with an id that another one of the unit has is given as a failure.
        """
        self.problem, self.notes, self.source = None, Notes(), {}
        ahead = _Ahead(self._samples(unit))
        try:
            yield from ahead
        finally:
            ahead.close()

    def _samples(self, unit: Unit) -> Iterator[Sample]:
        seen: set[str] = set()
        samples = self._inputs[unit.input].read(unit)
        try:
            yield from self._labelled(samples, seen)
        finally:
            if isinstance(samples, Reading):
                self.notes, self.source = samples.notes, dict(samples.source())
                samples.close()

    def _labelled(self, samples: Iterator[Sample], seen: set[str]) -> Iterator[Sample]:
        while True:
            started = time.perf_counter()
            try:
                sample = next(samples, None)
            except UnitError as error:
                self.problem = error
                return
            finally:
                self.seconds += time.perf_counter() - started
            if sample is None:
                return
            labelled = sample if self._labeller is None else self._labeller.apply(sample)
            if labelled is None:
                continue
            if labelled.id in seen:
                labelled = labelled.failed(Failure(Status.DUPLICATE, f"{labelled.id}: another image has this name"))
            seen.add(labelled.id)
            yield replace(labelled, columns={}) if labelled.columns else labelled


class _Ahead:
    """An iterator that a thread fills: at most so many samples and bytes wait at a time."""

    def __init__(self, samples: Iterator[Sample]) -> None:
        self._samples = samples
        self._changed = threading.Condition()
        self._waiting: deque[tuple[list[Sample], int]] = deque()
        self._bytes = self._count = 0
        self._done = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="clipfast-reader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Sample]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._done)
                if not self._waiting:
                    break
                samples, size = self._waiting.popleft()
                self._bytes -= size
                self._count -= len(samples)
                self._changed.notify_all()
            yield from samples
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stops the thread and waits for it."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            together: list[Sample] = []
            for sample in self._samples:
                together.append(sample)
                if len(together) == _TOGETHER or _size(together) > _BYTES // 8:
                    if not self._hand_over(together):
                        return
                    together = []
            if together:
                self._hand_over(together)
        except BaseException as error:
            self._error = error
        finally:
            with suppress(Exception):
                self._samples.close()  # type: ignore[attr-defined]
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _hand_over(self, samples: list[Sample]) -> bool:
        """Whether the samples are wanted; waits until there is room."""
        size = _size(samples)
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or not self._waiting
                    or (self._bytes + size <= _BYTES and self._count + len(samples) <= _SAMPLES)
                )
            )
            if self._closed:
                return False
            self._waiting.append((samples, size))
            self._bytes += size
            self._count += len(samples)
            self._changed.notify_all()
        return True


def _size(samples: Sequence[Sample]) -> int:
    return sum(len(sample.content) for sample in samples if isinstance(sample.content, bytes))
