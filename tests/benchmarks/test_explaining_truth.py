"""The experiment on explanations, on few scenes: that it runs, that its figures are right, and the bars of curves."""

import json
from pathlib import Path

import pytest

import clipfast
from benchmarks.results import FOLDER
from benchmarks.truth import explaining
from benchmarks.truth.explaining import GROUPS, RANDOM, interval, reduction


def test_intervals_and_reductions() -> None:
    assert interval([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]
    middle, low, high = interval([0.0, 1.0])
    assert middle == 0.5
    assert high - middle == pytest.approx(1.96 * 0.5**0.5 / 2**0.5)
    assert low == pytest.approx(1 - high)
    assert reduction([1.0, 1.0], [4.0, 4.0]) == [0.75, 0.75, 0.75]
    less, low, high = reduction([1.0, 2.0, 3.0], [4.0, 4.0, 4.0])
    assert less == 0.5
    assert 0.25 <= low < less < high <= 0.75


@pytest.mark.slow
def test_deletion_is_faster_than_at_random_and_by_attention() -> None:
    result = explaining.experiment(clipfast.load("scenes"), 12, orders=(GROUPS, "attention", RANDOM))
    assert result["less"][RANDOM][0] > explaining.LESS
    assert result["less"]["attention"][0] > 0
    assert result["curves"][GROUPS]["insertion"][0] > result["curves"][RANDOM]["insertion"][0]
    assert result["groups"]["object in the hottest group"][0] > 2 * result["groups"]["object outside of it"][0]


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    document = json.loads((FOLDER / "explaining.json").read_text())
    assert document["code"]["dirty"] is False
    assert explaining.page(document) == (FOLDER / "explaining.md").read_text()
    result = document["result"]
    assert [bar["met"] for bar in result["bars"]] == [bar.met for bar in explaining.bars(result)]
    for order in (RANDOM, "attention"):  # the lower end of the interval
        assert result["less"][order][1] >= explaining.LESS


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explaining.main(["--scenes", "8", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "explaining.json").read_text())
    assert set(document["result"]["curves"]) == set(explaining.ORDERS)
    assert capsys.readouterr().out.strip() == (tmp_path / "explaining.md").read_text().strip()
