"""The comparison of two checkouts: equal results before times, and one line for a folder that cannot be compared."""

import subprocess
import sys
from pathlib import Path

import pytest
from builders import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.against",
        *arguments,
        "--model",
        "scenes",
        "--batch",
        "1",
        "--rounds",
        "1",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_checkout_against_itself() -> None:
    process = run(str(ROOT), "--least", "0.001")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("scenes fp32, batch 1, 2 threads: ")
    assert process.stdout.rstrip().endswith("1 rounds, same bits")
    missed = run(str(ROOT), "--least", "1000")
    assert (missed.returncode, missed.stderr) == (1, "")


@pytest.mark.slow
def test_folder_without_clipfast_is_rejected(tmp_path: Path) -> None:
    process = run(str(tmp_path))
    assert process.returncode == 1
    assert process.stderr.rstrip().splitlines()[-1].startswith("benchmarks.against: ")


@pytest.mark.slow
def test_different_results_are_not_timed(tmp_path: Path) -> None:
    (tmp_path / "clipfast").mkdir()
    (tmp_path / "clipfast" / "__init__.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "__path__.insert(0, sys.path[0] + '/clipfast')\n"
        "from clipfast import loading as _m\n"
        "def load(*a, **k):\n"
        "    model = _m.load(*a, **k)\n"
        "    model.module.visual.proj.data.mul_(1.25)\n"
        "    return model\n",
        encoding="utf-8",
    )
    process = run(str(tmp_path))
    assert process.returncode == 1
    assert "the results differ, nothing is timed" in process.stdout
