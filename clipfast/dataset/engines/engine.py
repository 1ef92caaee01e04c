"""What an engine is: it has units computed, and tells what became of them."""

from collections.abc import Sequence
from typing import Protocol

from clipfast.dataset.manifest import Manifest
from clipfast.dataset.worker import Job, Outcome, Progress


class Events(Protocol):
    """Who wants to know how a pass goes on; called in the thread that runs the engine."""

    def began(self, manifest: Manifest, units: Sequence[int]) -> None:
        """A pass begins: these units of the collection will be computed."""

    def progressed(self, worker: str, progress: Progress) -> None:
        """A worker has computed some images of a unit. May raise to end the pass."""

    def finished(self, outcome: Outcome) -> None:
        """A unit has its record. May raise to end the pass."""

    def lost(self, worker: str, unit: int, reason: str) -> None:
        """A worker ended in the middle of a unit, which another one will compute. May raise to end the pass."""


class Engine(Protocol):
    """Computes units with workers of some kind."""

    def run(self, job: Job, units: Sequence[int], events: Events) -> None:
        """Has every unit computed; returns when all have their records.

        When this raises, or is interrupted by an exception that a signal's handler raises, all workers have ended, and
        the units that they were at have not changed.

        Raises:
            ClipfastError: a unit cannot be computed, or no worker can be started.
            OSError: a file cannot be written.
        """
