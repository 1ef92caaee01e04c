"""Result files that describe themselves: ``benchmarks/results/<question>-<machine>.json``.

A file holds one question on one machine. Every case carries the moment it was taken; cases of another commit, of other
versions or of another machine are dropped when a new one is written, so that a file never mixes two states of the code.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipfast.bench import machine
from clipfast.bench.measuring import Bar, Comparison, require
from clipfast.bench.memory import Peak, memory_json

FORMAT = "clipfast.benchmark/1"
FOLDER = Path(__file__).resolve().parent / "results"


class Results:
    """The cases of one question, written to its file as they come.

    Attributes:
        path: where they are written.
    """

    def __init__(self, question: str, sentence: str, *, device: str = "cpu", folder: Path = FOLDER) -> None:
        described = machine.machine(device)
        self.path = folder / f"{question}-{machine.slug(described)}.json"
        self._head: dict[str, Any] = {
            "format": FORMAT,
            "question": question,
            "sentence": sentence,
            "machine": described,
            "versions": machine.versions(),
            "code": machine.code(),
        }

    def note_commit(self, commit: str | None) -> None:
        """Names the commit where the code that runs is a copy without its history."""
        if commit is not None and self._head["code"]["commit"] is None:
            self._head["code"] = {"commit": commit, "dirty": False}

    def compared(
        self,
        case: str,
        comparison: Comparison,
        *,
        a: str,
        b: str,
        settings: dict[str, Any],
        memory: tuple[Peak, Peak] | None = None,
        bars: tuple[Bar, ...] = (),
        figures: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes a comparison and returns it as written.

        Args:
            case: its name, unique in the question.
            comparison: what :func:`clipfast.bench.measuring.compare` returned.
            a: name of the first side.
            b: name of the second.
            settings: everything needed to run it again.
            memory: peak of a and of b.
            bars: the promises it is held to.
            figures: what was measured besides.

        Raises:
            WrongResult: the comparison did not pass a check.
        """
        require(comparison.checks)
        entry = {"settings": settings} | comparison.to_json(a, b)
        if memory is not None:
            entry["memory"] = memory_json(*memory)
        if figures is not None:
            entry["figures"] = figures
        return self.write(case, entry | {"bars": [bar.to_json() for bar in bars]})

    def write(self, case: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Adds one case to the file and returns it as written."""
        taken = {"taken": datetime.now(UTC).isoformat(timespec="seconds")} | machine.moment() | entry
        document = self._head | {"cases": self._kept() | {case: taken}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        self.path.write_text(text + "\n", encoding="utf-8")
        return taken

    def _kept(self) -> dict[str, Any]:
        """Cases already in the file that belong to the same state."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        same = all(document.get(key) == self._head[key] for key in ("format", "machine", "versions", "code"))
        return dict(document["cases"]) if same else {}
