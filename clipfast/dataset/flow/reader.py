"""Reading a unit in a thread, ahead of those who decode, within bounded memory."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image

from clipfast.dataset.flow.ahead import Ahead
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

    def read(self, unit: Unit) -> Ahead[Sample]:
        """The samples of a unit in their order, read ahead in a thread; closing what is returned stops it.

        A second sample with an id that another one of the unit has is given as a failure.
        """
        self.problem, self.notes, self.source = None, Notes(), {}
        return Ahead(self._samples(unit), _SAMPLES, size=_size, most_bytes=_BYTES, together=_TOGETHER, name="reader")

    def _samples(self, unit: Unit) -> Iterator[Sample]:
        samples = self._inputs[unit.input].read(unit)
        try:
            yield from self._labelled(self._timed(samples))
        finally:
            if isinstance(samples, Reading):
                self.notes, self.source = samples.notes, dict(samples.source())
                samples.close()

    def _timed(self, samples: Iterator[Sample]) -> Iterator[Sample]:
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
            yield sample

    def _labelled(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        seen: set[str] = set()
        for sample in samples:
            labelled = sample if self._labeller is None else self._labeller.apply(sample)
            if labelled is None:
                continue
            if labelled.id in seen:
                labelled = labelled.failed(Failure(Status.DUPLICATE, f"{labelled.id}: another image has this name"))
            seen.add(labelled.id)
            yield replace(labelled, columns={}) if labelled.columns else labelled


def _size(sample: Sample) -> int:
    """Bytes of memory that a sample holds, about."""
    content = sample.content
    if isinstance(content, Image.Image):
        return content.width * content.height * len(content.getbands())
    return 0 if content is None else len(content)
