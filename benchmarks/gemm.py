"""How fast each library multiplies float32 matrices of a tower's shapes: ``python -m benchmarks.gemm``.

Sizes are those of the products of ViT-B-32, B-16 and L-14 with batches of 1, 8 and 32 images. Libraries: torch's own
(MKL on x86), oneDNN through torch, with the weight as it is and packed before, OpenBLAS with its own threads and as
clipfast calls it (:mod:`clipfast.kernels.linear.openblas`), and BLIS where the wheel ``blis`` is installed, which has
one thread. Each is checked against float64 before it is timed.

Every set of instructions has a process of its own, because libraries read their variables when they are loaded:
``best`` has none of :data:`VARIABLES`, ``avx2`` stands for a CPU without AVX-512. Rounds are interleaved, every
library once in each. With one thread its processor time counts, which other processes do not disturb; with more, wall
time.

The peak is that of a loop of independent FMAs on registers, in C++, compiled here and timed in every round: vectors
of 64 bytes for ``best`` where the CPU has them, else of 32.

``--table`` prints the results as Markdown, as ``python -m benchmarks.table --write`` does in the documentation.
"""

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import FOLDER, Results
from clipfast.bench.document import provenance
from clipfast.bench.measuring import Check, require
from clipfast.bench.table import markdown_table
from clipfast.kernels.linear import onednn, openblas

QUESTION = "gemm"
SENTENCE = "How fast do libraries multiply float32 matrices of a tower's shapes?"
MODELS, BATCHES = ("ViT-B-32", "ViT-B-16", "ViT-L-14"), (1, 8, 32)
ROUNDS = 7
BOUND = 2e-6
"""Largest error against float64, relative to the largest result."""
LARGEST_BLIS_BATCH = 8
"""With more images BLIS, which is slow here, would take half of the time."""
CHECKED_ROWS = 64
"""So many of the first and of the last rows are compared with float64."""
VARIABLES = (
    "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR",
    "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "CLIPFAST_NATIVE_ISA", "BLIS_ARCH_TYPE", "OMP_NUM_THREADS",
)  # fmt: skip
"""What chooses kernels and threads of the libraries. A process gets only what its instructions say."""
INSTRUCTIONS: Mapping[str, Mapping[str, str]] = {
    "best": {},
    "avx2": {
        "OPENBLAS_CORETYPE": "Haswell",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "CLIPFAST_NATIVE_ISA": "avx2",
        "BLIS_ARCH_TYPE": "haswell",
    },
}
"""Of each set of instructions: the variables that limit every library to it."""

PEAK_SOURCE = r"""
#include <immintrin.h>
#define V(x) VECTOR(x)
#if WIDE == 16
#define VECTOR(x) _mm512_##x
typedef __m512 Vector;
#else
#define VECTOR(x) _mm256_##x
typedef __m256 Vector;
#endif
extern "C" float peak(long rounds) {
  Vector sums[12], a = V(set1_ps)(0.999f), b = V(set1_ps)(1e-3f);
  for (int i = 0; i < 12; ++i) sums[i] = V(set1_ps)(float(i));
  for (long round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sums[i] = V(fmadd_ps)(sums[i], a, b);
  }
  float total = 0, values[WIDE];
  for (int i = 0; i < 12; ++i) {
    V(storeu_ps)(values, sums[i]);
    total += values[0];
  }
  return total;
}
"""
PEAK_ROUNDS = 1_000_000

