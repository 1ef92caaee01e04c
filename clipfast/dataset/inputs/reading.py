"""Reading a unit: its samples one at a time, and afterwards what was read and what was passed over."""

from collections.abc import Callable, Generator, Iterator
from typing import Any

from clipfast.dataset.notes import Notes
from clipfast.dataset.samples import Failure, Sample, Status

Samples = Generator[Sample, None, None]


class Reading(Iterator[Sample]):
    """The samples of a unit, in a fixed order; an id that occurs again is given as a failure.

    Args:
        read: gives the samples of this reading. It fills :attr:`notes`, and :meth:`source` when it is at the end.

    Attributes:
        notes: what was passed over so far.
    """

    def __init__(self, read: Callable[["Reading"], Samples]) -> None:
        self.notes = Notes()
        self.read_from: dict[str, Any] = {}
        self._ids: set[str] = set()
        self._samples = read(self)

    def __next__(self) -> Sample:
        sample = next(self._samples)
        if sample.id not in self._ids:
            self._ids.add(sample.id)
        elif sample.failure is None:
            return sample.failed(Failure(Status.DUPLICATE, "another image of the same unit has its name"))
        return sample

    def source(self) -> dict[str, Any]:
        """``path``, ``size``, ``version`` and ``checksum`` of the file that was read to its end; else empty.

        ``checksum`` is the XXH3-128 of all its bytes, 32 hexadecimal digits; for a part of a table it is None.
        """
        return self.read_from

    def close(self) -> None:
        """Closes what is open."""
        self._samples.close()
