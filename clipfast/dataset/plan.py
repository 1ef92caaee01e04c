"""The plan of a pass: the units of work that its input is divided into, in a fixed order.

A unit is what one worker does at a time: a tar shard, or a range of a list of files, of a table or of a data set. What
a unit gives depends on the unit and the settings of the pass alone, not on other units or on who computes it. So units
are computed in any order, by any number of workers, and again after an interruption, with the same bits.

``units.parquet`` has a row per unit. ``files.parquet`` has the files of each unit that is a range of files, a row group
per unit: a worker reads its own row group only, and no process holds the list of all files.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from clipfast.dataset.samples import Sample
from clipfast.errors import ClipfastError, InputError
from clipfast.files import atomic_write

UNITS, FILES = "units.parquet", "files.parquet"

Kind = Literal["shard", "files", "table", "list", "items"]
"""A tar shard; a range of files; a range of rows of a table, or of a list of paths; a range of a data set in memory."""

_UNIT_FIELDS: list[Any] = [
    pa.field("input", pa.int32()),
    pa.field("kind", pa.string()),
    pa.field("path", pa.binary()),  # file names are bytes that may be no text
    pa.field("start", pa.int64()),
    pa.field("stop", pa.int64()),
    pa.field("offset", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("version", pa.string()),
    pa.field("folder", pa.binary()),
    pa.field("files", pa.int32()),
]
_UNIT_SCHEMA = pa.schema(_UNIT_FIELDS)
_FILE_SCHEMA = pa.schema([pa.field("path", pa.binary())])


class UnitError(ClipfastError):
    """A unit that cannot be read, or not to its end: a shard that is gone, cut or damaged.

    Attributes:
        kind: ``"missing"``, ``"unreadable"`` or ``"damaged"``.
    """

    def __init__(self, kind: Literal["missing", "unreadable", "damaged"], message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Unit:
    """A unit of work.

    Attributes:
        kind: what it is.
        path: the shard, the table, or the file with the list, from the root of the file system or as a URL; the folder
            that was searched, for files of a folder; empty where there is none.
        start: first item of a range.
        stop: first item after the range; 0 for a whole shard, whose length is not known before it is read.
        offset: for a range of a list of paths, the byte of the list where the range begins; else 0.
        size: bytes of the file at ``path`` when the pass was planned, None where that is not known.
        version: what identifies the version of that file: its time of modification, or an ETag; for kind ``"list"`` the
            checksum of the range.
        folder: the folder that was searched, None for what was named itself.
        files: paths or URLs of the images, for kind ``"files"``; else empty.
        input: which of the inputs of the pass it belongs to.
        number: its place in the plan.
    """

    kind: Kind
    path: str
    start: int = 0
    stop: int = 0
    offset: int = 0
    size: int | None = None
    version: str | None = None
    folder: str | None = None
    files: tuple[str, ...] = ()
    input: int = 0
    number: int = -1


class Input(Protocol):
    """A source of images. It can be pickled: every worker gets a copy of it."""

    @property
    def name(self) -> str:
        """What the user called it."""

    def units(self, size: int) -> Iterator[Unit]:
        """Its units in a fixed order, one at a time; ranges have at most ``size`` images."""

    def read(self, unit: Unit) -> Iterator[Sample]:
        """The images of a unit, in a fixed order.

        An image that cannot be read is given with its failure.

        Raises:
            UnitError: the unit cannot be read, or not to its end; images given before count.
        """

    def names(self, unit: Unit) -> Iterator[Sample]:
        """The same images without content and columns, as cheaply as their names can be had.

        Raises:
            UnitError: as :meth:`read`.
        """


@dataclass(frozen=True)
class Plan:
    """The units of a pass, on disk.

    Attributes:
        folder: where the two files are.
        count: how many units there are.
        digest: of all units and their files, 32 hexadecimal digits: equal for the same list of images.
    """

    folder: Path
    count: int
    digest: str

    def unit(self, number: int) -> Unit:
        """One unit, with its files.

        Raises:
            InputError: no such unit, or a damaged plan.
        """
        return next(self.units([number]))

    def units(self, numbers: Iterable[int] | None = None, *, files: bool = True) -> Iterator[Unit]:
        """Units by number, all for None; without their files where ``files`` is False.

        Raises:
            InputError: no such unit, or a damaged plan.
        """
        try:
            table = pq.read_table(self.folder / UNITS, schema=_UNIT_SCHEMA, page_checksum_verification=True)
            has_files = files and (self.folder / FILES).exists()
            lists = pq.ParquetFile(self.folder / FILES, page_checksum_verification=True) if has_files else None
        except (OSError, pa.ArrowException) as error:
            raise _damaged(self.folder / UNITS, error) from None
        try:
            for number in range(table.num_rows) if numbers is None else numbers:
                if not 0 <= number < table.num_rows:
                    raise InputError(f"unit {number} does not exist: the plan has {table.num_rows}")
                [row] = table.slice(number, 1).to_pylist()
                group = row.pop("files")
                names: tuple[str, ...] = ()
                if lists is not None and group >= 0:
                    try:
                        column = lists.read_row_group(group, columns=["path"]).column("path")
                    except (OSError, pa.ArrowException) as error:
                        raise _damaged(self.folder / FILES, error) from None
                    names = tuple(_text(name) for name in column.to_pylist() if name is not None)
                row["path"] = _text(row["path"])
                row["folder"] = None if row["folder"] is None else _text(row["folder"])
                yield Unit(**row, files=names, number=number)
        finally:
            if lists is not None:
                lists.close()

    def check(self) -> None:
        """Reads the whole plan.

        Raises:
            InputError: it is damaged, or not the one that the collection was made with.
        """
        digest, count = xxhash.xxh3_128(), 0
        for unit in self.units():
            _add(digest, unit)
            count += 1
        if (count, digest.hexdigest()) != (self.count, self.digest):
            raise InputError(
                f"{self.folder / UNITS} or {FILES} is damaged: they are not what the pass was planned with"
            )


def write_plan(folder: Path, inputs: Sequence[Input], size: int) -> Plan:
    """Divides inputs into units and writes them, one unit in memory at a time.

    Args:
        folder: an existing folder, which gets both files.
        inputs: in the order in which they were named.
        size: the most images in a range.

    Raises:
        InputError: an input that cannot be read, or none with images.
        OSError: the folder cannot be written.
    """
    digest, count, groups = xxhash.xxh3_128(), 0, 0
    with atomic_write(folder / UNITS) as units_path, atomic_write(folder / FILES) as files_path:
        with (
            pq.ParquetWriter(files_path, _FILE_SCHEMA, write_page_checksum=True) as files,
            pq.ParquetWriter(units_path, _UNIT_SCHEMA, write_page_checksum=True) as units,
        ):
            rows: list[dict[str, object]] = []
            for unit in _numbered(inputs, size):
                names = _add(digest, unit)
                if names:
                    files.write_table(pa.table({"path": names}, schema=_FILE_SCHEMA))
                    groups += 1
                rows.append(
                    {
                        "input": unit.input,
                        "kind": unit.kind,
                        "path": _bytes(unit.path),
                        "start": unit.start,
                        "stop": unit.stop,
                        "offset": unit.offset,
                        "size": unit.size,
                        "version": unit.version,
                        "folder": None if unit.folder is None else _bytes(unit.folder),
                        "files": groups - 1 if names else -1,
                    }
                )
                count += 1
                if len(rows) == 4096:
                    units.write_table(pa.Table.from_pylist(rows, schema=_UNIT_SCHEMA))
                    rows = []
            units.write_table(pa.Table.from_pylist(rows, schema=_UNIT_SCHEMA))
        if not count:
            raise InputError(f"no images in {', '.join(each.name for each in inputs)}")
    return Plan(folder, count, digest.hexdigest())


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read ({' '.join(str(error).split())}): collect the images again")


def _add(digest: xxhash.xxh3_128, unit: Unit) -> list[bytes]:
    """Adds a unit to the digest of a plan; gives the names of its files."""
    names = [_bytes(name) for name in unit.files]
    content = unit.version if unit.kind == "list" else None
    digest.update(repr((unit.kind, _bytes(unit.path), unit.start, unit.stop, names, content)).encode())
    return names


def _numbered(inputs: Sequence[Input], size: int) -> Iterator[Unit]:
    number = 0
    for place, each in enumerate(inputs):
        for unit in each.units(size):
            yield replace(unit, input=place, number=number)
            number += 1


def _bytes(name: str) -> bytes:
    """A file name as bytes; names that are no text hold surrogates."""
    return name.encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
