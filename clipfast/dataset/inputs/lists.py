"""Lists of paths or URLs: a text file with one in each line, CSV and TSV files, and JSON lines.

A list is read once, line by line, to divide it. A unit is a range of rows that knows the byte where it begins, so that
reading it takes no longer at the end of a list than at its beginning, and the checksum of its bytes, so that a list
that was changed after the pass was planned is noticed.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import xxhash

from clipfast.dataset.inputs.endings import kind_of, uncompressed
from clipfast.dataset.inputs.files import fetched
from clipfast.dataset.inputs.locations import open_unit, version
from clipfast.dataset.inputs.reading import Reading, Samples
from clipfast.dataset.inputs.rows import Form, Place, Selection, image_column, row_id
from clipfast.dataset.inputs.sidecars import Columns, as_text
from clipfast.dataset.inputs.streams import Forward
from clipfast.dataset.plan import Unit, UnitError
from clipfast.errors import InputError
from clipfast.inputs import printable

MAX_LINE_BYTES = 1 << 20
_PIECE = 1 << 16
_BOM = b"\xef\xbb\xbf"
_PATH = "path"
"""The column of a list without columns."""

Kind = Literal["text", "csv", "tsv", "json"]
Values = Mapping[str, Any] | None
"""A row by column; None for a line that is no row."""


class _ListError(Exception):
    """Why a list cannot be read further."""


@dataclass(frozen=True)
class ListInput:
    """A list of paths or URLs.

    Attributes:
        name: what the user called it.
        path: its absolute path or URL.
        working: the folder that relative paths are looked up in where they are not beside the list.
        selection: its columns.
    """

    name: str
    path: str
    working: str
    selection: Selection = field(default_factory=Selection)

    def units(self, size: int) -> Iterator[Unit]:
        """Ranges of at most ``size`` rows.

        Raises:
            InputError: it cannot be read, or has no column with paths.
        """
        have = version(self.path)
        try:
            head = _Head.of(self.path, self.name, self.selection)
            with _opened(self.path, self.name, head.start) as lines:
                start = row = 0
                offset, checksum = lines.position, ""
                for _ in head.rows(lines):
                    row += 1
                    checksum = lines.checksum  # up to this row: empty lines may follow
                    if row - start == size:
                        yield self._unit(start, row, offset, checksum, have.size)
                        lines.start_range()
                        start, offset = row, lines.position
                if row > start:
                    yield self._unit(start, row, offset, checksum, have.size)
        except (UnitError, _ListError) as error:
            raise InputError(_line(self.name, error)) from None

    def _unit(self, start: int, stop: int, offset: int, checksum: str, size: int | None) -> Unit:
        return Unit("list", self.path, start, stop, offset, size=size, version=checksum)

    def read(self, unit: Unit) -> Reading:
        """The images of a range of rows.

        Raises:
            UnitError: the list is missing, cannot be read or was changed.
        """
        return Reading(lambda reading: self._samples(unit, reading, content=True))

    def names(self, unit: Unit) -> Reading:
        """The same samples without bytes and columns."""
        return Reading(lambda reading: self._samples(unit, reading, content=False))

    def _samples(self, unit: Unit, reading: Reading, *, content: bool) -> Samples:
        place = Place(unit.path, self.name, self.working, unit.folder)
        head, rows = self._rows(unit)
        samples = (self._sample(place, head, row, values, content) for row, values in rows)
        yield from fetched(samples) if content else samples
        reading.read_from = {"path": unit.path, "size": unit.size, "version": unit.version, "checksum": None}

    def _rows(self, unit: Unit) -> tuple["_Head", Iterator[tuple[int, Values]]]:
        """The rows of a unit, which are all read before the first is used: a list that was changed gives none."""
        try:
            head = _Head.of(unit.path, self.name, self.selection)
            with _opened(unit.path, self.name, unit.offset) as lines:
                wanted = range(unit.start, unit.stop)
                rows = [values for _, values in zip(wanted, head.rows(lines), strict=False)]
                if len(rows) < len(wanted) or lines.checksum != unit.version:
                    raise _ListError("it was changed after the pass was planned: put the list back as it was")
        except UnitError:
            raise
        except (_ListError, InputError) as error:
            raise UnitError("damaged", _line(self.name, error)) from None
        return head, zip(wanted, rows, strict=True)

    def _sample(self, place: Place, head: "_Head", row: int, values: Values, content: bool) -> Any:
        values = values or {}
        value = values.get(head.image)
        name = row_id(values.get(self.selection.id)) if self.selection.id else None
        if name is None and isinstance(value, str) and value:
            name = value
        beside: Columns = {}
        if content:
            beside = {
                column: as_text(each)
                for column, each in values.items()
                if column != head.image and self.selection.keeps(column)
            }
        return place.sample(row, value if isinstance(value, str) else None, name, beside)


def _line(name: str, error: Exception) -> str:
    text = str(error)
    return f"{printable(name)}: {text}" if isinstance(error, _ListError) else text


# --------------------------------------------------------------------------------------------------------------- lines


class _Lines:
    """The lines of a list, with the byte where the next one begins, and the checksum of those since a range began."""

    def __init__(self, stream: Forward, position: int) -> None:
        self._stream = stream
        self._buffer, self._at = b"", 0
        self._hash = xxhash.xxh3_128()
        self.position = position
        stream.skip(position)

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def start_range(self) -> None:
        """The checksum begins here."""
        self._hash.reset()

    @property
    def checksum(self) -> str:
        """XXH3-128 of the lines since then."""
        return self._hash.hexdigest()

    def next(self) -> bytes | None:
        """The next line with its end; None after the last."""
        end = self._buffer.find(b"\n", self._at)
        while end < 0:
            begin = len(self._buffer) - self._at
            if begin > MAX_LINE_BYTES:
                raise _ListError(f"a line of more than {MAX_LINE_BYTES} bytes: is it a list of paths?")
            more = self._stream.read(_PIECE)
            if not more:
                break
            self._buffer, self._at = self._buffer[self._at :] + more, 0
            end = self._buffer.find(b"\n", begin)
        end = len(self._buffer) if end < 0 else end + 1
        line, self._at = self._buffer[self._at : end], end
        if not line:
            return None
        first, self.position = self.position == 0, self.position + len(line)
        self._hash.update(line)
        if first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise _ListError("not UTF-8 text (UTF-16?)")
        return line.removeprefix(_BOM) if first else line

    def texts(self) -> Iterator[str]:
        """The lines as text; bytes that are no UTF-8, as file names may have them, become surrogates."""
        while (line := self.next()) is not None:
            yield line.decode("utf-8", "surrogateescape")


def _opened(path: str, name: str, position: int = 0) -> _Lines:
    return _Lines(Forward(open_unit(path, name), name, seeks=True), position)


# ---------------------------------------------------------------------------------------------------------------- rows


class _Head(NamedTuple):
    """What the beginning of a list says about its rows.

    Attributes:
        kind: how rows are written.
        columns: their names, in order; empty for JSON, whose rows say it themselves.
        image: the column with paths.
        start: the byte where the rows begin.
    """

    kind: Kind
    columns: tuple[str, ...]
    image: str
    start: int = 0

    @classmethod
    def of(cls, path: str, name: str, selection: Selection) -> "_Head":
        """Reads the line with the names of columns, or the first row.

        Raises:
            InputError: no column with paths.
            UnitError: the list is missing or cannot be read.
        """
        kind, start = _kind(name), 0
        with _opened(path, name) as lines:
            if kind == "text":
                columns: tuple[str, ...] = (_PATH,)
            elif kind == "json":
                first = next((row for row in _json_rows(lines) if row is not None), {})
                columns = tuple(first)
            else:
                columns = tuple(next(_csv_rows(lines, kind), ()))
                start = lines.position
        if kind in ("csv", "tsv") and len(columns) == 1 and kind_of(columns[0]) == "image":  # a path, not a name
            columns, start = (_PATH,), 0
        if not columns:
            return cls(kind, (), _PATH, start)
        selection.check(columns, name)
        texts = [column for column in columns if kind != "json" or isinstance(first[column], str)]
        forms: dict[str, Form] = dict.fromkeys(texts, "path")
        if len(texts) == 1 and selection.image is None:
            return cls(kind, columns, texts[0], start)
        return cls(kind, columns, image_column(forms, columns, selection.image, name), start)

    def rows(self, lines: _Lines) -> Iterator[Values]:
        """The rows from here on."""
        if self.kind == "json":
            return _json_rows(lines)
        if self.kind == "text":
            return ({_PATH: text} for line in lines.texts() if (text := line.rstrip("\r\n")))
        return (self._by_column(row) for row in _csv_rows(lines, self.kind))

    def _by_column(self, row: list[str]) -> dict[str, str | None]:
        return {column: row[at] if at < len(row) else None for at, column in enumerate(self.columns)}


def _kind(name: str) -> Kind:
    plain = uncompressed(name)
    if plain.endswith(".csv"):
        return "csv"
    if plain.endswith(".tsv"):
        return "tsv"
    return "json" if plain.endswith((".jsonl", ".ndjson")) else "text"


def _csv_rows(lines: _Lines, kind: Kind) -> Iterator[list[str]]:
    """The rows of a CSV file; empty lines are none."""
    try:
        for row in csv.reader(lines.texts(), delimiter="\t" if kind == "tsv" else ","):
            if row:
                yield row
    except csv.Error as error:
        raise _ListError(f"not a {kind.upper()} file ({error})") from None


def _json_rows(lines: _Lines) -> Iterator[Values]:
    """A row for each line that is not empty: an object, or a text that is the path; None for others."""
    for line in lines.texts():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, str):
            row = {_PATH: row}
        yield row if isinstance(row, dict) else None
