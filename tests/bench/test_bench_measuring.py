"""Measuring: order of runs, statistics, checks, memory, bars."""

import math
from pathlib import Path

import pytest

from clipfast.bench.measuring import Bar, Check, Comparison, WrongResult, compare, pairs, quantiles, require
from clipfast.bench.memory import ProbeFailed, memory_json, peak_memory

RIGHT = Check("sum", 1e-7, 1e-5)


def test_sides_alternate_after_the_warmup() -> None:
    order: list[str] = []
    result = pairs(lambda: order.append("a"), lambda: order.append("b"), pairs=4, warmup=1)
    assert "".join(order) == "ab" + "abbaabba"
    assert len(result.seconds_a) == len(result.seconds_b) == 4


def test_times_belong_to_their_side(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr("time.perf_counter", lambda: clock["now"])

    def takes(step: float):
        return lambda: clock.update(now=clock["now"] + step)

    result = pairs(takes(2.0), takes(3.0), pairs=3, warmup=0)
    assert result.seconds_a == pytest.approx((2.0, 2.0, 2.0))
    assert result.seconds_b == pytest.approx((3.0, 3.0, 3.0))
    assert result.ratio == pytest.approx(1.5)


def test_ratio_is_the_median_of_the_pairs_ratios() -> None:
    # A slower machine during the last pair does not change the pair's ratio.
    result = Comparison((1.0, 2.0, 30.0), (2.0, 3.0, 60.0))
    assert result.ratios == (2.0, 1.5, 2.0)
    assert result.ratio == 2.0


def test_quantiles_by_hand() -> None:
    result = quantiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert result == pytest.approx({"min": 1, "q10": 1.4, "q25": 2, "median": 3, "q75": 4, "q90": 4.6, "max": 5})
    assert set(quantiles([7.0]).values()) == {7.0}


def test_zero_pairs_are_rejected() -> None:
    with pytest.raises(ValueError, match="pairs is 0"):
        pairs(lambda: None, lambda: None, pairs=0)


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ([RIGHT, Check("heads", 2e-3, 1e-5)], "heads: 0.002 > 1e-05"),
        ([Check("heads", math.nan, 1e-5)], "heads: nan"),
        ([], "no check was made"),
    ],
)
def test_wrong_result_is_not_timed(checks: list[Check], message: str) -> None:
    calls: list[str] = []
    with pytest.raises(WrongResult, match=message):
        compare(lambda: calls.append("a"), lambda: calls.append("b"), lambda: checks, count=1)
    assert not calls


def test_correct_result_is_timed_with_its_error() -> None:
    result = compare(lambda: None, lambda: None, lambda: [RIGHT, Check("mlps", 3e-6, 1e-5)], count=2, warmup=0)
    assert result.error == 3e-6
    assert len(result.ratios) == 2


def test_check_with_any_error_is_valid_json() -> None:
    assert [Check("sum", error, 1e-5).to_json()["error"] for error in (1e-7, math.nan, math.inf)] == [
        1e-7,
        "nan",
        "inf",
    ]


def test_require_accepts_an_error_at_the_bound() -> None:
    require([Check("startup", 0.0, 0.0)])


def test_bars_in_both_directions() -> None:
    assert Bar("speed", 1.06, 1.05, at_least=True).met
    assert not Bar("speed", 1.04, 1.05, at_least=True).met
    assert Bar("memory", 1.15, 1.15, at_least=False).met
    assert not Bar("memory", math.nan, 1.15, at_least=False).met
    assert str(Bar("speed", 1.04, 1.05, at_least=True)) == "speed 1.04 (bar ≥ 1.05: MISSED)"


def test_peak_memory_includes_freed_memory() -> None:
    small = peak_memory("benchmark_targets:allocating", megabytes=1)
    large = peak_memory("benchmark_targets:allocating", megabytes=200)
    assert 190 < large.peak_mb - small.peak_mb < 230
    memory = memory_json(large, small)
    assert memory["peak_ratio_a_over_b"] == pytest.approx(large.peak_mb / small.peak_mb)
    assert memory["a"]["increment_mb"] == pytest.approx(large.peak_mb - large.loaded_mb)


def test_peak_memory_excludes_loading() -> None:
    peak = peak_memory("benchmark_targets:heavy_to_build", megabytes=200)
    if peak.method.startswith("VmHWM, reset"):
        assert peak.increment_mb < 50


def test_failing_process_raises() -> None:
    with pytest.raises(ProbeFailed, match="no such image"):
        peak_memory("benchmark_targets:failing")


def test_process_does_not_import_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert peak_memory("benchmark_targets:allocating", megabytes=1).peak_mb > 1
