"""The benchmark of engines, for a few images of the bundled model."""

import json
import time
from pathlib import Path

import pytest

from benchmarks import engines
from benchmarks.engines import Clock, Run, alternate
from benchmarks.results import FOLDER
from clipfast.dataset.worker import Progress


def test_a_rate_is_that_of_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting the workers takes 10 seconds, the last two images 50."""
    now = iter([0.0, 10.0, *(10.0 + second for second in range(1, 98)), 160.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = Clock()
    for done in [2] * 98 + [4]:
        clock.progressed("0", Progress(0, done, 0, {}))
    assert clock.rate() == pytest.approx(2.0)


def test_runs_alternate() -> None:
    order: list[str] = []

    def side(name: str) -> Run:
        order.append(name)
        return Run(1.0, float(len(order)))

    first, second = alternate(side, side, 3)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert ([run.rate for run in first], [run.rate for run in second]) == ([1.0, 4.0, 5.0], [2.0, 3.0, 6.0])


@pytest.mark.slow
def test_the_command_checks_what_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    arguments = ["--model", "scenes", "--unit", "8", "--seconds", "1", "--pairs", "1", "--workers", "2"]
    engines.main([*arguments, "--temporary", str(temporary), "--out", str(out)])
    [file] = out.iterdir()
    written = json.loads(file.read_text())["cases"]
    assert list(written) == ["scenes, processes and threads", "scenes, Ray and processes"]
    threads, ray = written.values()
    assert 0 <= threads["checks"][0]["error"] < 1e-5
    assert ray["checks"] == [{"name": "units with other bits", "error": 0.0, "bound": 0.0}]
    assert set(ray["figures"]["images_per_second"]) == {"Ray", "processes"}
    assert "seconds of Ray over processes" in capsys.readouterr().out
    assert list(temporary.iterdir()) == []


def test_committed_bars_are_met() -> None:
    for file in FOLDER.glob("engines-*.json"):
        for name, case in json.loads(file.read_text())["cases"].items():
            assert all(bar["met"] for bar in case["bars"])
            # Ray is compared by the whole time, and its start has to be small beside it.
            assert min(case["a"]["all"] + case["b"]["all"]) >= (120 if "Ray" in name else 60)
