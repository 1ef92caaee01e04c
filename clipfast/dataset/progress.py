"""How far a pass has come: images per second, the stages' shares of the time, and the time that is left.

One thread tells a :class:`Tracker` what happens; any other thread may ask it for a :class:`Snapshot` at any time.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clipfast.dataset.manifest import Manifest
from clipfast.dataset.plan import Unit
from clipfast.dataset.samples import Status
from clipfast.dataset.worker import Outcome, Progress

STAGES = ("read", "decode", "compute", "write")
"""Stages of a pass, as workers report them."""
WINDOW = 60
"""Seconds over which the rate and the shares are taken."""


@dataclass(frozen=True)
class Snapshot:
    """How far a pass has come.

    Attributes:
        seconds: since the pass began.
        images: that were read, also those that failed, by this run.
        failed: of these.
        units: that this run has finished.
        all_units: that this run computes.
        lost: how often a worker ended in the middle of a unit.
        rate: images per second over the last minute.
        shares: of the time that threads of all workers spent over the last minute: reading, decoding, computing,
            writing. They sum to 1; empty before the first report.
        left: seconds until the pass is done at this rate; None where that cannot be told yet.
        workers: that have computed something so far.
        devices: where workers compute.
    """

    seconds: float
    images: int
    failed: int
    units: int
    all_units: int
    lost: int
    rate: float
    shares: Mapping[str, float]
    left: float | None
    workers: int
    devices: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """One line of JSON's content; times in seconds."""
        return {
            "seconds": round(self.seconds, 1),
            "images": self.images,
            "failed": self.failed,
            "units": self.units,
            "all_units": self.all_units,
            "lost": self.lost,
            "images_per_second": round(self.rate, 2),
            "shares": {stage: round(share, 3) for stage, share in self.shares.items()},
            "seconds_left": None if self.left is None else round(self.left, 1),
            "workers": self.workers,
            "devices": list(self.devices),
        }


class _Sizes:
    """How many images units have: known of ranges, of shards estimated from those that are finished."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._weights = {unit.number: _weight(unit) for unit in units}
        self._left: dict[str, float] = {}
        for kind, weight in self._weights.values():
            self._left[kind] = self._left.get(kind, 0) + weight
        self._finished: dict[str, list[float]] = {kind: [0, 0] for kind in self._left}  # images and weight

    @property
    def count(self) -> int:
        """How many units there are."""
        return len(self._weights)

    def finish(self, unit: int, images: int) -> None:
        """A unit turned out to have so many images."""
        kind, weight = self._weights[unit]
        self._left[kind] -= weight
        self._finished[kind][0] += images
        self._finished[kind][1] += weight

    def images_left(self) -> float | None:
        """Images of the units that are not finished; None where nothing tells yet."""
        total = 0.0
        for kind, left in self._left.items():
            if left <= 0:
                continue
            images, weight = self._finished[kind]
            if not weight and kind != "images":
                return None
            total += left * (images / weight if weight else 1)
        return total


def _weight(unit: Unit) -> tuple[str, float]:
    """What the number of a unit's images goes with, and how much of it the unit has."""
    if unit.stop > unit.start:
        return "images", unit.stop - unit.start
    if unit.files:
        return "images", len(unit.files)
    return ("bytes", unit.size) if unit.size else ("shards", 1)


@dataclass
class _Second:
    """What was reported within one second."""

    at: int
    images: int = 0
    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


@dataclass(frozen=True)
class _Totals:
    """Everything that a snapshot is made of; replaced as a whole, so that other threads need no lock."""

    images: int = 0
    failed: int = 0
    units: int = 0
    lost: int = 0
    images_left: float | None = None
    first: tuple[float, int] | None = None  # time of the first report, and its images
    last: float = 0.0
    window: tuple[tuple[int, int, tuple[float, ...]], ...] = ()


