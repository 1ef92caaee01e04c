"""Self-describing result files: ``benchmarks/results/<question>-<machine>.json``.

A file holds the cases of one question on one machine, each with the time it was measured. Writing a case drops those
of another commit, machine or set of versions, so that a file never mixes two states of the code.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipfast.bench import machine
from clipfast.bench.measuring import Bar, Comparison, require
from clipfast.bench.memory import Peak, memory_json
from clipfast.files import write_text

FORMAT = "clipfast.benchmark/1"
FOLDER = Path(__file__).resolve().parent / "results"


class Results:
    """The result file of one question; every case is written as soon as it is measured.

    Attributes:
        path: path of the file.
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
            "code": machine.code([folder]),
        }

    def note_commit(self, commit: str | None) -> None:
        """Records the commit for a copy of the code without git history."""
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
            case: name of the case, unique within the question.
            comparison: result of :func:`clipfast.bench.measuring.compare`.
            a: name of the first side.
            b: name of the second.
            settings: everything needed to repeat the measurement.
            memory: peak memory of a and of b.
            bars: bars that apply to the case.
            figures: further measurements.

        Raises:
            WrongResult: a check failed, or none was made.
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
        written = {"taken": datetime.now(UTC).isoformat(timespec="seconds")} | machine.moment() | entry
        document = self._head | {"cases": self._kept() | {case: written}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(self.path, text + "\n", durable=False)
        return written

    def _kept(self) -> dict[str, Any]:
        """Cases in the file with the same machine, versions and commit."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        same = all(document.get(key) == self._head[key] for key in ("format", "machine", "versions", "code"))
        return dict(document["cases"]) if same else {}
