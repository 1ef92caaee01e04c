"""Collections in the layouts that other programs read. Only images that are in the statistics are exported.

* ``clip-retrieval``: a folder with ``img_emb/img_emb_0.npy`` and ``metadata/metadata_0.parquet``, and so on: what
  ``clip-retrieval inference`` writes and ``clip-retrieval index`` reads. Embeddings are normalised, as there; or the
  codes of heads, as they are kept.
* ``zarr``: a folder with one Zarr v3 group, ``arrays.zarr``, with an array of all images for each that was kept, and
  ``images.parquet``.
* ``parquet``: one file: the table of images, with a column of lists for each array.

Everything is written beside its place and renamed when it is whole, so an export is complete or not there.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.storage import LocalStore

from clipfast.dataset.arrays import DTYPES, Array, GrowingArray
from clipfast.dataset.images_table import SCHEMA, name_of
from clipfast.dataset.opening import Dataset
from clipfast.errors import InputError
from clipfast.files import PARTIAL, flush_folder, flush_tree
from clipfast.indices import resolve_heads

Layout = Literal["clip-retrieval", "zarr", "parquet"]
IMAGES = "images.parquet"
IMAGES_PER_FILE = 1_000_000
"""Images of a file of clip-retrieval's layout, as there."""
_COLUMNS = ("id", "label", "group", "mean", "std", "norm")


