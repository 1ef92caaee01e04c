"""The GPU suite: a dry run at toy sizes on the CPU, and what it does when it is cut off."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import ROOT

from benchmarks import gpu_suite, gpu_tools, table
from benchmarks.gpu_bench import DRY, Bench
from benchmarks.results import Results
from clipfast.bench.measuring import Check, WrongResult

Run = Callable[[Bench], None]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_suite", *arguments]
    variables = os.environ | ({} if path is None else {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"})
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


STUB = """#!{python}
import subprocess, sys
start = sys.argv.index({python!r})
code = subprocess.run(sys.argv[start:]).returncode
print("========= {summary}")
raise SystemExit(code)
"""


@pytest.mark.slow
@NO_GPU
def test_dry_run_runs_every_step_and_goes_on(tmp_path: Path) -> None:
    tools, out = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    stub = tools / "compute-sanitizer"  # runs the program that it would watch
    stub.write_text(STUB.format(python=sys.executable, summary="ERROR SUMMARY: 0 errors"))
    stub.chmod(0o755)
    done = run("--dry-run", "--out", str(out), path=str(tools))
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    state = json.loads((out / "suite.json").read_text())
    assert state["complete"] == [step.name for step in gpu_suite.STEPS]
    statuses = {unit: entry["status"] for unit, entry in state["units"].items()}
    assert {unit for unit, status in statuses.items() if status != "done"} <= {"profile/ncu", "build/csrc/cuda"}
    assert {unit.split("/")[0] for unit in statuses} == {step.name for step in gpu_suite.STEPS}
    (results,) = out.glob("gpu-*.json")
    cases = json.loads(results.read_text())["cases"]
    assert cases["memcheck"]["figures"] == {"specimens": 2, "errors": 0, "exit_code": 0}
    assert cases["dry-run batch 2 graph"]["figures"]["attention of plain"]
    assert len(cases["dry-run batch 2 compile"]["sides"]) == 4
    defaults = json.loads((out / "defaults-sm_90.json").read_text())
    assert defaults["source"] == "dry run"
    assert all(defaults["orders"].values())
    assert (out / "table.txt").read_text() == done.stdout
    assert list((out / "cache" / "triton").iterdir())

    again = run("--dry-run", "--out", str(out))  # nothing is left to do, in two seconds
    assert again.stdout == done.stdout
    assert (out / "log.txt").read_text() == log


@NO_GPU
def test_command_without_a_gpu_is_rejected(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks.gpu_suite: torch finds no GPU here; --dry-run shows that it runs\n"


# ------------------------------------------------------------------------------------------------------------- units


class Suite:
    """A suite of one step whose units are given, run in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.units, self.ran = folder, dict[str, Run](), list[str]()
        monkeypatch.setattr(gpu_tools, "build_units", lambda bench: list(self.units.items()))
        self.say("first")

    def say(self, *names: str) -> None:
        """Makes units that only say that they ran."""
        for name in names:
            self.units[name] = lambda bench, name=name: self.ran.append(name)

    def run(self, *, deadline: float = float("inf")) -> dict[str, str]:
        arguments = ["--out", str(self.folder), "--dry-run", "--child", "build"]
        gpu_suite.child(gpu_suite.parser().parse_args(arguments), deadline)
        return self.statuses()

    def state(self) -> gpu_suite.State:
        settings = gpu_suite.parser().parse_args(["--out", str(self.folder), "--dry-run"])
        return gpu_suite.State(self.folder, gpu_suite.identity(settings))

    def statuses(self) -> dict[str, str]:
        return {unit.removeprefix("build/"): entry["status"] for unit, entry in self.state().units.items()}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    return Suite(tmp_path, monkeypatch)


def failing(error: Exception) -> Run:
    def fail(bench: Bench) -> None:
        raise error

    return fail


