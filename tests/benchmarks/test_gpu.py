"""The GPU's questions: every line of them runs here at toy sizes; without a GPU nothing is measured."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import ROOT

from benchmarks import gpu
from benchmarks.gpu_bench import DRY, Bench
from benchmarks.results import Results

RESULTS = ROOT / "benchmarks" / "results"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run interprets the kernels, which a GPU would run")
def test_a_dry_run_answers_every_question_and_writes_nothing() -> None:
    before = sorted(RESULTS.iterdir())
    done = run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for name in gpu.QUESTIONS:
        assert f"--- {name} (" in done.stdout
    assert "FAILED" not in done.stdout
    assert sorted(RESULTS.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks.gpu: torch finds no GPU here; --dry-run shows that the suite runs\n"


def bench(folder: Path) -> Bench:
    return Bench("cpu", DRY, Results("gpu", "?", folder=folder), lambda line: None)


def test_a_question_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def wrong(bench: Bench) -> None:
        raise RuntimeError("wrong result, not timed\nand more")

    monkeypatch.setattr(gpu, "QUESTIONS", {"first": wrong, "second": lambda bench: asked.append("second")})
    assert gpu.ask(bench(tmp_path), ["first", "second"], 8) == ["first: RuntimeError: wrong result, not timed"]
    assert asked == ["second"]


def test_time_that_is_over_is_said(tmp_path: Path) -> None:
    assert gpu.ask(bench(tmp_path), ["forward"], -1) == ["forward: not asked, 0.0 minutes were over"]
