"""The results as Markdown: ``python -m benchmarks.table [FILE …]``. Reads result files and nothing else."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"
HEADER = ("case", "time", "against", "times as fast (q10–q90)", "peak memory", "largest error", "bars")


def duration(seconds: float) -> str:
    """Seconds with a unit that suits them."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def size(megabytes: float) -> str:
    """MB with a unit that suits them."""
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.2f} GB"


def _bar(bar: dict[str, Any]) -> str:
    sign, limit = ("≥", bar["at_least"]) if "at_least" in bar else ("≤", bar["at_most"])
    return f"{bar['value']:.3g} {sign} {limit:g} {'met' if bar['met'] else '**missed**'}"


def row(name: str, case: dict[str, Any]) -> list[str]:
    """One case as cells under :data:`HEADER`."""
    a, b = case["a"], case["b"]
    ratio, memory = case.get("ratio_b_over_a"), case.get("memory")
    batch = case["settings"].get("batch")
    return [
        name if batch is None else f"{name}, batch {batch}",
        f"{a['name']} {duration(a['seconds']['median'])}",
        f"{b['name']} {duration(b['seconds']['median'])}",
        f"{ratio['median']:.3g} ({ratio['q10']:.3g}–{ratio['q90']:.3g})" if ratio else "",
        f"{size(memory['a']['peak_mb'])} / {size(memory['b']['peak_mb'])}" if memory else "",
        f"{max(check['error'] for check in case['checks']):.1e}",
        "; ".join(_bar(bar) for bar in case.get("bars", ())),
    ]


def table(document: dict[str, Any]) -> str:
    """One result file as Markdown: the question, the machine and commit, a table."""
    machine, versions, code = document["machine"], document["versions"], document["code"]
    commit = "no commit" if code["commit"] is None else f"commit {code['commit'][:10]}"
    changed = " with local changes" if code["dirty"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    cases = document["cases"]
    threads = sorted({str(case["torch_threads"]) for case in cases.values() if "torch_threads" in case})
    computing = f", {'/'.join(threads)} threads" if threads else ""
    lines = [
        f"**{document['sentence']}**",
        "",
        f"{machine['device_name']}, {machine['cores']} cores{computing}; {packages}; {commit}{changed}.",
        "",
        *(f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER))),
        *(f"| {' | '.join(row(name, case))} |" for name, case in cases.items()),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Prints the files named, or every result file."""
    files = [Path(argument) for argument in arguments] or sorted(FOLDER.glob("*.json"))
    print("\n\n".join(table(json.loads(file.read_text(encoding="utf-8"))) for file in files))


if __name__ == "__main__":
    main(sys.argv[1:])
