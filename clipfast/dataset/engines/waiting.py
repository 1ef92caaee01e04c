"""The units of a pass that wait for a worker, and those at which workers end."""

from collections import Counter, deque
from collections.abc import Sequence

from clipfast.dataset.manifest import Manifest, Record
from clipfast.dataset.worker import Outcome
from clipfast.errors import ClipfastError, InputError
from clipfast.inputs import printable

ATTEMPTS = 3
"""So many workers may end at a unit, one after the other, before it is given up; and at their start, in one place."""


class LostWorkersError(ClipfastError):
    """Workers end again and again: at one unit, or before they begin."""


class Waiting:
    """Hands out units; one whose worker ended goes to the end of the line, unless its record was written before.

    Args:
        units: their numbers, in the order in which they are handed out.
        manifest: has their records.
    """

    def __init__(self, units: Sequence[int], manifest: Manifest) -> None:
        self._manifest = manifest
        self._waiting = deque(units)
        self._taken: dict[int, Record | None] = {}  # the record that a unit had before
        self._lost: Counter[int] = Counter()
        self._given_up: dict[int, str] = {}

    def __len__(self) -> int:
        """Units that wait."""
        return len(self._waiting)

    @property
    def done(self) -> bool:
        """Whether no unit waits and none is being computed."""
        return not self._waiting and not self._taken

    def take(self) -> int | None:
        """The next unit; None where none waits."""
        if not self._waiting:
            return None
        unit = self._waiting.popleft()
        self._taken[unit] = self._record(unit)
        return unit

    def finished(self, unit: int) -> None:
        """Notes that a unit that was taken has its record."""
        del self._taken[unit]

    def lost(self, unit: int, reason: str) -> Outcome | None:
        """Notes that the worker of a unit has ended; another one gets the unit, unless it has ended too many.

        Args:
            unit: its number.
            reason: how the worker ended.

        Returns:
            What became of the unit where its worker had written its record and not yet said so; else None.
        """
        before, record = self._taken.pop(unit), self._record(unit)
        if record is not None and (before is None or record.folder != before.folder):
            return Outcome(unit, record.statuses, None if record.problem is None else record.problem["reason"])
        self._lost[unit] += 1
        if self._lost[unit] < ATTEMPTS:
            self._waiting.append(unit)
        else:
            self._given_up[unit] = reason
        return None

    def raise_given_up(self) -> None:
        """Raises if units were given up.

        Raises:
            LostWorkersError: with the first of these units, and how its last worker ended.
        """
        if not self._given_up:
            return
        number = min(self._given_up)
        path = next(self._manifest.plan.units([number], files=False)).path
        others = f", and so were those of {len(self._given_up) - 1} other units" if len(self._given_up) > 1 else ""
        raise LostWorkersError(
            f"unit {number}{f' ({printable(path)})' if path else ''}: {ATTEMPTS} workers were lost at it, the last one "
            f"{self._given_up[number]}{others}: all other units are done; mend the images, or give workers more "
            "memory, and run it again"
        )

    def _record(self, unit: int) -> Record | None:
        """The record of a unit; None where there is none that can be read."""
        if not self._manifest.record_path(unit).exists():
            return None
        try:
            return self._manifest.record(unit)
        except (InputError, OSError):
            return None
