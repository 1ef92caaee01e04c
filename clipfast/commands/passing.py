"""What the user sees of a pass: a line for every image that failed, and progress."""

from collections.abc import Sequence

from clipfast.commands import console
from clipfast.commands.interrupts import Interrupts
from clipfast.commands.quantities import plural
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.worker import Outcome, Progress


class Shown:
    """Events of a pass on stderr.

    Args:
        interrupts: end the pass when a signal has arrived that a library swallowed.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts

    def began(self, manifest: Manifest, units: Sequence[int]) -> None:
        """Says how much is done already."""
        done = len(manifest.finished().difference(units))
        if done:
            have = plural(sum(record.count for record in manifest.records()), "image")
            console.note(f"{done} of {manifest.plan.count} units ({have}) were collected before")

    def progressed(self, worker: str, progress: Progress) -> None:
        """Ends the pass where a signal has arrived."""
        self._interrupts.check()

    def finished(self, outcome: Outcome) -> None:
        """Names the images of a unit that failed."""
        for _, reason in outcome.failures:
            console.error(reason)
        more = sum(outcome.statuses.values()) - outcome.statuses.get("ok", 0) - len(outcome.failures)
        if more:
            console.error(f"{more} more images of the same unit failed")
        if outcome.problem is not None:
            console.error(outcome.problem)
        self._interrupts.check()

    def lost(self, worker: str, unit: int, reason: str) -> None:
        """Warns about a worker that ended."""
        console.warn(f"worker {worker} ended in the middle of unit {unit} ({reason}): another one computes it")
