"""The steps of :mod:`benchmarks.gpu_suite` that run tools: the build, the compiler, tests, sanitizers, the profiler."""

import csv
import importlib.util
import io
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch

from benchmarks import gpu_specimens
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_forward import Inputs, heaviest, with_maps
from benchmarks.specimens import Specimen
from clipfast.kernels import cuda, manifest

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 256
"""Batch size of the kernels that are compiled ahead."""
Unit = tuple[str, Callable[[Bench], None]]


class Skipped(Exception):
    """A unit that cannot run on this machine; the message says why."""


class Failed(Exception):
    """A unit that ran and found something wrong; the message says what."""


def tool(name: str) -> str:
    """The path of one of CUDA's tools.

    Raises:
        Skipped: it is neither on the PATH nor in CUDA_HOME.
    """
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    for folder in (None, *(str(Path(home, "bin")) for home in homes if home)):
        found = shutil.which(name, path=folder)
        if found:
            return found
    raise Skipped(f"{name} is neither on the PATH nor in CUDA_HOME")


def run(bench: Bench, *command: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Runs a command in the repository and says its last lines; returns its exit code and all it printed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines()[-15:]:
        bench.say(f"  | {line}")
    return done.returncode, done.stdout


def capability(bench: Bench) -> int:
    """Of the GPU as 80, 90, 100; 90 in a dry run."""
    if bench.dry:
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


# ------------------------------------------------------------------------------------------------------------- build


def build_units(bench: Bench) -> list[Unit]:
    """The library in CUDA."""
    return [("csrc/cuda", build)]


def build(bench: Bench) -> None:
    """Compiles csrc/cuda beside the kernels as an installation does, unless that was done."""
    if cuda.LIBRARY.is_file() and not manifest.problem(cuda.LIBRARY, ROOT / "csrc" / "cuda"):
        bench.say(f"{cuda.LIBRARY.name} is built already")
        return
    if bench.dry:
        raise Skipped("a dry run builds nothing")
    nvcc = tool("nvcc")
    if importlib.util.find_spec("setuptools") is None:
        raise Skipped("setuptools is not installed")
    home = str(Path(nvcc).resolve().parents[1])
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    code, printed = run(bench, *command, environment={"CLIPFAST_CUDA": "1", "CUDA_HOME": home})
    cuda.forget()
    problem = cuda.load().reason
    if code or problem:
        raise Failed(problem or f"setup.py ended with {code}: {printed.strip().splitlines()[-1]}")


# ---------------------------------------------------------------------------------------------------------- ceilings


def ceiling_units(bench: Bench) -> list[Unit]:
    """What the device reaches, and the kernels compiled side by side."""
    return [("copy", copy_rate), ("matmul", matmul_rate), ("precompile", precompile)]


def copy_rate(bench: Bench) -> None:
    """Bytes per second of a large copy on the device, read and written ones."""
    source = torch.ones(bench.sizes.copied // 4, device=bench.device)
    target = torch.empty_like(source)
    times = bench.rounds({"copy": lambda: target.copy_(source)}, single=True)
    rate = 2 * source.nbytes / statistics.median(times["copy"])
    bench.record("ceiling copy", times, settings={"bytes": source.nbytes}, figures={"bytes_per_second": rate})


def matmul_rate(bench: Bench) -> None:
    """FLOP/s of a large square product of random matrices."""
    side = bench.sizes.matmul
    a, b = bench.draw(side, side), bench.draw(side, side, seed=1)
    times = bench.rounds({"matmul": lambda: a @ b}, single=True)
    rate = 2 * side**3 / statistics.median(times["matmul"])
    bench.record("ceiling matmul", times, settings={"side": side}, figures={"flops_per_second": rate})


def precompile(bench: Bench) -> None:
    """Compiles every specimen in processes, one per core, into Triton's cache."""
    on, limit = capability(bench), bench.sizes.specimens
    count = len(_listed(on, limit))
    workers = 1 if bench.dry else max(1, min(os.cpu_count() or 1, count))
    failures = []
    with _not_interpreted(), _spawned(workers) as pool:
        futures = [pool.submit(_compile, on, index, limit) for index in range(count)]
        for done, future in enumerate(as_completed(futures), 1):
            failure = future.result()
            if failure:
                failures.append(failure)
            if done % 50 == 0 or done == count:
                bench.say(f"  compiled {done} of {count}, {len(failures)} failed")
    bench.record("precompile", {}, settings={"launches": count, "processes": workers}, figures={"failed": failures})
    if failures:
        raise Failed(f"{len(failures)} of {count} do not compile, the first: {failures[0]}")


@contextmanager
def _not_interpreted() -> Iterator[None]:
    """Processes that are started meanwhile compile, also those of a dry run."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def _spawned(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))


@cache
def _listed(on: int, limit: int | None) -> list[Specimen]:
    return gpu_specimens.chosen(on, IMAGES, limit)


def _compile(on: int, index: int, limit: int | None) -> str:
    """Compiles one specimen in a worker; returns why it failed, or nothing."""
    from benchmarks.compiled import offline

    specimen = _listed(on, limit)[index]
    launch = specimen.launch
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages, "warmup": True}
    try:
        with offline(on):
            binary = launch.kernel.run(
                **launch.arguments, **launch.constants, **launch.config.blocks, **options, grid=launch.grid
            )
            if hasattr(binary, "result"):
                binary.result()
    except Exception as error:  # compilers fail in their own ways
        return f"{gpu_specimens.name(specimen)}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


# ------------------------------------------------------------------------------------------------------------- tests


def test_units(bench: Bench) -> list[Unit]:
    """Every test file that has something to say about a GPU."""
    return [(path, partial(tests, path=path)) for path in bench.sizes.tests]


def tests(bench: Bench, *, path: str) -> None:
    """Runs a test file with pytest."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    if not (ROOT / path).is_file():
        raise Skipped("no such file")
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "--color=no", path]
    if not bench.dry and importlib.util.find_spec("xdist") is not None:
        command[3:3] = ["-n", str(min(6, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_benchmark") is not None:
        command[3:3] = ["-p", "no:benchmark"]
    code, printed = run(bench, *command, environment={"CLIPFAST_TUNE": ""})
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", printed)}
    bench.record(f"tests {path}", {}, settings={}, figures=counts | {"exit_code": code})
    if code:
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", printed, re.MULTILINE)
        raise Failed(f"{len(failed) or 'no'} tests failed, pytest ended with {code}: {', '.join(failed[:3])}")


# ------------------------------------------------------------------------------------------------------------- races


def race_units(bench: Bench) -> list[Unit]:
    """Compute-sanitizer over every specimen, and equal bits over many runs."""
    sanitizers = [(each, partial(sanitizer, check=each)) for each in ("memcheck", "racecheck")]
    return [sanitizers[0], ("equal bits", equal_bits), sanitizers[1]]


def sanitizer(bench: Bench, *, check: str) -> None:
    """Runs every specimen once under one of compute-sanitizer's tools."""
    command = [tool("compute-sanitizer"), "--tool", check, "--error-exitcode", "9", "--print-limit", "20"]
    command += [sys.executable, "-m", "benchmarks.gpu_specimens", "--images", str(bench.sizes.images)]
    command += ["--device", bench.device, *(["--limit", str(bench.sizes.specimens)] if bench.sizes.specimens else [])]
    # Without torch's cache every tensor is an allocation of its own, and reading beside it is seen.
    code, printed = run(bench, *command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    ran = len(re.findall(r"^ran \d+ ", printed, re.MULTILINE))
    counted = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", printed)
    errors = sum(int(number) for found in counted for number in found if number)
    bench.record(check, {}, settings={}, figures={"specimens": ran, "errors": errors, "exit_code": code})
    if code or errors or not ran:
        raise Failed(f"{errors} errors, {ran} specimens ran, it ended with {code}")


def equal_bits(bench: Bench) -> None:
    """Every specimen many times: other bits are a race."""
    images = bench.sizes.images * (1 if bench.dry else 16)
    wrong, silent = {}, []
    listed = gpu_specimens.chosen(capability(bench), images, bench.sizes.specimens)
    for specimen in listed:
        launch = gpu_specimens.with_memory(specimen.launch, bench.device)
        different, written = gpu_specimens.repeat(launch, bench.sizes.runs)
        if different:
            wrong[gpu_specimens.name(specimen)] = different
        if not written:
            silent.append(gpu_specimens.name(specimen))
    figures = {"specimens": len(listed), "different": wrong, "wrote nothing": silent}
    bench.record("equal bits", {}, settings={"runs": bench.sizes.runs, "images": images}, figures=figures)
    if wrong or silent:
        raise Failed(
            f"{len(wrong)} of {len(listed)} specimens have other bits from run to run, {len(silent)} wrote none"
        )


# ----------------------------------------------------------------------------------------------------------- profile


def profile_units(bench: Bench) -> list[Unit]:
    """Where a forward's time goes, and the heaviest kernels under Nsight Compute."""
    return [("heaviest kernels", profile), ("ncu", ncu)]


def profile(bench: Bench) -> None:
    """The kernels of a decomposed forward that take longest."""
    listed = heaviest(bench, 20)
    for kernel, milliseconds in listed[:5]:
        bench.say(f"  {milliseconds:.3f} ms {kernel[:90]}")
    bench.record("heaviest kernels", {}, settings={}, figures={"milliseconds": [list(each) for each in listed]})


METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes.sum",
    "lts__t_sector_hit_rate.pct",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "smsp__sass_inst_executed_op_local.sum",
)
"""What is read of every launch."""


def function(kernel: str) -> str:
    """A kernel's name without its namespaces, template arguments and parameters, as ncu's base names are."""
    name = re.split(r"[<(]", kernel.removeprefix("void "), maxsplit=1)[0]
    return name.rpartition("::")[2].strip()


def ncu(bench: Bench, count: int = 5) -> None:
    """Nsight Compute over the launches of the heaviest kernels in one forward."""
    program = tool("ncu")
    names = dict.fromkeys(function(kernel) for kernel, _ in heaviest(bench, 4 * count))
    listed = [name for name in names if name.isidentifier()][:count]
    command = [program, "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none"]
    command += ["--metrics", ",".join(METRICS), "--launch-count", "40", "--kernel-name-base", "function"]
    command += ["--kernel-name", f"regex:^({'|'.join(map(re.escape, listed))})$"]
    code, printed = run(bench, *command, sys.executable, "-m", "benchmarks.gpu_suite", "--once")
    launches = read_csv(printed)
    bench.record("ncu", {}, settings={"kernels": listed}, figures={"launches": launches, "exit_code": code})
    if code or not launches:
        raise Failed(f"ncu ended with {code} and measured {len(launches)} launches: {last_line(printed)}")


def last_line(printed: str) -> str:
    """The last line that was printed."""
    return (printed.strip().splitlines() or ["nothing was printed"])[-1][:200]


def read_csv(printed: str) -> list[dict[str, str]]:
    """The launches in ncu's CSV, which other lines surround: kernel, grid and :data:`METRICS`."""
    lines = [line for line in printed.splitlines() if line.startswith('"')]
    wanted = {"Kernel Name", "Grid Size", "Block Size", *METRICS}
    rows = csv.DictReader(io.StringIO("\n".join(lines)))
    return [{key: value for key, value in row.items() if key in wanted} for row in rows if row.get("Kernel Name")]


def once(bench: Bench) -> None:
    """One decomposed forward with maps between the profiler's marks, for ncu."""
    call = with_maps(Inputs.of(bench, bench.sizes.models[0], bench.sizes.batches[0]))
    for _ in range(3):
        call()
    if bench.dry:
        call()
        return
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
