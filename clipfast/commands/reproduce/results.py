"""Results of tables: what a table consists of, and the files that make a second run go on where the first stopped."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from clipfast.errors import InputError
from clipfast.files import write_text

FORMAT = "clipfast.reproduce.table/1"
Kind = Literal["share", "points", "text", "number"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the rows.
        title: in the page.
        kind: ``"share"`` is shown in percent, ``"points"`` as a difference of shares.
    """

    key: str
    title: str
    kind: Kind = "share"


@dataclass
class Result:
    """What a table has measured.

    Attributes:
        rows: each with ``name``, and ``role`` where published numbers call it otherwise.
        columns: what the page shows of them, after the name.
        protocol: how it was measured, a sentence each.
        setup: what has to be the same for published numbers to be comparable, by name.
        notes: what was noticed, a sentence each.
        figures: files below the folder of results.
        failed: images that could not be used.
        more: what the JSON has besides.
    """

    rows: list[dict[str, Any]]
    columns: Sequence[Column]
    protocol: Sequence[str]
    setup: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    failed: int = 0
    more: dict[str, Any] = field(default_factory=dict)


def digest(key: Mapping[str, Any]) -> str:
    """A digest of everything that a table depends on."""
    text = json.dumps(key, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


class Store:
    """The files of tables.

    Args:
        folder: of all results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "tables"

    def path(self, name: str) -> Path:
        """The file of a table."""
        return self._folder / f"{name}.json"

    def read(self, name: str, key: str | None = None) -> dict[str, Any] | None:
        """A table that is done; None where it is not, is damaged, or was measured with another key.

        Args:
            name: of the table.
            key: its :func:`digest`; None for whatever is there.
        """
        try:
            content = json.loads(self.path(name).read_text(encoding="utf-8"))
            fits = content["format"] == FORMAT and (key is None or content["key"] == key)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return content if fits else None

    def write(
        self, name: str, key: str, title: str, model: str, result: Result, compared: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Writes a table that is done, all at once; returns what it says.

        Raises:
            OSError: the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "table": name,
            "title": title,
            "key": key,
            "model": model,
            **asdict(result),
            "comparisons": compared,
        }
        content["columns"] = [asdict(column) for column in result.columns]
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            text = json.dumps(content, indent=1, allow_nan=False)
        except ValueError:
            raise InputError(f"the table {name} has a number that is not finite: an image or a weight is not") from None
        write_text(self.path(name), text + "\n")
        return content