def test_a_unit_that_fails_does_not_stop_the_others(suite: Suite) -> None:
    suite.units["wrong"] = failing(RuntimeError("wrong result, not timed\nand more"))
    suite.units["found"] = failing(gpu_tools.Failed("3 errors"))
    suite.units["absent"] = failing(gpu_tools.Skipped("no such tool"))
    suite.say("last")
    assert suite.run() == {"first": "done", "wrong": "failed", "found": "failed", "absent": "skipped", "last": "done"}
    assert suite.ran == ["first", "last"]
    units = suite.state().units
    assert units["build/wrong"]["reason"] == "RuntimeError: wrong result, not timed"
    assert units["build/absent"]["reason"] == "no such tool"
    assert suite.state().complete == ["build"]


def test_units_run_once_and_again_when_asked_for(suite: Suite) -> None:
    suite.units["wrong"] = failing(RuntimeError("?"))
    suite.run()
    suite.say("wrong")  # mended
    assert suite.run()["wrong"] == "failed"
    assert suite.ran == ["first"]
    suite.state().forget()
    assert suite.run() == {"first": "done", "wrong": "done"}
    assert suite.ran == ["first", "wrong"]


def test_a_run_that_is_cut_off_goes_on_with_the_unit_it_was_in(suite: Suite) -> None:
    def killed(bench: Bench) -> None:
        bench.record("of the unit before", {}, settings={})
        raise KeyboardInterrupt

    suite.units["second"] = killed
    suite.say("third")
    with pytest.raises(KeyboardInterrupt):
        suite.run()
    assert suite.statuses() == {"first": "done", "second": "running"}
    (results,) = suite.folder.glob("gpu-*.json")
    assert list(json.loads(results.read_text())["cases"]) == ["of the unit before"]
    state = suite.state()
    assert state.end_running("cut", "its time was over")
    suite.say("second")
    assert suite.run() == {"first": "done", "second": "done", "third": "done"}
    assert suite.ran == ["first", "second", "third"]
    assert list(json.loads(results.read_text())["cases"]) == ["of the unit before"]


def test_nothing_begins_after_the_deadline(suite: Suite) -> None:
    assert suite.run(deadline=0) == {}
    assert suite.state().complete == []
    assert suite.run() == {"first": "done"}


