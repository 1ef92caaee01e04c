"""What the library that multiplies means for a forward: ``python -m benchmarks.forward_products``.

The decomposed forward (heads, attention, 16 text maps) of eight images in float32 with each setting of
``CLIPFAST_PRODUCTS``, against open_clip's plain forward, which is torch's own. The sets of instructions, their
processes and the clocks are those of :mod:`benchmarks.gemm`; rounds are interleaved. ``--table`` prints the results.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import clipfast
from benchmarks import cases, gemm
from benchmarks.results import FOLDER, Results
from clipfast.bench.document import provenance
from clipfast.bench.measuring import require
from clipfast.bench.memory import peak_memory
from clipfast.bench.table import duration, markdown_table
from clipfast.kernels.linear import libraries, onednn, openblas

QUESTION = "products"
SENTENCE = "How much faster is a decomposed forward than the plain one, by the library that multiplies?"
BATCH = 8
PLAIN = "plain"


def settings_here() -> list[str]:
    """The values of ``CLIPFAST_PRODUCTS`` that can be used here."""
    able = ["torch"]
    able += [] if onednn.unsupported_reasons() else ["onednn"]
    able += [] if openblas.unsupported_reasons() else ["openblas"]
    return able


def measure(name: str, threads: int, rounds: int, *, with_memory: bool) -> dict[str, Any]:
    """Checks and times one model; the entry of a result file."""
    torch.set_num_threads(threads)
    module = cases.module(name, "cpu")
    images = cases.noise(module.visual, BATCH, "cpu")
    # Named, because "auto" keeps its choices: here they must change with the setting.
    model = clipfast.wrap(module, backend="native")
    texts = cases.unit_texts(model.tower.embed_dim, "cpu")

    def decomposed(setting: str) -> Callable[[], Any]:
        def run() -> Any:
            os.environ[libraries.VARIABLE] = setting
            libraries.setting.cache_clear()
            return cases.explain(model, images, texts)

        return run

    calls: dict[str, Callable[[], Any]] = {PLAIN: lambda: cases.plain(module, images)}
    calls |= {setting: decomposed(setting) for setting in settings_here()}
    expected = calls[PLAIN]()
    checks = [
        check for setting in settings_here() for check in cases.against_plain(*calls[setting](), expected, cases.BOUND)
    ]
    require(checks)
    clock = time.thread_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {call: [] for call in calls}
    for number in range(rounds):
        for call in list(calls)[:: 1 if number % 2 else -1]:
            start = clock()
            calls[call]()
            seconds[call].append(clock() - start)
    entry = {
        "settings": {"model": name, "batch": BATCH, "threads": threads, "rounds": rounds},
        "clock": "processor time of the thread" if threads == 1 else "wall",
        "checks": [check.to_json() for check in checks],
        "seconds": seconds,
    }
    if with_memory:
        entry["peak_mb"] = memory(name, threads)
    return entry


def memory(name: str, threads: int) -> dict[str, float]:
    """Peak memory of a fresh process by call."""
    peaks = {PLAIN: peak_memory("benchmarks.cases:plain_call", name=name, batch=BATCH, threads=threads).peak_mb}
    for setting in settings_here():
        os.environ[libraries.VARIABLE] = setting
        peaks[setting] = peak_memory("benchmarks.cases:explain_call", name=name, batch=BATCH, threads=threads).peak_mb
    return peaks


def work(settings: Mapping[str, Any]) -> None:
    """Measures with one set of instructions, in the process that was started for it, and writes each result."""
    results = Results(QUESTION, SENTENCE, folder=Path(settings["folder"]))
    results.note_commit(settings["commit"])
    instructions = settings["instructions"]
    for name in settings["models"]:
        for threads in settings["threads"]:
            with_memory = instructions == "best" and threads == max(settings["threads"])
            entry = measure(name, threads, settings["rounds"], with_memory=with_memory)
            entry["settings"]["instructions"] = instructions
            written = results.write(f"{name}, {threads} threads, {instructions}", entry)
            print(" | ".join(row(written)), flush=True)


HEADER = ("model", "instructions", "threads", "plain", "torch", "onednn", "openblas", "peak memory over plain")


def row(case: Mapping[str, Any]) -> list[str]:
    """One case as cells under :data:`HEADER`: how many times as fast as plain, with the quartiles of the rounds."""
    settings, seconds, peaks = case["settings"], case["seconds"], case.get("peak_mb")
    cells = [settings["model"], settings["instructions"], str(settings["threads"])]
    cells.append(duration(median(seconds[PLAIN])))
    for name in HEADER[4:7]:
        if name not in seconds:
            cells.append("")
            continue
        ratios = [plain / own for plain, own in zip(seconds[PLAIN], seconds[name], strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        cells.append(f"{middle:.2f} ({low:.2f}–{high:.2f})")
    ratio = [] if peaks is None else [f"{name} {peaks[name] / peaks[PLAIN]:.2f}" for name in peaks if name != PLAIN]
    return [*cells, ", ".join(ratio)]


def tables(folder: Path = FOLDER) -> str:
    """All result files in a folder as Markdown, empty where there is none."""
    parts = []
    for file in sorted(folder.glob(f"{QUESTION}-*.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        rows = [row(case) for case in document["cases"].values()]
        parts += [f"**{document['sentence']}**", provenance(document), "\n".join(markdown_table(HEADER, rows))]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, or prints the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.forward_products", description=SENTENCE)
    parser.add_argument("--table", action="store_true", help="print the results and measure nothing")
    parser.add_argument("--model", action="append", choices=gemm.MODELS, help="repeatable (all)")
    parser.add_argument("--threads", action="append", type=int, help="repeatable (1 and all)")
    parser.add_argument("--instructions", action="append", choices=gemm.INSTRUCTIONS, help="repeatable (best, avx2)")
    parser.add_argument("--rounds", type=int, default=gemm.ROUNDS, help=f"timed rounds ({gemm.ROUNDS})")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result (benchmarks/results)")
    parser.add_argument("--commit", help="the commit, where the code has no git history")
    options = parser.parse_args(arguments)
    if options.table:
        print(tables(options.out))
        return 0
    settings = {
        "models": options.model or gemm.MODELS,
        "threads": options.threads or sorted({1, torch.get_num_threads()}),
        "rounds": options.rounds,
        "folder": str(options.out.resolve()),
        "commit": options.commit,
    }
    for name in options.instructions or gemm.INSTRUCTIONS:
        failed = gemm.run_with(name, "benchmarks.forward_products:work", settings)
        if failed:
            return failed
    return 0


if __name__ == "__main__":
    sys.exit(main())