class Tracker:
    """Counts what engines tell (:class:`~clipfast.dataset.engines.engine.Events`).

    Args:
        units: that this run computes; their files are not needed.
        devices: where workers compute.
        clock: seconds, from any start.
    """

    def __init__(
        self, units: Iterable[Unit], devices: Iterable[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sizes = _Sizes(units)
        self._devices, self._clock = tuple(devices), clock
        self._begun: dict[int, tuple[int, int]] = {}  # unit → images and failures that were reported of it
        self._workers: set[str] = set()
        self._window: deque[_Second] = deque()
        self._started = clock()
        self._latest = _Totals(images_left=self._sizes.images_left())
        self._finished = [0, 0]

    def began(self, manifest: Manifest, units: Sequence[int]) -> None:
        """Nothing: the units are known."""

    def progressed(self, worker: str, progress: Progress) -> None:
        """A worker has computed some images of a unit."""
        done, failed = self._begun.get(progress.unit, (0, 0))
        self._begun[progress.unit] = done + progress.done, failed + progress.failed
        self._workers.add(worker)
        self._count(progress.done, progress.seconds)

    def finished(self, outcome: Outcome) -> None:
        """A unit has its record."""
        total = sum(outcome.statuses.values())
        done, _ = self._begun.pop(outcome.unit, (0, 0))
        self._finished[0] += total
        self._finished[1] += total - outcome.statuses.get(Status.OK, 0)
        self._sizes.finish(outcome.unit, total)
        self._count(max(0, total - done), {}, units=1)

    def lost(self, worker: str, unit: int, reason: str) -> None:
        """A worker ended in the middle of a unit: what it had computed of it does not count."""
        self._begun.pop(unit, None)
        self._count(0, {}, lost=1)

    def _count(self, images: int, seconds: Mapping[str, float], units: int = 0, lost: int = 0) -> None:
        now, before = self._clock(), self._latest
        if not self._window or self._window[-1].at != int(now):
            self._window.append(_Second(int(now)))
        second = self._window[-1]
        second.images += images
        for stage in STAGES:
            second.stages[stage] += seconds.get(stage, 0.0)
        while self._window[0].at < int(now) - WINDOW:
            self._window.popleft()
        begun = sum(done for done, _ in self._begun.values())
        left = self._sizes.images_left()
        self._latest = _Totals(
            images=self._finished[0] + begun,
            failed=self._finished[1] + sum(failed for _, failed in self._begun.values()),
            units=before.units + units,
            lost=before.lost + lost,
            images_left=None if left is None else max(0.0, left - begun),
            first=before.first or ((now, images) if images else None),
            last=now if images else before.last,
            window=tuple((each.at, each.images, tuple(each.stages.values())) for each in self._window),
        )

    def snapshot(self) -> Snapshot:
        """How far the pass has come now; may be called from any thread."""
        latest, now = self._latest, self._clock()
        recent = [each for each in latest.window if each[0] > now - WINDOW]
        rate = self._rate(latest, now, sum(images for _, images, _ in recent))
        spent = [sum(stages[place] for _, _, stages in recent) for place in range(len(STAGES))]
        total = sum(spent)
        done = latest.units == self._sizes.count
        left = latest.images_left
        return Snapshot(
            seconds=now - self._started,
            images=latest.images,
            failed=latest.failed,
            units=latest.units,
            all_units=self._sizes.count,
            lost=latest.lost,
            rate=rate,
            shares={stage: share / total for stage, share in zip(STAGES, spent, strict=True)} if total > 0 else {},
            left=0.0 if done else left / rate if left is not None and rate > 0 else None,
            workers=len(self._workers),
            devices=self._devices,
        )

    def _rate(self, latest: _Totals, now: float, recent: int) -> float:
        """Images per second over the window; a pass younger than that counts from its first report on."""
        if latest.first is None:
            return 0.0
        first, images = latest.first
        if now - first > WINDOW:
            return recent / WINDOW
        if recent > images and now > first:
            return (recent - images) / (now - first)
        return recent / max(now - self._started, 1e-9)

    def mean_rate(self) -> float | None:
        """Images per second from the first report to the last, without the time that workers take to start.

        Returns:
            None where fewer than two reports had images.
        """
        latest = self._latest
        if latest.first is None or latest.last <= latest.first[0]:
            return None
        at, images = latest.first
        return max(0, latest.images - images) / (latest.last - at) or None
