"""The table of a unit's images, ``images.parquet``: a row per image, whatever became of it, in the order of the unit.

* ``id`` (string): the image's name, different for every image of the data set
* ``path`` (binary): the file or URL of the image, of the shard or of the table; names of files are bytes
* ``key`` (binary): its sample's name in a shard, else empty
* ``member`` (binary): its name in the shard or the table, else empty
* ``folder`` (binary): the folder that was searched, null where there was none
* ``size`` (int64): bytes of the file at ``path``, null where that is not known
* ``modified_ns`` (int64): when that was last written, in nanoseconds since 1970, null where that is not known
* ``label``, ``group`` (string): null where there is none
* ``status`` (string): a :class:`~clipfast.dataset.samples.Status`
* ``reason`` (string): why the image is not in the results, null where it is
* ``mean``, ``std``, ``norm`` (float64): μ and σ of the final LayerNorm's input, and ‖embedding‖; null where ``status``
  is not ``ok``
* ``row`` (int32): its row in the arrays of the unit, null where ``status`` is not ``ok``
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from clipfast.contributions import Contributions
from clipfast.dataset import pieces
from clipfast.dataset.manifest import Record
from clipfast.dataset.samples import Sample, Status
from clipfast.errors import InputError

IMAGES = "images.parquet"
ROWS_AT_ONCE = 8192

_FIELDS: list[Any] = [
    pa.field("id", pa.string(), nullable=False),
    pa.field("path", pa.binary(), nullable=False),
    pa.field("key", pa.binary(), nullable=False),
    pa.field("member", pa.binary(), nullable=False),
    pa.field("folder", pa.binary()),
    pa.field("size", pa.int64()),
    pa.field("modified_ns", pa.int64()),
    pa.field("label", pa.string()),
    pa.field("group", pa.string()),
    pa.field("status", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("mean", pa.float64()),
    pa.field("std", pa.float64()),
    pa.field("norm", pa.float64()),
    pa.field("row", pa.int32()),
]
SCHEMA: Any = pa.schema(_FIELDS)


class ImageTable:
    """Writes the table of a unit, at most some thousand rows in memory. The same images give the same bytes.

    Args:
        folder: of the unit; it exists.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._writer: Any = pq.ParquetWriter(folder / IMAGES, SCHEMA, compression="zstd")
        self._waiting: list[dict[str, object]] = []
        self._rows = 0  # of the arrays

    def add(self, samples: Sequence[Sample], contributions: Contributions | None = None) -> None:
        """Appends images.

        Args:
            samples: in their order, those that failed among them.
            contributions: of those that did not fail, in the same order; None where all failed.

        Raises:
            InputError: not as many images as contributions.
            OSError: the file cannot be written.
        """
        fine = sum(sample.failure is None for sample in samples)
        if fine != (0 if contributions is None else len(contributions)):
            raise InputError(f"{fine} images did not fail, but there are contributions of another number of images")
        numbers = iter(()) if contributions is None else iter(_numbers(contributions))
        for sample in samples:
            row = _row(sample)
            if sample.failure is None:
                mean, std, norm = next(numbers)
                row |= {"mean": mean, "std": std, "norm": norm, "row": self._rows}
                self._rows += 1
            self._waiting.append(row)
        while len(self._waiting) >= ROWS_AT_ONCE:
            self._flush()

    def add_unmeasured(self, samples: Sequence[Sample]) -> None:
        """Appends images that are in the statistics, but whose μ, σ and norm are not known, and that have no arrays.

        Raises:
            OSError: the file cannot be written.
        """
        self._waiting += map(_row, samples)
        while len(self._waiting) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        rows, self._waiting = self._waiting[:ROWS_AT_ONCE], self._waiting[ROWS_AT_ONCE:]
        self._writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=ROWS_AT_ONCE)

    def finish(self) -> None:
        """Writes what waits in memory and closes the file.

        Raises:
            OSError: the file cannot be written.
        """
        if self._waiting:
            self._flush()
        self._writer.close()


def _numbers(contributions: Contributions) -> list[list[float]]:
    """μ, σ and ‖embedding‖ of every image, in the precision of the columns."""
    columns = torch.stack([contributions.mean, contributions.std, contributions.norm], 1)
    return cast(list[list[float]], columns.detach().to(torch.float64).cpu().tolist())


def _row(sample: Sample) -> dict[str, object]:
    failure = sample.failure
    return {
        "id": _text(sample.id),
        "path": _bytes(sample.path),
        "key": _bytes(sample.key),
        "member": _bytes(sample.member),
        "folder": None if sample.folder is None else _bytes(sample.folder),
        "size": sample.size,
        "modified_ns": sample.modified_ns,
        "label": _text(sample.label),
        "group": _text(sample.group),
        "status": str(Status.OK if failure is None else failure.status),
        "reason": None if failure is None else _text(failure.reason),
    }


def _text(text: str | None) -> str | None:
    """Text that is UTF-8: names with bytes that are not hold surrogates, which are escaped."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _bytes(name: str) -> bytes:
    """A file's name; bytes that are no UTF-8 are surrogates in it."""
    try:
        return name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte
        return name.encode("utf-8", "surrogatepass")


def name_of(content: bytes) -> str:
    """A name from a column of bytes, as Python writes names of files."""
    return content.decode("utf-8", "surrogateescape")


def read_images(folder: Path, record: Record, columns: Sequence[str] | None = None) -> Any:
    """The table of a unit's images.

    Args:
        folder: of the unit.
        record: of the unit.
        columns: which columns, in that order; all for None.

    Returns:
        A ``pyarrow.Table``.

    Raises:
        InputError: no such column, or the file is gone or damaged.
    """
    content = pieces.read_whole(folder, IMAGES, record.files)
    wrong = [name for name in columns or () if name not in SCHEMA.names]
    if wrong:
        raise InputError(f"there is no column {wrong[0]!r}: choose from {', '.join(SCHEMA.names)}")
    try:
        table = pq.read_table(pa.BufferReader(content), columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise pieces.damaged(folder / IMAGES, folder, " ".join(str(error).split())) from None
    if table.num_rows != sum(record.statuses.values()):
        raise pieces.damaged(folder / IMAGES, folder, f"it has {table.num_rows} rows, its record says otherwise")
    return table


def fine(table: Any) -> Any:
    """The rows of images that are in the statistics, in the order of their rows in the arrays."""
    return table.filter(pc.field("status") == Status.OK.value)