def export(
    folder: str | Path,
    out: str | Path,
    layout: Layout,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    dtype: str = "float16",
    arrays: Sequence[str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Writes the images of a finished collection in another layout, in little memory.

    Args:
        folder: the collection.
        out: what is written: a folder, or a file for ``"parquet"``. It must not exist.
        layout: see :mod:`clipfast.dataset.exporting`.
        heads: (layer, head) pairs, layers negative from the end: for ``"clip-retrieval"`` their codes, side by side,
            take the place of embeddings.
        dtype: of the numbers in ``"clip-retrieval"``, ``"float16"`` or ``"float32"``. Other layouts keep their dtypes.
        arrays: which arrays ``"zarr"`` and ``"parquet"`` get; all that were kept for None.
        progress: called with a number of images when these are written.

    Returns:
        The number of images.

    Raises:
        NotKept: what is to be exported was not kept.
        InputError: ``out`` exists, an option that the layout does not have, or a collection that is unfinished or
            damaged.
        OSError: the files cannot be written; nothing is left then.
    """
    if layout not in get_args(Layout):
        raise InputError(f"layout is {layout!r}: choose one of {', '.join(get_args(Layout))}")
    if layout != "clip-retrieval" and heads is not None:
        raise InputError(f"heads are chosen for the layout clip-retrieval, not for {layout}")
    if layout == "clip-retrieval" and arrays is not None:
        raise InputError("the layout clip-retrieval holds embeddings, or codes of heads: leave out arrays")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    data = Dataset(Path(folder))
    names = data.names if arrays is None else tuple(dict.fromkeys(arrays))
    for name in names:
        data.labels(name)  # before anything is written
    with _whole(Path(out)) as partial:
        if layout == "clip-retrieval":
            _clip_retrieval(data, partial, heads, np.dtype(dtype), progress)
        elif layout == "zarr":
            _zarr(data, partial, names, progress)
        else:
            _parquet(data, partial, names, progress)
    return len(data)


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Yields a path beside ``out`` that takes its name at the end; removes what is there when the block raises."""
    if os.path.lexists(out):
        raise InputError(f"{out} exists: give a new name")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} is no folder: make it first")
    partial = out.with_name(f"{PARTIAL}{secrets.token_hex(8)}.part")
    try:
        yield partial
        if partial.is_dir():
            flush_tree(partial)
        if os.path.lexists(out):
            raise InputError(f"{out} was made meanwhile: give a new name")
        partial.rename(out)
        flush_folder(out.parent)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _described(data: Dataset, rows: slice, path: str) -> dict[str, Any]:
    """What is known about images: columns of text and numbers. ``path`` is the name of the column of paths."""
    paths, members = (data.column(name, rows) for name in ("path", "member"))
    places = zip(map(name_of, paths), map(name_of, members), strict=True)
    known = {name: pa.array(data.column(name, rows), SCHEMA.field(name).type) for name in _COLUMNS}
    named = [_text(f"{file}/{member}" if member else file) for file, member in places]
    return {"id": known.pop("id"), path: pa.array(named, pa.string()), **known}


def _text(name: str) -> str:
    """A name as UTF-8, bytes that are none escaped."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


class _Table:
    """A Parquet file that is written block by block."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._writer: Any = None

    def add(self, columns: dict[str, Any], fields: Sequence[Any] = ()) -> None:
        """Appends rows; ``fields`` describe columns that need it."""
        table = pa.table(columns)
        for field in fields:
            table = table.set_column(table.column_names.index(field.name), field, table.column(field.name))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()


# ------------------------------------------------------------------------------------------------- the layouts


def _clip_retrieval(
    data: Dataset,
    folder: Path,
    heads: Sequence[tuple[int, int]] | None,
    dtype: np.dtype[Any],
    progress: Callable[[int], None],
) -> None:
    read = _embeddings(data) if heads is None else _codes(data, heads)
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    count = -(-len(data) // IMAGES_PER_FILE)
    for number in range(count):
        start, stop = number * IMAGES_PER_FILE, min((number + 1) * IMAGES_PER_FILE, len(data))
        suffix = str(number).zfill(len(str(count)))
        table = _Table(folder / "metadata" / f"metadata_{suffix}.parquet")
        with open(folder / "img_emb" / f"img_emb_{suffix}.npy", "wb") as file:
            for rows in _within(data.blocks(), start, stop):
                values = np.ascontiguousarray(_rounded(read(rows), dtype))
                if rows.start == start:
                    header = {"descr": values.dtype.str, "fortran_order": False}
                    np.lib.format.write_array_header_1_0(file, header | {"shape": (stop - start, values.shape[1])})
                file.write(values.data)
                table.add(_described(data, rows, "image_path"))
                progress(rows.stop - rows.start)
        table.close()


def _within(blocks: Iterator[slice], start: int, stop: int) -> Iterator[slice]:
    """The parts of blocks that are between two rows."""
    for block in blocks:
        part = slice(max(block.start, start), min(block.stop, stop))
        if part.start < part.stop:
            yield part


def _embeddings(data: Dataset) -> Callable[[slice], Array]:
    """Reads normalised embeddings, ``[images, embed]``."""
    data.labels("embeddings")

    def read(rows: slice) -> Array:
        values = data.read("embeddings", rows).astype(np.float32)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    return read


def _codes(data: Dataset, heads: Sequence[tuple[int, int]]) -> Callable[[slice], Array]:
    """Reads codes of heads, ``[images, heads · dim]``, in the order asked for."""
    data.labels("codes")
    model = data.manifest.settings.model
    pairs = list(dict.fromkeys(resolve_heads(heads, model["layers"], model["heads"])))
    if not pairs:
        raise InputError("heads is empty: give (layer, head) pairs")

    def read(rows: slice) -> Array:
        return np.concatenate([data.read("codes", rows, [layer], [head])[:, 0, 0] for layer, head in pairs], 1)

    return read


def _rounded(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype)
    if not np.isfinite(rounded).all():
        raise InputError(f"numbers up to {np.abs(values).max():.4g} do not fit {dtype}: export them in float32")
    return rounded


def _zarr(data: Dataset, folder: Path, names: Sequence[str], progress: Callable[[int], None]) -> None:
    if not names:
        raise InputError(f"{data.folder} has no arrays: collect the images again with --codes or --embeddings")
    store = folder / "arrays.zarr"
    store.mkdir(parents=True)
    zarr.create_group(LocalStore(store), zarr_format=3)
    arrays = {name: GrowingArray(store, name, data.dtype(name), with_pieces=False) for name in names}
    table = _Table(folder / IMAGES)
    for rows in data.blocks():
        for name, array in arrays.items():
            array.add(data.read(name, rows), data.labels(name))
        table.add(_described(data, rows, "path"))
        progress(rows.stop - rows.start)
    for array in arrays.values():
        array.finish()
    table.close()
    axes = {axis: labels for name in names for axis, labels in data.labels(name).items()}
    for axis in ("layer", "head"):  # coordinates, as xarray finds them
        if axis in axes:
            labels = np.array(axes[axis])
            zarr.create_array(LocalStore(store), name=axis, data=labels, dimension_names=[axis], zarr_format=3)


def _parquet(data: Dataset, file: Path, names: Sequence[str], progress: Callable[[int], None]) -> None:
    fields = []
    for name in names:
        shape = data.shape(name)[1:]
        kind = pa.list_(pa.from_numpy_dtype(data.dtype(name)), int(np.prod(shape)))
        about = {"shape": json.dumps(shape), "labels": json.dumps(data.labels(name))}
        fields.append(pa.field(name, kind, metadata=about))
    table = _Table(file)
    for rows in data.blocks():
        columns = _described(data, rows, "path")
        for field in fields:
            flat = pa.array(np.ascontiguousarray(data.read(field.name, rows)).reshape(-1))
            columns[field.name] = pa.FixedSizeListArray.from_arrays(flat, field.type.list_size)
        table.add(columns, fields)
        progress(rows.stop - rows.start)
    table.close()