Multiply = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    """One product ``[rows, depth] · [columns, depth]ᵀ`` of a tower."""

    model: str
    product: str
    batch: int
    rows: int
    depth: int
    columns: int

    @property
    def flop(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.depth * self.columns


def shapes(models: Sequence[str] = MODELS, batches: Sequence[int] = BATCHES) -> Iterator[Shape]:
    """The products of a forward: of every block, and those of the last block's MLP, which has one row per image."""
    import open_clip

    for model in models:
        config = open_clip.get_model_config(model)
        assert config is not None
        vision = config["vision_cfg"]
        width, tokens = vision["width"], (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        for batch in batches:
            rows = batch * tokens
            yield Shape(model, "qkv", batch, rows, width, 3 * width)
            yield Shape(model, "attention out", batch, rows, width, width)
            yield Shape(model, "MLP in", batch, rows, width, 4 * width)
            yield Shape(model, "MLP out", batch, rows, 4 * width, width)
            yield Shape(model, "last MLP in", batch, batch, width, 4 * width)
            yield Shape(model, "last MLP out", batch, batch, 4 * width, width)


# ------------------------------------------------------------------------------------------------------ the libraries


def _whole_openblas(x: Tensor, weight: Tensor, out: Tensor) -> Multiply:
    """OpenBLAS's own division among its own threads."""
    library = openblas.load().library
    assert library is not None
    (rows, depth), columns = x.shape, len(weight)
    sgemm, pointer, real = library.handle.scipy_cblas_sgemm, ctypes.c_void_p, ctypes.c_float
    left, right, result = (pointer(tensor.data_ptr()) for tensor in (x, weight, out))
    arguments = (rows, columns, depth, real(1), left, depth, right, depth, real(0), result, columns)
    threads = torch.get_num_threads()

    def run() -> None:
        library.handle.scipy_openblas_set_num_threads(threads)
        sgemm(101, 111, 112, *arguments)

    return run


def _blis(x: Tensor, weight: Tensor, out: Tensor) -> Multiply | None:
    try:
        from blis.py import gemm
    except ImportError:
        return None
    arrays = [tensor.numpy() for tensor in (x, weight, out)]
    return lambda: gemm(arrays[0], arrays[1], out=arrays[2], trans2=True, beta=0.0)


Candidates = dict[str, tuple[Multiply, Callable[[], Tensor]]]
"""Of every library: the product, and its result after that."""


def libraries(x: Tensor, weight: Tensor, out: Tensor, *, with_blis: bool = True) -> Candidates:
    """Every library's product of ``x [rows, depth]`` and ``weight [columns, depth]``."""
    made: Candidates = {"torch": (lambda: torch.mm(x, weight.T, out=out), lambda: out)}

    def returning(run: Callable[[], Tensor]) -> tuple[Multiply, Callable[[], Tensor]]:
        return run, run

    if not onednn.unsupported_reasons():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        made["oneDNN"] = returning(lambda: onednn.product(x, weight, None, None))
        made["oneDNN, packed"] = returning(
            lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")  # type: ignore[no-any-return]
        )
    if not openblas.unsupported_reasons():
        made["OpenBLAS"] = returning(lambda: openblas.product(x, weight, None, None))
        made["OpenBLAS, own threads"] = (_whole_openblas(x, weight, out), lambda: out)
    blis = _blis(x, weight, out) if with_blis and torch.get_num_threads() == 1 else None
    if blis is not None:
        made["BLIS"] = (blis, lambda: out)
    return made


# ----------------------------------------------------------------------------------------------------------- the peak


@cache
def peak_loop(wide: int) -> Callable[[int], object] | None:
    """The loop of FMAs on vectors of so many float32, None without a compiler or on another CPU."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64":
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "peak.cpp"), Path(folder, "peak.so")
        source.write_text(PEAK_SOURCE, encoding="utf-8")
        target = ["-mavx512f"] if wide == 16 else ["-mavx2", "-mfma"]
        command = [compiler, "-O2", "-shared", "-fPIC", *target, f"-DWIDE={wide}", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        function = ctypes.CDLL(str(library)).peak
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_long]
    return function  # type: ignore[no-any-return]


def vector_width(instructions: str) -> int:
    """Float32 values in the widest vector that these instructions and the CPU have."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split() if Path("/proc/cpuinfo").exists() else []
    return 16 if instructions == "best" and "avx512f" in flags else 8


# ------------------------------------------------------------------------------------------------------ the measuring


def measure(shape: Shape, threads: int, instructions: str, rounds: int) -> dict[str, Any]:
    """Checks and times every library on one shape; the entry of a result file."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.rows, shape.depth, generator=generator)
    weight = torch.randn(shape.columns, shape.depth, generator=generator) * shape.depth**-0.5
    out = torch.empty(shape.rows, shape.columns)
    candidates = libraries(x, weight, out, with_blis=shape.batch <= LARGEST_BLIS_BATCH)
    checks = _checks(candidates, x, weight, out)
    require(checks)
    loop, wide = peak_loop(vector_width(instructions)), vector_width(instructions)
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    peaks: list[float] = []
    with ThreadPoolExecutor(threads) as pool:
        for number in range(rounds):
            order = list(candidates) if number % 2 else list(candidates)[::-1]
            for name in order:
                run = candidates[name][0]
                start = clock()
                run()
                seconds[name].append(clock() - start)
            if loop is not None:
                start = clock()
                if threads == 1:
                    loop(PEAK_ROUNDS)
                else:
                    list(pool.map(loop, [PEAK_ROUNDS] * threads))
                peaks.append(threads * PEAK_ROUNDS * 12 * 2 * wide / (clock() - start) / 1e9)
    gflops = {name: shape.flop / median(times) / 1e9 for name, times in seconds.items()}
    return {
        "settings": asdict(shape) | {"threads": threads, "instructions": instructions, "rounds": rounds},
        "clock": "processor time of the thread" if threads == 1 else "wall",
        "checks": [check.to_json() for check in checks],
        "seconds": seconds,
        "gflops": gflops,
        "peak_gflops": median(peaks) if peaks else None,
        "times_as_fast_as_torch": {
            name: median(own / other for own, other in zip(seconds["torch"], times, strict=True))
            for name, times in seconds.items()
        },
    }


def _checks(candidates: Candidates, x: Tensor, weight: Tensor, out: Tensor) -> list[Check]:
    some = torch.cat([torch.arange(len(x))[:CHECKED_ROWS], torch.arange(len(x))[-CHECKED_ROWS:]])
    expected = x[some].double() @ weight.double().T
    checks = []
    for name, (run, result) in candidates.items():
        out.fill_(torch.nan)
        run()
        error = float((result()[some] - expected).abs().max() / expected.abs().max())
        checks.append(Check(f"{name} against float64", error, BOUND))
    return checks


def paths() -> dict[str, str]:
    """What each library says of the kernels it runs, and the variables that tell it."""
    script = "import torch; x = torch.ones(300, 300); {}"
    one_dnn = "torch.ops.mkldnn._linear_pointwise(x, x, None, 'none', [], '')"
    said = {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "MKL": _said({"MKL_VERBOSE": "1"}, script.format("torch.mm(x, x)"), r"MKL_VERBOSE (oneMKL.*?)(?:,? Lnx|$)"),
        "oneDNN": _said({"ONEDNN_VERBOSE": "1"}, script.format(one_dnn), r"exec,cpu,\w+,([\w:]+)"),
    }
    blas = openblas.load().library
    if blas is not None:
        said["OpenBLAS"] = f"{blas.version} {blas.core}"
    return said | {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _said(variables: Mapping[str, str], script: str, pattern: str) -> str:
    environment = os.environ | variables
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    found = re.search(pattern, done.stdout, re.MULTILINE)
    return found[1].strip() if found else "unknown"


def work(settings: Mapping[str, Any]) -> None:
    """Measures with one set of instructions, in the process that was started for it, and writes each result."""
    results = Results(QUESTION, SENTENCE, folder=Path(settings["folder"]))
    results.note_commit(settings["commit"])
    name = settings["instructions"]
    said = paths()
    print(name, said, flush=True)
    for shape in shapes(settings["models"], settings["batches"]):
        for threads in settings["threads"]:
            entry = measure(shape, threads, name, settings["rounds"]) | {"paths": said}
            results.write(f"{shape.model} {shape.product}, batch {shape.batch}, {threads} threads, {name}", entry)
            speeds = ", ".join(f"{library} {speed:.0f}" for library, speed in entry["gflops"].items())
            peak = entry["peak_gflops"]
            print(
                f"{shape.model} {shape.product}, batch {shape.batch}, {threads} threads, {name}: {speeds} GFLOP/s"
                f"{'' if peak is None else f', peak {peak:.0f}'}",
                flush=True,
            )


# ---------------------------------------------------------------------------------------------------------- the table


def table(document: Mapping[str, Any]) -> str:
    """A result file as Markdown: what libraries reach over all shapes, then every product of batch 8."""
    cases = list(document["cases"].values())
    groups = sorted({(case["settings"]["instructions"], case["settings"]["threads"]) for case in cases}, reverse=True)
    parts = [f"**{document['sentence']}**", provenance(dict(document))]
    for instructions, threads in sorted(groups, key=lambda group: (group[0] != "best", group[1])):
        own = [
            case
            for case in cases
            if (case["settings"]["instructions"], case["settings"]["threads"]) == (instructions, threads)
        ]
        said = ", ".join(f"{name}: {text}" for name, text in own[0]["paths"].items() if name not in VARIABLES)
        peaks = [case["peak_gflops"] for case in own if case["peak_gflops"]]
        peak = f" The peak of FMAs is {median(peaks):.0f} GFLOP/s." if peaks else ""
        title = {"best": "The CPU's best instructions", "avx2": "AVX2 alone"}[instructions]
        parts.append(f"{title}, {threads} {'thread' if threads == 1 else 'threads'} ({said}).{peak}")
        parts.append("\n".join(_summary(own)))
    return "\n\n".join(parts)


def _summary(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for case in cases for name in case["gflops"]))
    many = [case for case in cases if not case["settings"]["product"].startswith("last")]
    rows = []
    for name in names:
        own = [case for case in many if name in case["gflops"]]
        speeds = [case["gflops"][name] for case in own]
        ratios = [case["times_as_fast_as_torch"][name] for case in own]
        shares = [case["gflops"][name] / case["peak_gflops"] for case in own if case["peak_gflops"]]
        last = [
            case["times_as_fast_as_torch"][name]
            for case in cases
            if case["settings"]["product"].startswith("last") and name in case["gflops"]
        ]
        rows.append(
            [
                name,
                f"{median(speeds):.0f} ({min(speeds):.0f}–{max(speeds):.0f})",
                f"{median(shares):.0%}" if shares else "",
                f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
                f"{median(last):.2f} ({min(last):.2f}–{max(last):.2f})" if last else "",
            ]
        )
    header = ("library", "GFLOP/s", "of the peak", "times as fast as torch", "last block's MLP")
    return markdown_table(header, rows)


def tables(folder: Path = FOLDER) -> str:
    """All result files in a folder as Markdown, empty where there is none."""
    return "\n\n".join(
        table(json.loads(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob(f"{QUESTION}-*.json"))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, or prints the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.gemm", description=SENTENCE)
    parser.add_argument("--table", action="store_true", help="print the results and measure nothing")
    parser.add_argument("--model", action="append", choices=MODELS, help="repeatable (all)")
    parser.add_argument("--batch", action="append", type=int, help="repeatable (1, 8, 32)")
    parser.add_argument("--threads", action="append", type=int, help="repeatable (1 and all)")
    parser.add_argument("--instructions", action="append", choices=INSTRUCTIONS, help="repeatable (best, avx2)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"timed rounds ({ROUNDS})")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result (benchmarks/results)")
    parser.add_argument("--commit", help="the commit, where the code has no git history")
    options = parser.parse_args(arguments)
    if options.table:
        print(tables(options.out))
        return 0
    settings = {
        "models": options.model or MODELS,
        "batches": options.batch or BATCHES,
        "threads": options.threads or sorted({1, torch.get_num_threads()}),
        "rounds": options.rounds,
        "folder": str(options.out.resolve()),
        "commit": options.commit,
    }
    for name in options.instructions or INSTRUCTIONS:
        failed = run_with(name, "benchmarks.gemm:work", settings)
        if failed:
            return failed
    return 0


def run_with(instructions: str, target: str, settings: Mapping[str, Any]) -> int:
    """Calls ``target``, ``"module:function"``, with settings in a process with these instructions; its exit code."""
    variables = {key: value for key, value in os.environ.items() if key not in VARIABLES} | INSTRUCTIONS[instructions]
    module, _, function = target.partition(":")
    script = f"import json, sys; from {module} import {function}; {function}(json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", script, json.dumps({**settings, "instructions": instructions})]
    return subprocess.run(command, cwd=Path(__file__).resolve().parents[1], env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
