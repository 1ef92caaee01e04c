"""Comparing two checkouts: same bits first, then times; what cannot be compared is one line."""

import subprocess
import sys
from pathlib import Path

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
        "--pairs",
        "1",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_checkout_against_itself() -> None:
    done = run(str(ROOT), "--least", "0.001")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("scenes fp32, batch 1, 2 threads: ")
    assert done.stdout.rstrip().endswith("1 pairs, same bits")
    missed = run(str(ROOT), "--least", "1000")
    assert (missed.returncode, missed.stderr) == (1, "")


def test_a_folder_without_clipfast(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1].startswith("benchmarks.against: ")


def test_another_result_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "clipfast").mkdir()
    (tmp_path / "clipfast" / "__init__.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "__path__.insert(0, sys.path[0] + '/clipfast')\n"
        "from clipfast import model as _m\n"
        "def load(*a, **k):\n"
        "    made = _m.load(*a, **k)\n"
        "    made.module.visual.proj.data.mul_(1.25)\n"
        "    return made\n",
        encoding="utf-8",
    )
    done = run(str(tmp_path))
    assert done.returncode == 1
    assert "the results differ, nothing is timed" in done.stdout
