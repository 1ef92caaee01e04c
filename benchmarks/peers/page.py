"""The tables of the comparison, as Markdown."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clipfast.bench.document import provenance
from clipfast.bench.table import duration, markdown_table, size

HEADER = (
    *("package", "question", "model", "clipfast", "package's", "times as fast (q10–q90)"),
    *("peak memory", "above loading", "largest error"),
)
SUMMARY = ("ViT-B-32", 8)
"""Model and batch of the short table."""


def _row(case: dict[str, Any]) -> list[str]:
    settings, ratio, memory = case["settings"], case["ratio_b_over_a"], case["memory"]
    version = "" if settings["version"] is None else f" {settings['version']}"
    a, b = memory["a"], memory["b"]
    return [
        f"{settings['peer']}{version}",
        settings["question"],
        f"{settings['model']}, batch {settings['images']}",
        duration(case["a"]["seconds"]["median"]),
        duration(case["b"]["seconds"]["median"]),
        f"{ratio['median']:.3g} ({ratio['q10']:.3g}–{ratio['q90']:.3g})",
        f"{size(a['peak_mb'])} / {size(b['peak_mb'])}",
        f"{size(a['increment_mb'])} / {size(b['increment_mb'])}",
        f"{max(check['error'] for check in case['checks']):.1e}",
    ]


def _documents(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("peers-*.json")):
        yield json.loads(file.read_text(encoding="utf-8"))


def _timed(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for case in document["cases"].values() if "not_run" not in case]


def _not_run(document: dict[str, Any]) -> list[str]:
    """Why something was not run, once for each package and question, whatever the model."""
    reasons = {
        f"- {case['settings']['peer']}, {case['settings']['question']}: not run, {case['not_run']}": None
        for case in document["cases"].values()
        if "not_run" in case
    }
    return ["What was not run, and why:", "", *reasons] if reasons else []


def _questions(document: dict[str, Any]) -> list[str]:
    """What was asked and how, once for each package and question."""
    asked = {}
    for case in _timed(document):
        settings = case["settings"]
        asked[settings["peer"], settings["question"]] = f"{settings['asked']}. {settings['fair']}"
    return [f"- **{peer}, {question}**: {text}" for (peer, question), text in asked.items()]


def _table(document: dict[str, Any], cases: list[dict[str, Any]]) -> list[str]:
    return [f"**{document['sentence']}**", "", provenance(document), "", *markdown_table(HEADER, map(_row, cases))]


def tables(folder: Path) -> str:
    """Every result in ``folder``: the table of each machine, what was not run, and what each question is."""
    parts = []
    for document in _documents(folder):
        parts += ["\n".join(_table(document, _timed(document)))] if _timed(document) else []
        parts += ["\n".join(lines) for lines in (_not_run(document), _questions(document)) if lines]
    return "\n\n".join(parts)


def summary(folder: Path) -> str:
    """The rows of :data:`SUMMARY` alone: all of them, also those where a package is faster."""
    parts = []
    for document in _documents(folder):
        settings = [(case, case["settings"]) for case in _timed(document)]
        cases = [case for case, each in settings if (each["model"], each["images"]) == SUMMARY]
        parts += ["\n".join(_table(document, cases))] if cases else []
    return "\n\n".join(parts)
