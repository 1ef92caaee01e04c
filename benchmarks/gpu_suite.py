"""Everything that a GPU can say about this project, within a time: ``python -m benchmarks.gpu_suite --out DIR``.

The steps run in the order of :data:`STEPS`, each in a process of its own, so that a crash costs one unit. A step is a
list of units. What a unit finds is written before the next begins, so a run that is cut off loses one unit, and the
same command goes on where it was. The time that is left is shared out among the steps that are left. Every result is
checked before it is timed; bars are printed as met or missed.

``DIR`` gets ``gpu-….json`` (all results with device, versions and commit), ``suite.json`` (what was done),
``defaults-sm_….json`` (orders of kernels for ``clipfast/kernels/defaults/``), ``table.txt`` and ``log.txt``; in
``DIR/cache`` are the caches of Triton, of the tuner and of torch's compiler. ``--dry-run`` runs all steps on the CPU at
toy sizes with interpreted kernels.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "gpu"
SENTENCE = "On a GPU, how fast is a decomposed forward, and what it is made of?"
NEEDED = ("torch", "triton", "numpy", "open_clip", "ftfy", "wcwidth", "torchvision", "PIL", "safetensors", "xxhash")
"""Packages that must be importable, beside clipfast in this checkout."""
FORMAT = "clipfast.gpu_suite/1"
GRACE = 15.0
"""Seconds that a step may go on beyond its time before it is ended: a unit is not begun that late."""


@dataclass(frozen=True)
class Step:
    """A step of the suite.

    Attributes:
        name: as on the command line.
        share: of the time, compared with those of the other steps.
        units: ``module:function`` that lists the units.
        what: what it finds out.
    """

    name: str
    share: float
    units: str
    what: str


STEPS: tuple[Step, ...] = (
    Step("build", 3, "gpu_tools:build_units", "csrc/cuda, where nvcc is"),
    Step("ceilings", 5, "gpu_tools:ceiling_units", "copy and matmul rates; every kernel compiled"),
    Step("tests", 12, "gpu_tools:test_units", "tests of kernels, graphs and compilation on this device"),
    Step("races", 12, "gpu_tools:race_units", "memcheck and racecheck of every specimen; equal bits of many runs"),
    Step("forward", 40, "gpu_forward:units", "decomposed against plain: models, batches, modes"),
    Step("operations", 13, "gpu_operations:units", "operations against their best alternatives"),
    Step("profile", 5, "gpu_tools:profile_units", "the heaviest kernels, and under ncu"),
    Step("sweep", 10, "gpu_sweep:units", "every way of every operation, as orders to ship"),
)
"""In the order they run."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.splitlines()[0])
    names = [step.name for step in STEPS]
    command.add_argument("--out", type=Path, help="folder of everything that is written; go on there if it exists")
    command.add_argument("--budget", type=float, default=1500, metavar="SECONDS", help="time in all (1500)")
    command.add_argument("--wheels", type=Path, help="folder of wheels, or of unpacked packages, to import from")
    command.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"only these of {', '.join(names)}")
    command.add_argument("--again", action="store_true", help="run units again that failed or were skipped")
    command.add_argument("--commit", help="the commit to record when this copy is not a git checkout")
    command.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU; nothing is measured")
    command.add_argument("--child", nargs="+", choices=names, help=argparse.SUPPRESS)
    command.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return command


# ------------------------------------------------------------------------------------------------------------- state


