"""The results as Markdown: ``python -m benchmarks.table [FILE …]``. Reads result files and nothing else.

``python -m benchmarks.table --readme`` writes every question's tables into the README, between the comments that name
it.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FORMAT
from clipfast.bench.document import provenance
from clipfast.bench.table import duration, markdown_table, size

FOLDER = Path(__file__).resolve().parent / "results"
README = FOLDER.parents[1] / "README.md"
BLOCK = re.compile(r"(<!-- results: (?P<question>\w+) -->\n).*?(\n<!-- end of results -->)", re.DOTALL)
HEADER = ("case", "time", "against", "times as fast (q10–q90)", "peak memory", "largest error", "bars")


def _bar(bar: dict[str, Any]) -> str:
    sign, limit = ("≥", bar["at_least"]) if "at_least" in bar else ("≤", bar["at_most"])
    return f"{bar['value']:.4g} {sign} {limit:g} {'met' if bar['met'] else '**missed**'}"


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
    rows = [row(name, case) for name, case in document["cases"].items()]
    return "\n".join([f"**{document['sentence']}**", "", provenance(document), "", *markdown_table(HEADER, rows)])


def written(text: str, folder: Path = FOLDER) -> str:
    """A page with the tables of every question that it has a place for, by the files in ``folder``."""

    def block(found: re.Match[str]) -> str:
        question = found["question"]
        files = sorted(folder.glob(f"{question}-*.json"))
        tables = [table(json.loads(file.read_text(encoding="utf-8"))) for file in files]
        return found[1] + ("\n\n".join(tables) or f"*Not measured yet: `benchmarks/bench_{question}.py`.*") + found[3]

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str]) -> None:
    """Prints the files named, or every file with measured cases; or writes the README."""
    if list(arguments) == ["--readme"]:
        README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
        return
    files = [Path(argument) for argument in arguments] or sorted(FOLDER.glob("*.json"))
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    print("\n\n".join(table(document) for document in documents if document.get("format") == FORMAT))


if __name__ == "__main__":
    main(sys.argv[1:])
