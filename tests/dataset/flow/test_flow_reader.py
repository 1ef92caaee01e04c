"""Reading ahead: everything in order, bounded, and no thread left behind."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from flow_parts import UNIT, WAIT, Held, sample, threads

from clipfast.dataset.flow import reader as reading
from clipfast.dataset.flow.ahead import Ahead
from clipfast.dataset.flow.reader import Reader
from clipfast.dataset.labelling import Labeller
from clipfast.dataset.plan import UnitError
from clipfast.dataset.samples import Sample, Status


def until(condition: object) -> None:
    end = time.monotonic() + WAIT
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_every_sample_comes_once_and_in_order(count: int) -> None:
    held = Held(sample(number, b"x") for number in range(count))
    with closing(Reader([held]).read(UNIT)) as samples:
        assert [each.id for each in samples] == [f"{number:04}.jpg" for number in range(count)]
    assert held.closed
    assert threads() == []


def test_columns_are_dropped_after_they_gave_the_label() -> None:
    columns = [{"label": f"c{number}", "kept": "no" if number % 2 else "yes"} for number in range(6)]
    made = [Sample(f"{number}", "/a", columns=each) for number, each in enumerate(columns)]
    labeller = Labeller("columns", where={"kept": "yes"})
    with closing(Reader([Held(made)], labeller).read(UNIT)) as samples:
        given = [(each.id, each.label, each.columns) for each in samples]
    assert given == [("0", "c0", {}), ("2", "c2", {}), ("4", "c4", {})]


def test_a_name_that_occurs_again_is_a_failure() -> None:
    with closing(Reader([Held([sample(1, b"a"), sample(2, b"b"), sample(1, b"c")])]).read(UNIT)) as samples:
        given = list(samples)
    assert [each.failure and each.failure.status for each in given] == [None, None, Status.DUPLICATE]


def test_a_slow_consumer_holds_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(sample(number, b"x" * 100) for number in range(5000))
    with closing(Reader([held]).read(UNIT)) as samples:
        next(samples)
        until(lambda: held.given >= reading._SAMPLES)
        time.sleep(0.1)
        assert held.given <= reading._SAMPLES + 3 * reading._TOGETHER
        taken = 1 + sum(1 for _ in samples)
    assert taken == 5000


def test_large_samples_hold_it_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BYTES", 8000)
    held = Held(sample(number, b"x" * 3000) for number in range(40))
    with closing(Reader([held]).read(UNIT)) as samples:
        next(samples)
        until(lambda: held.given >= 3)
        time.sleep(0.1)
        assert held.given <= 5  # one taken, two that wait, one to be handed over
        assert sum(1 for _ in samples) == 39


def test_a_unit_that_is_cut_gives_the_samples_before(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader([Held((sample(number, b"x") for number in range(20)), UnitError("damaged", "cut"))])
    with closing(reader.read(UNIT)) as samples:
        assert len(list(samples)) == 20
    assert str(reader.problem) == "cut"
    with closing(Reader([Held([])]).read(UNIT)) as samples:
        assert list(samples) == []


def test_what_reading_raises_reaches_the_caller_after_the_samples_before() -> None:
    reader = Reader([Held((sample(number, b"x") for number in range(20)), KeyError("mistake"))])
    with closing(reader.read(UNIT)) as samples:
        assert [next(samples).id for _ in range(20)] == [f"{number:04}.jpg" for number in range(20)]
        for _ in range(2):
            with pytest.raises(KeyError, match="mistake"):
                next(samples)
    assert threads() == []


def test_closing_early_ends_the_thread_and_the_input() -> None:
    held = Held(sample(number, b"x") for number in range(5000))
    samples = Reader([held]).read(UNIT)
    next(samples)
    samples.close()
    assert held.closed
    assert threads() == []
    assert list(samples) == []


def test_closing_wakes_those_who_wait() -> None:
    held = Held(sample(number, b"x") for number in range(10))
    held.go.clear()
    samples = Reader([held]).read(UNIT)
    taken: list[Sample] = []
    waiting = threading.Thread(target=lambda: taken.extend(samples))
    waiting.start()
    closing_thread = threading.Thread(target=samples.close)
    closing_thread.start()
    waiting.join(WAIT)
    assert not waiting.is_alive()
    held.go.set()  # the read that was under way ends
    closing_thread.join(WAIT)
    assert not closing_thread.is_alive()
    assert taken == []


def test_several_threads_share_the_samples() -> None:
    held = Held(sample(number, b"x") for number in range(2000))
    taken: list[list[str]] = [[] for _ in range(4)]
    with closing(Reader([held]).read(UNIT)) as samples:
        takers = [
            threading.Thread(target=lambda place=place: taken[place].extend(each.id for each in samples))
            for place in range(4)
        ]
        for taker in takers:
            taker.start()
        for taker in takers:
            taker.join(WAIT)
    assert sorted(name for each in taken for name in each) == [f"{number:04}.jpg" for number in range(2000)]
    assert all(each == sorted(each) for each in taken)


def test_time_is_that_of_reading_and_not_of_waiting_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_SAMPLES", 16)

    def slow() -> Iterator[Sample]:
        for number in range(64):
            time.sleep(0.002)
            yield sample(number, b"x")

    reader = Reader([Held(slow())])
    with closing(reader.read(UNIT)) as samples:
        for number, _ in enumerate(samples):
            if number == 0:
                time.sleep(0.5)
    assert 64 * 0.002 <= reader.seconds < 0.45


def test_items_of_any_kind_are_made_ahead() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            yield number

    with closing(Ahead(numbers(), 2)) as ahead:
        assert next(ahead) == 0
        until(lambda: len(made) == 4)  # one taken, two that wait, one to be handed over
        time.sleep(0.05)
        assert len(made) == 4
        assert list(ahead) == list(range(1, 10))
