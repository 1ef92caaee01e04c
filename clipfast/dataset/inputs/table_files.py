"""The files of tables: Parquet, and Arrow IPC in both its formats. Ranges of rows, some at a time."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from clipfast.dataset.inputs.locations import is_url, open_unit
from clipfast.dataset.plan import UnitError
from clipfast.inputs import printable

_PARQUET = b"PAR1"
_IPC_FILE = b"ARROW1"
_FEATHER_1 = b"FEA1"
_BATCH_BYTES = 16 << 20
_MAX_BATCH_ROWS = 1024
_BUFFER = 1 << 20

Part = TypeVar("Part")
Batches = Iterator[tuple[int, Any]]
"""Record batches with the number of their first row."""


class ParquetTable:
    """A Parquet file."""

    def __init__(self, file: Any) -> None:
        self._file = pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
        self.schema = self._file.schema_arrow

    def groups(self) -> Iterator[int]:
        """The number of rows of each row group."""
        metadata = self._file.metadata
        return (metadata.row_group(at).num_rows for at in range(metadata.num_row_groups))

    def rows(self, start: int, stop: int, columns: list[str]) -> Batches:
        """The rows of a range.

        Raises:
            UnitError: there are fewer.
        """
        groups: list[int] = []
        first = end = 0
        for at, count in enumerate(self.groups()):
            if end + count > start and end < stop:
                first = first if groups else end
                groups.append(at)
            end += count
        if end < stop:
            raise UnitError("damaged", f"it has {end} rows, not {stop} or more as when the pass was planned")
        if not columns:  # neither names nor paths: the number of a row is all there is of it
            yield start, pa.RecordBatch.from_pydict({"": pa.nulls(stop - start)})
            return
        size = self._rows_at_once(groups, columns)
        for batch in self._file.iter_batches(size, row_groups=groups, columns=columns, use_threads=False):
            yield from _cut(first, batch, start, stop)
            first += batch.num_rows
            if first >= stop:
                return

    def _rows_at_once(self, groups: Sequence[int], columns: list[str]) -> int:
        """How many rows have about 16 MiB."""
        size = rows = 0
        for at in groups:
            group = self._file.metadata.row_group(at)
            rows += group.num_rows
            for number in range(group.num_columns):
                column = group.column(number)
                if column.path_in_schema.partition(".")[0] in columns:
                    size += column.total_uncompressed_size
        return max(1, min(_MAX_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))


class ArrowTable:
    """An Arrow IPC file, in the file or the stream format."""

    def __init__(self, file: Any, *, is_stream: bool) -> None:
        self._reader: Any = pa.ipc.open_stream(file) if is_stream else pa.ipc.open_file(file)
        self._is_stream = is_stream
        self.schema = self._reader.schema

    def _batches(self) -> Iterator[Any]:
        if self._is_stream:
            yield from self._reader
        else:
            for at in range(self._reader.num_record_batches):
                yield self._reader.get_batch(at)

    def groups(self) -> Iterator[int]:
        """The number of rows of each record batch."""
        return (batch.num_rows for batch in self._batches())

    def rows(self, start: int, stop: int, columns: list[str]) -> Batches:
        """The rows of a range.

        Raises:
            UnitError: there are fewer.
        """
        first = 0
        for batch in self._batches():
            if first + batch.num_rows > start:
                for at, part in _cut(first, batch.select(columns), start, stop, batch.num_rows):
                    part.validate(full=True)  # a damaged offset would be followed anywhere
                    yield at, part
            first += batch.num_rows
            if first >= stop:
                return
        raise UnitError("damaged", f"it has {first} rows, not {stop} or more as when the pass was planned")


def _cut(first: int, batch: Any, start: int, stop: int, rows: int | None = None) -> Batches:
    """The part of a batch that is in a range."""
    rows = batch.num_rows if rows is None else rows
    begin, end = max(first, start), min(first + rows, stop)
    if begin >= end:
        return
    if not batch.num_columns:
        yield begin, pa.RecordBatch.from_pydict({"": pa.nulls(end - begin)})
        return
    yield begin, batch.slice(begin - first, end - begin)


def open_table(path: str, name: str, stack: ExitStack) -> ParquetTable | ArrowTable:
    """Opens a table; its first bytes say which kind it is.

    Raises:
        UnitError: it is missing, cannot be read, or is no table.
    """
    file: Any = stack.enter_context(open_unit(path, name, anywhere=True))
    try:
        head = file.read(8)
        file.seek(0)
        if head.startswith(_PARQUET):
            return ParquetTable(pa.PythonFile(file, mode="r"))
        if head.startswith(_FEATHER_1):
            reason = "a Feather file of version 1: write it as version 2 or as Parquet"
            raise UnitError("unreadable", f"{printable(name)}: {reason}")
        if not head:
            raise UnitError("damaged", f"{printable(name)}: an empty file")
        if is_url(path):
            return ArrowTable(pa.PythonFile(file, mode="r"), is_stream=not head.startswith(_IPC_FILE))
        mapped: Any = os.fsencode(path)  # the stubs know texts alone, which not every name can be
        return ArrowTable(stack.enter_context(pa.memory_map(mapped)), is_stream=not head.startswith(_IPC_FILE))
    except UnitError:
        raise
    except Exception as error:  # pyarrow raises what it likes on damage
        raise _damaged(name, error) from None


def guarded(parts: Iterator[Part], name: str) -> Iterator[Part]:
    """What a table gives; what pyarrow raises on damage becomes an error of the unit."""
    try:
        yield from parts
    except UnitError as error:
        raise UnitError(error.kind, f"{printable(name)}: {error}") from None
    except Exception as error:  # pyarrow raises what it likes on damage
        raise _damaged(name, error) from None


def _damaged(name: str, error: Exception) -> UnitError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UnitError("damaged", f"{printable(name)}: no table, or a damaged one ({reason})")