class State:
    """What was done, in ``suite.json``; written whole at every change.

    Attributes:
        units: ``step/unit`` → status (``running``, ``done``, ``failed``, ``skipped``, ``cut``), seconds, reason, time.
        complete: steps of which no unit is left.

    Args:
        folder: where the file is.
        identity: versions and commit; what was done with others does not count.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / "suite.json"
        self.identity = dict(identity)
        self.units: dict[str, dict[str, Any]] = {}
        self.complete: list[str] = []
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if document.get("format") == FORMAT and document.get("identity") == json.loads(json.dumps(self.identity)):
            self.units, self.complete = document["units"], document["complete"]

    def write(self) -> None:
        """Replaces the file."""
        document = {"format": FORMAT, "identity": self.identity, "complete": self.complete, "units": self.units}
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.path)

    def put(self, unit: str, status: str, seconds: float = 0.0, reason: str = "") -> None:
        """Records a unit and writes the file."""
        taken = datetime.now(UTC).isoformat(timespec="seconds")
        self.units[unit] = {"status": status, "seconds": round(seconds, 1), "reason": reason, "taken": taken}
        self.write()

    def is_left(self, unit: str) -> bool:
        """Whether a unit is to run."""
        return self.units.get(unit, {}).get("status") in (None, "running", "cut")

    def forget(self) -> None:
        """Has everything that failed or was skipped run again."""
        self.units = {unit: entry for unit, entry in self.units.items() if entry["status"] == "done"}
        self.complete = []
        self.write()

    def end_running(self, status: str, reason: str) -> bool:
        """Gives a unit that a process left behind its end; returns whether there was one."""
        running = [unit for unit, entry in self.units.items() if entry["status"] == "running"]
        for unit in running:
            self.put(unit, status, reason=reason)
        return bool(running)


def identity(settings: argparse.Namespace) -> dict[str, Any]:
    """What results depend on beside the device."""
    from clipfast.bench import machine

    code = machine.code([settings.out])
    if code["commit"] is None:
        code = {"commit": settings.commit, "dirty": False}
    return {"dry": settings.dry_run, "versions": machine.versions(), "code": code}


# ------------------------------------------------------------------------------------------------------------- child


def child(settings: argparse.Namespace, deadline: float) -> int:
    """Runs the units that are left of some steps in this process, until the deadline; returns 0."""
    import importlib

    from benchmarks.gpu_bench import DRY, Bench, Sizes
    from benchmarks.gpu_tools import Failed, Skipped
    from benchmarks.results import Results

    dry = settings.dry_run
    device = "cpu" if dry else "cuda"
    results = Results(QUESTION, SENTENCE, device=device, folder=settings.out)
    results.note_commit(settings.commit)
    bench = Bench(device, DRY if dry else Sizes(), results, lambda line: print(line, flush=True))
    state, parent = State(settings.out, identity(settings)), os.getppid()
    for name in settings.child:
        step = next(step for step in STEPS if step.name == name)
        module, _, function = step.units.partition(":")
        units: list[tuple[str, Callable[[Bench], None]]] = getattr(
            importlib.import_module(f"benchmarks.{module}"), function
        )(bench)
        left = [(unit, run) for unit, run in units if state.is_left(f"{name}/{unit}")]
        for unit, run in left:
            if time.time() > deadline or os.getppid() != parent:  # the command itself was killed
                return 0
            bench.say(f"--- {name}/{unit}")
            state.put(f"{name}/{unit}", "running")
            started = time.monotonic()
            status, reason = "done", ""
            try:
                run(bench)
            except Skipped as skipped:
                status, reason = "skipped", str(skipped)
            except Exception as error:  # the other units still run
                if not isinstance(error, Failed):
                    traceback.print_exc()
                status, reason = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            state.put(f"{name}/{unit}", status, time.monotonic() - started, reason)
            if status != "done":
                bench.say(f"{status}: {reason}")
            if status == "failed" and _is_broken(dry):
                return 1  # the CUDA context is gone: a new process goes on
        state.complete = [*dict.fromkeys([*state.complete, name])]
        state.write()
    return 0


def _is_broken(dry: bool) -> bool:
    """Whether the device no longer answers in this process."""
    if dry:
        return False
    import torch

    try:
        torch.cuda.synchronize()
    except Exception:  # whatever it is, it is reported by every later call, too
        return True
    return False


# ------------------------------------------------------------------------------------------------------------ parent


def unpack(wheels: Path, folder: Path) -> list[Path]:
    """Folders to import from: the given one, and one for each of its wheels, unpacked.

    Args:
        wheels: folder with ``*.whl`` files or unpacked packages.
        folder: where wheels are unpacked, once.
    """
    paths = [wheels.resolve()]
    for wheel in sorted(wheels.glob("*.whl")):
        place = folder / wheel.stem
        if not place.is_dir():
            partial = place.with_suffix(".part")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
            partial.replace(place)
        paths.append(place.resolve())
    return paths


def environment(out: Path, paths: Sequence[Path], dry: bool) -> dict[str, str]:
    """The environment of the steps: caches inside ``out``, and what is imported from."""
    cache = out.resolve() / "cache"
    before = os.environ.get("PYTHONPATH")
    own = {
        "CLIPFAST_CACHE": str(cache / "clipfast"),
        "CLIPFAST_TUNE": "1",  # every way is timed here, whatever is shipped
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "PYTHONPATH": os.pathsep.join([*map(str, paths), str(ROOT), *([before] if before else [])]),
        "PYTHONUNBUFFERED": "1",
    }
    return os.environ | own | ({"TRITON_INTERPRET": "1"} if dry else {})


def allowance(left: float, steps: Sequence[Step], later: Sequence[Step]) -> float:
    """Seconds for steps that run now: their share of what is left."""
    share = sum(step.share for step in steps)
    return left * share / (share + sum(step.share for step in later))


def supervise(settings: argparse.Namespace, variables: Mapping[str, str]) -> None:
    """Runs the steps in processes until all are complete or the time is over."""
    out, started = settings.out, time.monotonic()
    steps = [step for step in STEPS if settings.only is None or step.name in settings.only]
    known = identity(settings)
    state = State(out, known)
    state.end_running("cut", "the run before ended here")
    if settings.again:
        state.forget()
    state.write()
    groups = [steps] if settings.dry_run else [[step] for step in steps]  # starting a process takes most of a dry run
    for number, group in enumerate(groups):
        deadline = None
        for _ in range(20):  # a process that breaks ends with its unit, and the next one goes on
            left = settings.budget - (time.monotonic() - started)
            names = {step.name for step in group}
            if names <= set(State(out, known).complete) or left < GRACE:
                break
            if deadline is None:
                later = [step for others in groups[number + 1 :] for step in others]
                deadline = time.monotonic() + allowance(left - GRACE, group, later)
            seconds = min(deadline - time.monotonic(), left - GRACE)
            if seconds <= 0:
                break
            before = State(out, known).units
            _run_child(settings, group, variables, seconds)
            after = State(out, known)
            left_over = [step.name for step in group if step.name not in after.complete]
            if after.units == before and left_over:
                reason = "its process ended before its first unit: see log.txt"
                after.put(f"{left_over[0]}/start", "failed", reason=reason)
                break


def _run_child(
    settings: argparse.Namespace, steps: Sequence[Step], variables: Mapping[str, str], seconds: float
) -> None:
    """One process for some steps; it is ended with all it started when it goes on too long."""
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", str(settings.out.resolve())]
    command += ["--budget", f"{seconds:.1f}", "--child", *(step.name for step in steps)]
    command += ["--dry-run"] if settings.dry_run else []
    command += ["--commit", settings.commit] if settings.commit else []
    reason, status = "", "cut"
    with open(settings.out / "log.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=dict(variables), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds + GRACE)
            status, reason = "failed", f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            reason = "its time was over"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    state = State(settings.out, identity(settings))
    state.end_running(status, reason)


def table(out: Path, known: Mapping[str, Any]) -> str:
    """What was done and found, in lines of at most 120 characters: units by step, then bars, then what is not done."""
    state = State(out, known)
    lines = []
    for step in STEPS:
        own = [entry for unit, entry in state.units.items() if unit.startswith(f"{step.name}/")]
        counts = {status: sum(entry["status"] == status for entry in own) for status in ("done", "failed", "skipped")}
        counts["cut"] = len(own) - sum(counts.values())
        seconds = sum(entry["seconds"] for entry in own)
        words = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "not begun"
        rest = "" if step.name in state.complete else "; more is left"
        lines.append(f"{step.name:<11}{words}{rest} ({seconds:.0f} s)")
    for unit, entry in state.units.items():
        if entry["status"] != "done":
            lines.append(f"{entry['status'].upper()} {unit}: {entry['reason']}"[:120])
    for file in sorted(out.glob(f"{QUESTION}-*.json")):
        bars = bars_of(json.loads(file.read_text(encoding="utf-8")))
        lines += sorted((bar_line(case, bar) for case, bar in bars), key=lambda line: "MISSED" not in line)
    return "\n".join(lines)


def bars_of(document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every bar of a result file with the name of its case."""
    return [(case, bar) for case, entry in document.get("cases", {}).items() for bar in entry.get("bars", ())]


