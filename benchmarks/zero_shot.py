"""Does the bundled model classify scenes it was not trained on? ``python -m benchmarks.zero_shot [--out FOLDER]``.

Runs :func:`clipfast.scenes.evaluate.evaluate` and writes ``zero_shot.json`` and its tables, ``zero_shot.md``. The exit
code is 1 if a bar is missed.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER
from clipfast.bench import machine
from clipfast.bench.document import provenance
from clipfast.bench.table import markdown_table
from clipfast.scenes.evaluate import evaluate, load

FORMAT = "clipfast.zero_shot/1"
NOTES = {
    "shape": "the eight without a look-alike",
    "shape (look-alikes)": "mostly on their usual background",
    "count": "one to four alike",
    "position": "left, right, top, bottom",
}


def page(document: Mapping[str, Any]) -> str:
    """The tables of a document as Markdown."""
    result = document["result"]
    attributes = [
        (
            f"{name}: {NOTES[name]}" if name in NOTES else name,
            str(row["scenes"]),
            f"{row['accuracy']:.1%}",
            f"{row['chance']:.0%}",
            "" if row["bar"] is None else f"≥ {row['bar']:.0%}",
        )
        for name, row in result["attributes"].items()
    ]
    alike = result["lookalikes"]
    each = alike["scenes"] // len(alike["groups"])
    groups = [(name, str(each), f"{accuracy:.1%}") for name, accuracy in alike["groups"].items()]
    groups.append(("average", str(alike["scenes"]), f"{alike['average']:.1%}"))
    parts = [
        f"`python -m benchmarks.zero_shot`, {result['scenes']} scenes that the training did not draw. "
        f"{provenance(document)}",
        "\n".join(markdown_table(("attribute", "scenes", "accuracy", "chance", "bar"), attributes)),
        "\n".join(markdown_table(("flower or gear", "scenes", "accuracy"), groups)),
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates the bundled model, writes and prints the result; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.zero_shot", description="Accuracy of the bundled model.")
    parser.add_argument("--scenes", type=int, default=2000, help="number of held-out scenes (2000)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for zero_shot.json and zero_shot.md")
    options = parser.parse_args(arguments)
    result = evaluate(*load(), scenes=options.scenes)
    document = {
        "format": FORMAT,
        "machine": machine.machine(),
        "versions": machine.versions(),
        "code": machine.code(),
        "cases": {},
        "result": result,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "zero_shot.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    markdown = page(document)
    (options.out / "zero_shot.md").write_text(markdown, encoding="utf-8")
    print(markdown)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
