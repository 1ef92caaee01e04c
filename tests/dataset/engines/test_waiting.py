"""Units whose worker ended: lost, or done where the record was written before the end."""

from dataclasses import replace
from pathlib import Path

import passing
import pytest
from passing import Pictures, run

from clipfast.dataset.engines.waiting import ATTEMPTS, LostWorkersError, Waiting
from clipfast.dataset.manifest import Manifest


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Two finished units."""
    out = tmp_path / "c"
    run(Pictures(passing.draw(tmp_path / "images", 2 * passing.UNIT)), out)
    return Manifest(out)


def test_a_record_that_was_written_before_the_end_counts(manifest: Manifest) -> None:
    """Both for a unit that had none and for one that is computed again."""
    old = manifest.record(1)
    manifest.record_path(1).unlink()
    again = manifest.record(0)
    waiting = Waiting([0, 1], manifest)
    assert (waiting.take(), waiting.take()) == (0, 1)
    manifest.write(replace(again, folder="000000-new", problem={"kind": "damaged", "reason": "it ends early"}))
    manifest.write(old)
    first, second = waiting.lost(0, "was killed"), waiting.lost(1, "was killed")
    assert first is not None
    assert (first.unit, first.statuses, first.problem) == (0, again.statuses, "it ends early")
    assert second is not None
    assert (second.unit, second.statuses, second.problem) == (1, old.statuses, None)
    assert waiting.done
    waiting.raise_given_up()


def test_a_record_from_before_does_not_count(manifest: Manifest) -> None:
    waiting = Waiting([1], manifest)
    for _ in range(ATTEMPTS):
        assert waiting.take() == 1
        assert waiting.lost(1, "was killed") is None
    assert waiting.take() is None
    assert waiting.done
    with pytest.raises(LostWorkersError, match=r"unit 1 .*: 3 workers were lost at it, the last one was killed"):
        waiting.raise_given_up()


def test_a_damaged_record_does_not_count(manifest: Manifest) -> None:
    manifest.record_path(0).unlink()
    waiting = Waiting([0], manifest)
    waiting.take()
    manifest.record_path(0).write_text("{")
    assert waiting.lost(0, "was killed") is None
    assert waiting.take() == 0