def test_what_was_done_with_other_code_is_done_again(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.run()
    monkeypatch.setattr("clipfast.bench.machine.code", lambda results: {"commit": "another", "dirty": False})
    assert suite.run() == {"first": "done"}
    assert suite.ran == ["first", "first"]


def test_a_damaged_state_is_begun_anew(suite: Suite) -> None:
    (suite.folder / "suite.json").write_text('{"format": "clip')
    assert suite.run() == {"first": "done"}


# ----------------------------------------------------------------------------------------------------------- parts


def test_a_step_gets_its_share_of_what_is_left() -> None:
    steps = gpu_suite.STEPS
    left = 1000.0
    given = []
    for number, step in enumerate(steps):
        given.append(gpu_suite.allowance(left, [step], steps[number + 1 :]))
        left -= given[-1]
    assert sum(given) == pytest.approx(1000)
    shares = [step.share for step in steps]
    assert given == pytest.approx([1000 * share / sum(shares) for share in shares])
    assert gpu_suite.allowance(300, steps[-1:], []) == 300  # what others left over


def test_a_process_that_goes_on_too_long_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Python starts a process of its own and sleeps."""
    program, marker = tmp_path / "python", tmp_path / "pid"
    program.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {marker}\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(gpu_suite, "GRACE", 0.5)
    settings = gpu_suite.parser().parse_args(["--out", str(tmp_path), "--dry-run"])
    state = gpu_suite.State(tmp_path, gpu_suite.identity(settings))
    state.put("build/csrc/cuda", "running")
    gpu_suite._run_child(settings, gpu_suite.STEPS[:1], os.environ, 0.5)
    entry = gpu_suite.State(tmp_path, gpu_suite.identity(settings)).units["build/csrc/cuda"]
    assert (entry["status"], entry["reason"]) == ("cut", "its time was over")
    status = Path(f"/proc/{int(marker.read_text())}/stat")
    assert not status.exists() or status.read_text().split()[2] in "ZX"


class Processes:
    """Stands in for the processes of steps: each ends with what the next entry of its step says."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, ends: dict[str, list[str]]) -> None:
        self.settings = gpu_suite.parser().parse_args(["--out", str(folder), "--budget", "1000"])
        self.ends, self.begun = ends, list[tuple[str, float]]()
        self.folder = folder
        monkeypatch.setattr(gpu_suite, "_run_child", self.run)
        gpu_suite.supervise(self.settings, {})

    def state(self) -> gpu_suite.State:
        return gpu_suite.State(self.folder, gpu_suite.identity(self.settings))

    def run(self, settings: Any, steps: Any, variables: Any, seconds: float) -> None:
        step = steps[0]
        self.begun.append((step.name, seconds))
        state = self.state()
        end = self.ends.get(step.name, ["complete"]).pop(0)
        if end == "breaks":
            state.put(f"{step.name}/{len(state.units)}", "failed", reason="its process ended with -11")
        if end == "complete":
            state.put(f"{step.name}/unit", "done")
            state.complete.append(step.name)
            state.write()


def test_steps_run_in_order_and_go_on_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = {"tests": ["breaks", "breaks", "complete"], "races": ["nothing"]}
    processes = Processes(tmp_path, monkeypatch, ends)
    names = [name for name, _ in processes.begun]
    expected = [step.name for step in gpu_suite.STEPS]
    expected[2:3] = ["tests"] * 3
    assert names == expected
    state = processes.state()
    assert state.complete == [step.name for step in gpu_suite.STEPS if step.name != "races"]
    assert state.units["races/start"]["status"] == "failed"
    given = dict(processes.begun)
    assert given["build"] == pytest.approx((1000 - gpu_suite.GRACE) * 0.03, abs=1)
    assert given["sweep"] == pytest.approx(1000 - gpu_suite.GRACE, abs=5)  # nobody used any time
    processes.begun.clear()
    ends["races"] = ["complete"]
    gpu_suite.supervise(processes.settings, {})
    assert [name for name, _ in processes.begun] == ["races"]
    processes.begun.clear()
    ends |= {"tests": ["breaks", "breaks", "complete"], "races": ["complete"]}
    for step in gpu_suite.STEPS:
        ends.setdefault(step.name, ["complete"])
    processes.settings.again = True
    gpu_suite.supervise(processes.settings, {})
    assert [name for name, _ in processes.begun] == expected
    failed = [unit for unit, entry in processes.state().units.items() if entry["status"] == "failed"]
    assert failed == ["tests/8", "tests/9"], "those of the first run, tests/2 and tests/3, are forgotten"


def test_a_dry_run_that_cannot_start_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu_suite, "_run_child", lambda *arguments: None)
    assert gpu_suite.main(["--out", str(tmp_path), "--dry-run"]) == 1
    assert "FAILED build/start: its process ended before its first unit: see log.txt" in capsys.readouterr().out


def test_nothing_begins_when_the_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(tmp_path, monkeypatch, {})
    (tmp_path / "suite.json").unlink()
    processes.begun.clear()
    processes.settings.budget = gpu_suite.GRACE - 1
    gpu_suite.supervise(processes.settings, {})
    assert processes.begun == []


def test_wheels_are_unpacked_once_and_imported_from(tmp_path: Path) -> None:
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "one-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("one_of_a_wheel/__init__.py", "")
        archive.writestr("one_of_a_wheel/data.txt", "read from a file")
    paths = gpu_suite.unpack(wheels, cache)
    assert paths == [wheels, cache / "one-1.0-py3-none-any"]
    assert (paths[1] / "one_of_a_wheel" / "data.txt").read_text() == "read from a file"
    stamp = (paths[1] / "one_of_a_wheel" / "data.txt").stat().st_mtime_ns
    assert gpu_suite.unpack(wheels, cache) == paths
    assert (paths[1] / "one_of_a_wheel" / "data.txt").stat().st_mtime_ns == stamp
    assert str(paths[1]) in gpu_suite.environment(tmp_path, paths, dry=True)["PYTHONPATH"].split(os.pathsep)


