"""The benchmark of codes on disk, for a few images of the bundled model."""

import json
from pathlib import Path

import pytest

from benchmarks import store
from benchmarks.results import FOLDER


def test_the_command_checks_before_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    arguments = ["--model", "scenes", "--images", "70", "--unit-size", "50", "--pairs", "1"]
    store.main([*arguments, "--temporary", str(temporary), "--out", str(out)])
    [file] = out.iterdir()
    [case] = json.loads(file.read_text())["cases"].values()
    assert [check["error"] for check in case["checks"]] == [0, 0]
    assert case["figures"]["bytes_per_image"]["raw"] == 6 * 6 * 32 * 2
    assert 0.5 < case["figures"]["share_of_raw"] < 1.1
    assert "kB per image" in capsys.readouterr().out
    assert list(temporary.iterdir()) == []


def test_committed_bars_are_met() -> None:
    for file in FOLDER.glob("store-*.json"):
        for case in json.loads(file.read_text())["cases"].values():
            assert all(bar["met"] for bar in case["bars"])
            assert case["settings"]["images"] == 50_000
