"""The benchmark of second-order effects, for a few images of a small model."""

import json
from pathlib import Path

import pytest

from benchmarks import second_order


def test_the_command_checks_before_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "scenes", "--layer", "3", "--images", "2", "--pairs", "1", "--threads", "1"]
    second_order.main([*arguments, "--out", str(tmp_path)])
    [file] = tmp_path.iterdir()
    [case] = json.loads(file.read_text())["cases"].values()
    assert [check["name"] for check in case["checks"]] == ["embedding", "effects", "norms", "scores"]
    assert all(0 < check["error"] <= second_order.BOUND for check in case["checks"])
    assert case["pairs"] == 1
    assert case["figures"]["numbers_per_image"] == 12 * 768
    assert "times the plain forward's time" in capsys.readouterr().out
