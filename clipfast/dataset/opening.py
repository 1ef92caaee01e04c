"""A collection opened for analysis: labelled arrays, tables and moments of all its images.

>>> data = clipfast.dataset.open("collection")
>>> data.codes.sel(layer=11, head=3).values  # reads that head alone
>>> data.images.to_pandas()
>>> data.moments.textspan(features, 20)

Only images that are in the statistics have rows in the arrays. Images that failed are in :attr:`Dataset.images`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from clipfast.analyses.moments import Moments
from clipfast.basis import StoredBasis
from clipfast.dataset.arrays import ARRAYS, Array, UnitArrays
from clipfast.dataset.images_table import SCHEMA, fine, read_images
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.merging import load_basis, merged_moments
from clipfast.errors import InputError, MissingExtra, NotKept
from clipfast.indices import resolve_head, resolve_layer

if TYPE_CHECKING:
    import xarray

Rows = slice | Sequence[int] | Array

ROWS_AT_ONCE = 1024
"""Images of a block: a chunk of codes has as many where its numbers are 64 in float16."""
_OPTIONS = {"codes": "--codes", "class_codes": "--class-codes", "terms": "--terms", "embeddings": "--embeddings"}


def open(folder: str | Path, *, unfinished: bool = False) -> "Dataset":  # what it is called in xarray, zarr and here
    """Opens a collection to read.

    Args:
        folder: that ``clipfast collect`` wrote.
        unfinished: whether one whose pass did not come to its end is opened, too: with the units that are finished.

    Raises:
        InputError: no collection, an unfinished one, one without images, or a damaged one.
    """
    return Dataset(Path(folder), unfinished=unfinished)


class Dataset:
    """The images of a collection, in the order of its plan. Numbers and tables are read when they are used.

    What is read has been checked: damage is an :class:`~clipfast.errors.InputError`, never a wrong number. ``len`` is
    the number of images in the statistics, which is the number of rows of every array.

    Args:
        folder: of the collection.
        unfinished: whether its pass need not be complete.

    Attributes:
        folder: of the collection.
        manifest: its settings, plan and records.
        records: of its finished units, in order.
        names: of the arrays that were kept: ``"codes"``, ``"class_codes"``, ``"terms"``, ``"embeddings"``.

    Raises:
        InputError: see :func:`open`.
    """

    def __init__(self, folder: Path, *, unfinished: bool = False) -> None:
        self.folder = folder
        self._unfinished = unfinished
        self.manifest = Manifest(folder)
        self.records = tuple(self.manifest.records())
        if len(self.records) < self.manifest.plan.count and not unfinished:
            raise InputError(
                f"{folder} holds an unfinished pass ({len(self.records)} of {self.manifest.plan.count} units): finish "
                "it with the command that began it, or open it with unfinished=True"
            )
        counts = [record.count for record in self.records]
        self._starts = np.cumsum([0, *counts])  # first row of each unit, and the number of rows
        if not len(self):
            raise InputError(f"{folder} holds no image: none was collected, or none could be read")
        self.names = tuple(name for name in ARRAYS if self.manifest.settings.kept.get(name) is not None)
        self._arrays = lru_cache(maxsize=32)(self._open_arrays)
        self._fine = lru_cache(maxsize=4)(self._read_fine)

    def __reduce__(self) -> Any:
        return partial(Dataset, unfinished=self._unfinished), (self.folder,)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        failed = sum(record.failed for record in self.records)
        return (
            f"Dataset({str(self.folder)!r}, {len(self)} images, {failed} failed, {len(self.records)} units, "
            f"kept {', '.join(self.names) or 'moments alone'})"
        )

    # ------------------------------------------------------------------------------------------------- tables

    @property
    def images(self) -> Any:
        """A ``pyarrow.Table`` with a row per image, those that failed included; see :mod:`.images_table`.

        ``unit`` is the number of the image's unit. ``row`` counts from the start of the collection: it is the image's
        row in the arrays, null where it has none.
        """
        return pa.concat_tables(list(self.tables()))

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """:attr:`images` unit by unit, to read large collections in little memory.

        Args:
            columns: which columns to read besides ``unit``; all for None.
        """
        for record, start in zip(self.records, self._starts, strict=False):
            table = read_images(self.manifest.data / record.folder, record, columns)
            if "row" in table.column_names:
                rows = [None if row is None else row + int(start) for row in table.column("row").to_pylist()]
                place = table.column_names.index("row")
                table = table.set_column(place, "row", pa.array(rows, pa.int64()))
            unit = pa.array(np.full(table.num_rows, record.unit, np.int32))
            yield table.add_column(0, "unit", unit)

    def column(self, name: str, rows: Rows = slice(None)) -> Array:
        """A column of :attr:`images` for images in the statistics.

        Args:
            name: of the column.
            rows: which rows of the arrays.

        Returns:
            Numbers, or objects (``str``, ``bytes``, None) of a column that is not of numbers.

        Raises:
            InputError: no such column or row; or a file is gone or damaged.
        """
        if name not in SCHEMA.names:
            raise InputError(f"there is no column {name!r}: choose from {', '.join(SCHEMA.names)}")
        return self._gathered(rows, lambda unit, part: np.array(self._fine(unit).column(name).to_numpy()[part]))

    def _read_fine(self, unit: int) -> Any:
        record = self.records[unit]
        return fine(read_images(self.manifest.data / record.folder, record))

    # ------------------------------------------------------------------------------------------------- arrays

    @property
    def codes(self) -> "xarray.DataArray":
        """``[image, layer, head, dim]``, each head's output before its output projection, divided by σ · norm.

        This and the other labelled arrays are lazy: what is selected is read when its values are, chunk by chunk.

        Raises:
            NotKept: collected without codes.
            MissingExtra: xarray is not installed.
        """
        return self._labelled("codes")

    @property
    def class_codes(self) -> "xarray.DataArray":
        """``[image, layer, head, dim]``, the class token's own part of :attr:`codes`; raises as that."""
        return self._labelled("class_codes")

    @property
    def terms(self) -> "xarray.DataArray":
        """``[image, term, embed]``, contributions that are no head's: start, MLPs, rest; raises as :attr:`codes`."""
        return self._labelled("terms")

    @property
    def embeddings(self) -> "xarray.DataArray":
        """``[image, embed]``, as the model gives them, not normalised; raises as :attr:`codes`."""
        return self._labelled("embeddings")

    def _labelled(self, name: str) -> "xarray.DataArray":
        self._require(name)
        try:
            from clipfast.dataset.labelled import labelled
        except ImportError:
            raise MissingExtra("xarray", "data", "a labelled array") from None
        return labelled(self, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array over all images; raises as :meth:`read`."""
        return (len(self), *self._first(name).shape(name)[1:])

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of an array; raises as :meth:`read`."""
        return self._first(name).dtype(name)

    def labels(self, name: str) -> dict[str, list[Any]]:
        """Names along axes of an array: layers, heads, terms; raises as :meth:`read`."""
        return self._first(name).labels(name)

    def read(
        self,
        name: str,
        rows: Rows = slice(None),
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        terms: Sequence[str] | None = None,
    ) -> Array:
        """Rows of an array without xarray, reading the chunks alone that they are in.

        Args:
            name: of the array.
            rows: which rows; all by default.
            layers: layers of the model, negative from the end; all for None.
            heads: heads; all for None.
            terms: names of terms; all for None.

        Returns:
            ``[rows, layers, heads, dim]``, ``[rows, terms, embed]`` or ``[rows, embed]``.

        Raises:
            NotKept: the array was not kept.
            InputError: no such row, layer, head or term; or a file is gone or damaged.
        """
        self._require(name)
        if layers is not None:
            layers = [resolve_layer(layer, self.manifest.settings.model["layers"]) for layer in layers]
        return self._gathered(rows, lambda unit, part: self._arrays(unit).read(name, part, layers, heads, terms))

    def at(self, name: str, places: Sequence[slice | Sequence[int] | Array]) -> Array:
        """The same by places along every axis, counted from 0; raises as :meth:`read`."""
        self._require(name)
        rows, *others = places
        return self._gathered(rows, lambda unit, part: self._arrays(unit).at(name, (part, *others)))

    def _require(self, name: str) -> None:
        if name not in self.names:
            option = f": collect the images again with {_OPTIONS[name]}" if name in _OPTIONS else ""
            raise NotKept(f"{self.folder} has no {name}{option}")

    def _first(self, name: str) -> UnitArrays:
        """The arrays of a unit that has images."""
        self._require(name)
        return self._arrays(int(np.flatnonzero(np.diff(self._starts))[0]))

    def _open_arrays(self, unit: int) -> UnitArrays:
        record = self.records[unit]
        return UnitArrays(self.manifest.data / record.folder, record)

    def _gathered(self, rows: Rows, read: Callable[[int, Rows], Array]) -> Array:
        """Rows of all units as one array.

        Args:
            rows: which.
            read: of a unit (its place among the records) and rows in it, these rows.
        """
        parts, count = self._parts(rows)
        if not parts:
            return read(int(np.flatnonzero(np.diff(self._starts))[0]), slice(0, 0))
        if len(parts) == 1:
            return read(*parts[0][:2])
        result: Array | None = None
        for unit, chosen, places in parts:
            values = read(unit, chosen)
            if result is None:
                result = np.empty((count, *values.shape[1:]), values.dtype)
            result[places] = values
        assert result is not None
        return result

    def _parts(self, rows: Rows) -> tuple[list[tuple[int, Rows, slice | Array]], int]:
        """For each unit with some of the rows: its place, which of its rows, and where they stand among all; how many.

        A unit is read once. Rows that follow each other are not listed: there may be a hundred million.
        """
        chosen = _resolved(rows, len(self))
        if isinstance(chosen, slice):
            if chosen.start == chosen.stop:
                return [], 0
            first, last = (
                int(np.searchsorted(self._starts, row, "right")) - 1 for row in (chosen.start, chosen.stop - 1)
            )
            parts: list[tuple[int, Rows, slice | Array]] = []
            for unit in range(first, last + 1):
                begin, end = max(chosen.start, int(self._starts[unit])), min(chosen.stop, int(self._starts[unit + 1]))
                if begin < end:
                    own = slice(begin - int(self._starts[unit]), end - int(self._starts[unit]))
                    parts.append((unit, own, slice(begin - chosen.start, end - chosen.start)))
            return parts, chosen.stop - chosen.start
        units = np.searchsorted(self._starts, chosen, "right") - 1
        order = np.argsort(units, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(units[order])) + 1) if len(order) else []
        listed = [(int(units[group[0]]), group) for group in groups]
        if len(listed) == 1:  # in the order asked for
            return [(listed[0][0], chosen - self._starts[listed[0][0]], slice(None))], len(chosen)
        return [(unit, chosen[group] - self._starts[unit], group) for unit, group in listed], len(chosen)

    # ------------------------------------------------------------------------------------------------- analyses

    @property
    def moments(self) -> Moments:
        """Of all images."""
        return merged_moments(self.manifest)

    @cached_property
    def basis(self) -> StoredBasis:
        """The model's part of every contribution."""
        return load_basis(self.folder)

    def blocks(self) -> Iterator[slice]:
        """Rows of all images, at most 1024 of one unit at a time, to go through a collection in little memory."""
        for start, stop in zip(self._starts[:-1], self._starts[1:], strict=True):
            for first in range(int(start), int(stop), ROWS_AT_ONCE):
                yield slice(first, min(first + ROWS_AT_ONCE, int(stop)))

    def head(self, layer: int, head: int) -> Iterator[Tensor]:
        """What one head contributes to each image's normalised embedding, from codes and basis.

        Args:
            layer: layer of the model, negative from the end.
            head: head of that layer.

        Yields:
            ``[images, embed]``, float32, at most 1024 images at once, in order: as :meth:`.Contributions.head`, but for
            the rounding of codes that are kept in float16.

        Raises:
            NotKept: collected without codes.
            InputError: no such head; or a file is gone or damaged.
        """
        model = self.manifest.settings.model
        layer, head = resolve_layer(layer, model["layers"]), resolve_head(head, model["heads"])
        self._require("codes")
        basis = self.basis.to(torch.device("cpu"), torch.float32)
        for rows in self.blocks():
            codes = torch.from_numpy(self.read("codes", rows, [layer], [head])[:, 0, 0]).float()
            mean, std, norm = (torch.from_numpy(self.column(name, rows)).float() for name in ("mean", "std", "norm"))
            constants = basis.constants(mean, std, [layer])[:, 0] / (std * norm)[:, None]
            yield codes @ basis.values(layer)[head] + constants


def _resolved(rows: Rows, size: int) -> slice | Array:
    """Rows as a slice from 0 with step 1, or as numbers from 0."""
    if isinstance(rows, slice):
        start, stop, step = rows.indices(size)
        return slice(start, max(start, stop)) if step == 1 else np.arange(start, stop, step)
    numbers = np.asarray(rows)
    if numbers.dtype == bool:
        if numbers.shape != (size,):
            raise InputError(f"a mask of rows has shape {list(numbers.shape)}, expected [{size}]")
        return np.flatnonzero(numbers)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise InputError(f"rows of shape {list(numbers.shape)} and dtype {numbers.dtype}: give a list of integers")
    numbers = numbers.astype(np.int64)
    wrong = numbers[(numbers < -size) | (numbers >= size)]
    if len(wrong):
        raise InputError(f"image {wrong[0]} does not exist: there are {size}")
    return numbers % size
