"""What a tracker makes of a pass's events, with a clock that the test sets."""

import pytest

from clipfast.dataset.plan import Unit
from clipfast.dataset.progress import WINDOW, Tracker
from clipfast.dataset.worker import Outcome, Progress


class Clock:
    def __init__(self) -> None:
        self.now = 1000.25

    def __call__(self) -> float:
        return self.now


def ranges(*sizes: int) -> list[Unit]:
    return [Unit("files", "", start=7, stop=7 + size, number=number) for number, size in enumerate(sizes)]


def shards(*sizes: int | None) -> list[Unit]:
    return [Unit("shard", f"{number}.tar", size=size, number=number) for number, size in enumerate(sizes)]


def report(unit: int, done: int, failed: int = 0, **seconds: float) -> Progress:
    return Progress(unit, done, failed, seconds)


def outcome(unit: int, ok: int, failed: int = 0) -> Outcome:
    return Outcome(unit, {"ok": ok, "decode_error": failed} if failed else {"ok": ok})


def test_nothing_is_known_before_the_first_report() -> None:
    clock = Clock()
    tracker = Tracker(ranges(100, 50), ["cuda:0"], clock)
    clock.now += 5
    now = tracker.snapshot()
    assert (now.seconds, now.images, now.units, now.all_units, now.rate, now.left) == (5, 0, 0, 2, 0, None)
    assert (now.shares, now.devices) == ({}, ("cuda:0",))
    assert tracker.mean_rate() is None


def test_rate_shares_and_time_left_of_ranges() -> None:
    """30 images by the first report; then 10 a second: 60 of 150 are left after 9 seconds, so 6 seconds."""
    clock = Clock()
    tracker = Tracker(ranges(100, 50), clock=clock)
    clock.now += 20  # the model is loaded
    tracker.progressed("0", report(0, 30, 1, read=1, decode=2, compute=4, write=1))
    for _ in range(6):
        clock.now += 1
        tracker.progressed("0", report(0, 10, read=1, decode=2, compute=4, write=1))
    now = tracker.snapshot()
    assert (now.images, now.failed, now.units) == (90, 1, 0)
    assert now.rate == pytest.approx(10)
    assert now.left == pytest.approx(6)
    assert now.shares == pytest.approx({"read": 1 / 8, "decode": 2 / 8, "compute": 4 / 8, "write": 1 / 8})
    tracker.finished(outcome(0, 97, 3))
    now = tracker.snapshot()
    assert (now.images, now.failed, now.units) == (100, 3, 1)


def test_the_rate_is_that_of_the_last_minute() -> None:
    clock = Clock()
    tracker = Tracker(ranges(100_000), clock=clock)
    for _ in range(100):  # 100 a second, then 5 a second
        clock.now += 1
        tracker.progressed("0", report(0, 100))
    assert tracker.snapshot().rate == pytest.approx(100, rel=0.02)
    for _ in range(WINDOW + 1):
        clock.now += 1
        tracker.progressed("0", report(0, 5))
    assert tracker.snapshot().rate == pytest.approx(5, rel=0.02)
    assert tracker.mean_rate() == pytest.approx((99 * 100 + (WINDOW + 1) * 5) / (99 + WINDOW + 1))
    clock.now += WINDOW + 1  # nothing comes any more
    assert tracker.snapshot().rate == 0
    assert tracker.snapshot().left is None


def test_shards_are_estimated_from_those_that_are_finished() -> None:
    """Two images per 1000 bytes: 4000 bytes are left, 8 images, of which 3 are done."""
    clock = Clock()
    tracker = Tracker(shards(1000, 1000, 4000), clock=clock)
    clock.now += 1
    tracker.progressed("a", report(0, 1))
    assert tracker.snapshot().left is None
    clock.now += 1
    tracker.finished(outcome(0, 2))
    tracker.finished(outcome(1, 2))
    clock.now += 1
    tracker.progressed("b", report(2, 3))
    now = tracker.snapshot()
    assert now.images == 7
    assert now.left == pytest.approx((8 - 3) / now.rate)
    clock.now += 1
    tracker.finished(outcome(2, 20))
    assert tracker.snapshot().left == 0


def test_shards_of_unknown_size_count_alike() -> None:
    clock = Clock()
    tracker = Tracker(shards(None, None, None), clock=clock)
    clock.now += 1
    tracker.progressed("a", report(0, 5))
    clock.now += 1
    tracker.progressed("a", report(0, 5))
    tracker.finished(outcome(0, 10))
    assert tracker.snapshot().left == pytest.approx(20 / tracker.snapshot().rate)


def test_ranges_of_which_labels_leave_images_out() -> None:
    """Half of the images of the first range are kept: so half of the second is expected."""
    clock = Clock()
    tracker = Tracker(ranges(100, 100), clock=clock)
    clock.now += 1
    tracker.progressed("a", report(0, 10))
    clock.now += 4
    tracker.progressed("a", report(0, 40))
    tracker.finished(outcome(0, 50))
    assert tracker.snapshot().left == pytest.approx(50 / 10)


def test_a_lost_worker_takes_back_what_it_had_computed() -> None:
    clock = Clock()
    tracker = Tracker(ranges(100, 100), clock=clock)
    clock.now += 1
    tracker.progressed("a", report(0, 60, 2))
    tracker.progressed("b", report(1, 10))
    tracker.lost("a", 0, "killed")
    now = tracker.snapshot()
    assert (now.images, now.failed, now.lost, now.units) == (10, 0, 1, 0)
    clock.now += 1
    tracker.progressed("b", report(0, 5))
    tracker.finished(outcome(0, 100))
    tracker.finished(outcome(1, 90, 10))
    now = tracker.snapshot()
    assert (now.images, now.failed, now.units, now.left) == (200, 10, 2, 0)


def test_a_snapshot_as_json() -> None:
    clock = Clock()
    tracker = Tracker(ranges(10), ["cpu"], clock)
    clock.now += 2
    tracker.progressed("0", report(0, 4, 1, read=1, compute=2))
    assert tracker.snapshot().to_json() == {
        "seconds": 2.0,
        "images": 4,
        "failed": 1,
        "units": 0,
        "all_units": 1,
        "lost": 0,
        "images_per_second": 2.0,
        "shares": {"read": 0.333, "decode": 0.0, "compute": 0.667, "write": 0.0},
        "seconds_left": 3.0,
        "workers": 1,
        "devices": ["cpu"],
    }