def bar_line(case: str, bar: Mapping[str, Any]) -> str:
    """A bar in one line, as it was when it was measured."""
    from clipfast.bench.measuring import Bar

    at_least = "at_least" in bar
    return f"{case}: {Bar(bar['what'], bar['value'], bar['at_least' if at_least else 'at_most'], at_least)}"


def missing(paths: Sequence[Path]) -> list[str]:
    """The packages that are needed and cannot be imported, with ``paths`` first."""
    before = list(sys.path)
    sys.path[:0] = [str(path) for path in paths]
    try:
        importlib.invalidate_caches()
        return [name for name in NEEDED if importlib.util.find_spec(name) is None]
    finally:
        sys.path[:] = before


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite; returns 0 if no unit failed, 1 if one did, 2 where it cannot run."""
    settings = parser().parse_args(arguments)
    if settings.once:
        return _once()
    if settings.out is None:
        parser().error("--out is needed")
    if settings.child:
        return child(settings, time.time() + settings.budget)
    settings.out.mkdir(parents=True, exist_ok=True)
    paths = [] if settings.wheels is None else unpack(settings.wheels, settings.out / "cache" / "wheels")
    absent = missing(paths)
    if absent:
        print(f"benchmarks.gpu_suite: {', '.join(absent)} cannot be imported: give their --wheels", file=sys.stderr)
        return 2
    sys.path[:0] = [str(path) for path in paths]
    if not settings.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("benchmarks.gpu_suite: torch finds no GPU here; --dry-run shows that it runs", file=sys.stderr)
            return 2
    known = identity(settings)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        supervise(settings, environment(settings.out, paths, settings.dry_run))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
    finally:
        text = table(settings.out, known)
        (settings.out / "table.txt").write_text(text + "\n", encoding="utf-8")
        print(text)
    statuses = [entry["status"] for entry in State(settings.out, known).units.values()]
    return 1 if "failed" in statuses else 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _once() -> int:
    from benchmarks.gpu_bench import Bench, Sizes
    from benchmarks.gpu_tools import once
    from benchmarks.results import Results

    once(Bench("cuda", Sizes(), Results(QUESTION, SENTENCE, device="cuda"), print))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
