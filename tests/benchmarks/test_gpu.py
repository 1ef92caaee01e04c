"""The GPU benchmarks: a dry run at toy sizes on the CPU; without a GPU nothing is measured."""

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
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the dry run with interpreted kernels")
def test_dry_run_runs_every_benchmark_and_writes_nothing() -> None:
    before = sorted(RESULTS.iterdir())
    process = run("--dry-run")
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    for name in gpu.QUESTIONS:
        assert f"--- {name} (" in process.stdout
    assert "FAILED" not in process.stdout
    assert sorted(RESULTS.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_without_a_gpu_is_rejected() -> None:
    process = run()
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "benchmarks.gpu: torch finds no GPU here; --dry-run shows that the suite runs\n"


def bench(folder: Path) -> Bench:
    return Bench("cpu", DRY, Results("gpu", "?", folder=folder), lambda line: None)


def test_failing_benchmark_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    completed = []

    def fail(bench: Bench) -> None:
        raise RuntimeError("wrong result, not timed\nand more")

    monkeypatch.setattr(gpu, "QUESTIONS", {"first": fail, "second": lambda bench: completed.append("second")})
    assert gpu.ask(bench(tmp_path), ["first", "second"], 8) == ["first: RuntimeError: wrong result, not timed"]
    assert completed == ["second"]


def test_benchmarks_beyond_the_time_limit_are_reported(tmp_path: Path) -> None:
    assert gpu.ask(bench(tmp_path), ["forward"], -1) == ["forward: not run, 0.0 minutes had passed"]
