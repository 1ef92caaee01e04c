"""Prints result files as Markdown: ``python -m benchmarks.table [FILE …]``.

``python -m benchmarks.table --write`` replaces the tables in :data:`PAGES`, between comments that name the question.
"""

import json
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.results import FORMAT
from clipfast.bench.document import provenance
from clipfast.bench.table import duration, markdown_table, size

FOLDER = Path(__file__).resolve().parent / "results"
ROOT = FOLDER.parents[1]
PAGES = (ROOT / "README.md", *(ROOT / "docs" / "results" / f"{page}.md" for page in ("speed", "peers", "gpu")))
"""The pages with tables of results."""
BLOCK = re.compile(r"(<!-- results: (?P<question>\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
HEADER = ("case", "time", "against", "times as fast (q10–q90)", "peak memory", "largest error", "bars")


def _bar(bar: dict[str, Any]) -> str:
    sign, limit = ("≥", bar["at_least"]) if "at_least" in bar else ("≤", bar["at_most"])
    return f"{bar['value']:.4g} {sign} {limit:g} {'met' if bar['met'] else '**missed**'}"


def row(name: str, case: dict[str, Any]) -> list[str]:
    """One case as cells under :data:`HEADER`."""
    if "sides" in case:
        return _several(name, case)
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


def _several(name: str, case: dict[str, Any]) -> list[str]:
    """A case with any number of sides: the first two named ones of a comparison, and their ratio."""
    times = {side: duration(entry["seconds"]["median"]) for side, entry in case["sides"].items()}
    figures = case.get("figures", {})
    pair = next((figure for figure in figures if figure.startswith("decomposed over ")), None)
    first, second = pair.split(" over ") if pair is not None else (next(iter(times)), None)
    return [
        name,
        f"{first} {times[first]}",
        "" if second is None else f"{second} {times[second]}",
        "" if pair is None else f"{figures[pair]:.3g}",
        "",
        f"{max(check['error'] for check in case['checks']):.1e}" if case["checks"] else "",
        "; ".join(_bar(bar) for bar in case.get("bars", ())),
    ]


def table(document: dict[str, Any]) -> str:
    """One result file as Markdown: question, machine, commit and table of the cases that were timed."""
    rows = [row(name, case) for name, case in document["cases"].items() if case.get("sides", True)]
    return "\n".join([f"**{document['sentence']}**", "", provenance(document), "", *markdown_table(HEADER, rows)])


def truth_table(document: dict[str, Any]) -> str:
    """Machine, commit and bars of :mod:`benchmarks.truth`."""
    from benchmarks.truth.pages import bars

    return f"{provenance(document)}\n\n{bars(document)}"


MODELLED = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14")


def roofline_table() -> str:
    """The modelled time of a decomposed forward over that of open_clip's eager forward."""
    from benchmarks import roofline

    device = roofline.DEVICES["h200"]
    settings = roofline.parser().parse_args([])
    estimates = [
        roofline.estimate(
            roofline.Batch(roofline.shape_of(name), settings.batch, roofline.BYTES[settings.dtype]),
            device,
            texts=settings.texts,
        )
        for name in MODELLED
    ]
    rows = [
        [label, *(f"{estimate.against(extra, 'plain_eager'):.2f}" for estimate in estimates)]
        for label, extra in (("heads + attention", "alpha"), (f"… + {settings.texts} text maps", "maps"))
    ]
    return "\n".join([roofline.sentence(device, settings), "", *markdown_table(("", *MODELLED), rows)])


def tables(question: str, folder: Path = FOLDER) -> str:
    """The tables of one question as Markdown, made from the files in ``folder``."""
    if question == "roofline":
        return roofline_table()
    if question == "truth":
        return truth_table(json.loads((folder / "truth.json").read_text(encoding="utf-8")))
    if question == "peers_summary":
        return peers.summary(folder) or "*Not measured yet: `python -m benchmarks.peers`.*"
    if question in OWN_TABLES:
        module = OWN_TABLES[question]
        return own_tables(question, folder) or f"*Not measured yet: `python -m benchmarks.{module}`.*"
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob(f"{question}-*.json"))]
    return "\n\n".join(map(table, documents)) or f"*Not measured yet: `benchmarks/bench_{question}.py`.*"


OWN_TABLES = {"gemm": "gemm", "products": "forward_products", "peers": "peers"}
"""Questions whose results are not a comparison of two sides: the module that makes their tables."""


def own_tables(question: str, folder: Path = FOLDER) -> str:
    """The tables of a question of :data:`OWN_TABLES`, empty without results."""
    return str(import_module(f"benchmarks.{OWN_TABLES[question]}").tables(folder))


def written(text: str, folder: Path = FOLDER) -> str:
    """A page with its tables replaced by the current ones."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{tables(match['question'], folder)}\n\n{match[3]}", text)


def main(arguments: Sequence[str]) -> None:
    """Prints the given files, or all result files; with ``--write``, updates :data:`PAGES`."""
    if list(arguments) == ["--write"]:
        for page in PAGES:
            page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    files = [Path(argument) for argument in arguments] or sorted(FOLDER.glob("*.json"))
    documents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    compared = [
        document
        for document in documents
        if document.get("format") == FORMAT and document["question"] not in OWN_TABLES
    ]
    others = [] if arguments else [own_tables(question) for question in OWN_TABLES]
    print("\n\n".join([*map(table, compared), *others]))


if __name__ == "__main__":
    main(sys.argv[1:])