def test_what_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu_suite, "NEEDED", ("torch", "no_such_package"))
    assert gpu_suite.main(["--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks.gpu_suite: no_such_package cannot be imported: give their --wheels\n"
    )


def test_caches_are_inside_the_folder(tmp_path: Path) -> None:
    variables = gpu_suite.environment(tmp_path, [], dry=False)
    for name in ("CLIPFAST_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(variables[name]).is_relative_to(tmp_path)


def bench(folder: Path) -> Bench:
    return Bench("cpu", DRY, Results("gpu", "?", folder=folder), lambda line: None)


def test_sides_take_turns(tmp_path: Path) -> None:
    calls: list[str] = []
    times = bench(tmp_path).rounds(
        {name: lambda name=name: calls.append(name) for name in "abc"}, single=False, rounds=3
    )
    assert "".join(calls) == "bcacab" + "abcbcacab"
    assert {name: len(each) for name, each in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_bars_are_printed_as_met_or_missed(tmp_path: Path, suite: Suite) -> None:
    cases = {
        "forward": {"bars": [{"what": "decomposed over eager", "value": 1.2, "at_least": 1.15, "met": True}]},
        "memory": {"bars": [{"what": "peak memory", "value": 1.3, "at_most": 1.1, "met": False}]},
    }
    (tmp_path / "gpu-a.json").write_text(json.dumps({"cases": cases}))
    suite.units["wrong"] = failing(RuntimeError("?"))
    suite.run()
    lines = gpu_suite.table(tmp_path, suite.state().identity).splitlines()
    assert "build      1 done, 1 failed (0 s)" in lines
    assert "FAILED build/wrong: RuntimeError: ?" in lines
    assert lines[-2:] == [
        "memory: peak memory 1.3 (bar ≤ 1.1: MISSED)",
        "forward: decomposed over eager 1.2 (bar ≥ 1.15: met)",
    ]


def test_results_are_printed_as_a_table(tmp_path: Path) -> None:
    """Cases with several sides, with two, and without times."""
    own = bench(tmp_path)
    times = {"plain, graph": [2.0], "decomposed": [0.1], "plain eager": [0.2]}
    figures = {"decomposed over plain, graph": 20.0, "decomposed over plain eager": 2.0}
    checks = [Check("heads", 0.001, 0.01)]
    own.record("forward", times, settings={"batch": 8}, checks=checks, figures=figures)
    own.record("copy", {"copy": [0.001]}, settings={})
    own.record("precompile", {}, settings={})
    own.compared("attention", ("ours", list), ("theirs", list), lambda: checks, settings={})
    lines = table.table(json.loads(own.results.path.read_text())).splitlines()[-3:]
    assert lines[0] == "| forward | decomposed 100 ms | plain, graph 2 s | 20 |  | 1.0e-03 |  |"
    assert lines[1] == "| copy | copy 1 ms |  |  |  |  |  |"
    assert lines[2].startswith("| attention | ours ")


def test_a_wrong_result_is_not_recorded(tmp_path: Path) -> None:
    own = bench(tmp_path)
    with pytest.raises(WrongResult, match="heads: 1 > 0"):
        own.record("forward", {"a": [1.0]}, settings={}, checks=[Check("heads", 1, 0.01)])
    with pytest.raises(WrongResult):
        own.compared("attention", ("a", list), ("b", list), lambda: [Check("out", float("nan"), 1)], settings={})
    assert not own.results.path.exists()


def test_what_ncu_prints_is_read() -> None:
    printed = "\n".join(
        [
            "==PROF== Connected to process 7",
            '"ID","Kernel Name","Grid Size","dram__bytes.sum","other"',
            '"","","","byte",""',
            '"0","_attention_kernel","(514, 1, 1)","1,024","x"',
            "==PROF== Disconnected",
        ]
    )
    assert gpu_tools.read_csv(printed) == [
        {"Kernel Name": "_attention_kernel", "Grid Size": "(514, 1, 1)", "dram__bytes.sum": "1,024"}
    ]


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("_attention_kernel", "_attention_kernel"),
        ("void cutlass::Kernel2<cutlass_80_tensorop>(Params)", "Kernel2"),
        ("void at::native::(anonymous namespace)::copy_kernel<4>(int)", ""),
        ("nvjet_sm90_tst_256x128", "nvjet_sm90_tst_256x128"),
    ],
)
def test_names_of_kernels_are_those_of_ncu(kernel: str, name: str) -> None:
    assert gpu_tools.function(kernel) == name
