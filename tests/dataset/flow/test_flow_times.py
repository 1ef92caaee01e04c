"""What a worker says of its stages' time: they add up to what was spent, and no stage counts another's waiting."""

import time
from collections import Counter
from pathlib import Path

import pytest
from flow_parts import Held, model, samples

from clipfast import Model
from clipfast.dataset.collecting import Silent, collect
from clipfast.dataset.flow.decoder import Decoder
from clipfast.dataset.flow.decomposer import Decomposer
from clipfast.dataset.images_table import ImageTable
from clipfast.dataset.passes import PassOptions
from clipfast.dataset.worker import Progress

SLOW = 0.8
"""Seconds by which a stage is made slower: a busy machine does not take so much longer for the others."""


class Times(Silent):
    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.done = self.failed = 0

    def progressed(self, worker: str, progress: Progress) -> None:
        assert set(progress.seconds) == {"read", "decode", "compute", "write"}
        assert all(seconds >= 0 for seconds in progress.seconds.values())
        self.seconds.update(progress.seconds)
        self.done += progress.done
        self.failed += progress.failed


def slower(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> None:
    """Has each call of a method take its part of :data:`SLOW` longer."""
    own = getattr(owner, name)

    def slow(*arguments: object, **options: object) -> object:
        time.sleep(SLOW / calls)
        return own(*arguments, **options)

    monkeypatch.setattr(owner, name, slow)


@pytest.fixture(scope="module")
def tiny() -> Model:
    return model()


def times(tiny: Model, folder: Path) -> Counter[str]:
    """Of a pass over 20 images in five batches, in one thread each."""
    events = Times()
    collect([Held(samples(20))], folder, tiny, PassOptions(batch_size=4), events=events, threads=1)
    assert (events.done, events.failed) == (20, 0)
    return events.seconds


@pytest.mark.parametrize(
    ("stage", "owner", "name", "calls"),
    [
        ("decode", Decoder, "_decode", 20),
        ("compute", Decomposer, "_fits", 5),
        ("write", ImageTable, "add", 5),
    ],
)
def test_a_stage_that_is_slower_has_more_time_and_no_other(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, owner: object, name: str, calls: int
) -> None:
    before = times(tiny, tmp_path / "before")
    slower(monkeypatch, owner, name, calls)
    after = times(tiny, tmp_path / "after")
    assert after[stage] >= SLOW
    for other in before:
        if other != stage:
            assert after[other] - before[other] < SLOW


def test_reading_that_is_slower(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slower(monkeypatch, Held, "pause", 20)
    spent = times(tiny, tmp_path)
    assert spent["read"] >= SLOW
    assert max(spent["decode"], spent["compute"], spent["write"]) < SLOW


def test_a_stage_of_one_thread_has_no_more_time_than_the_pass(tiny: Model, tmp_path: Path) -> None:
    began = time.perf_counter()
    spent = times(tiny, tmp_path)
    wall = time.perf_counter() - began
    assert all(0 < seconds <= wall for seconds in spent.values())
