"""What is kept per image of a unit: arrays in a Zarr v3 group, of which one head or one layer reads alone.

* ``codes``, ``[image, layer, head, dim]``: :attr:`.Contributions.codes`
* ``class_codes``, ``[image, layer, head, dim]``: :attr:`.Contributions.class_codes`
* ``terms``, ``[image, term, embed]``: ``start``, the MLP of every layer of the model, ``rest``
* ``embeddings``, ``[image, embed]``: as the model gives them, not normalised

A shard is a file with up to 48 MiB of images; in it a chunk has the numbers of one head, or one term, of up to 128 KiB
of images. A shard is written with one call: a call to Zarr costs as much as some megabytes.

Chunks are compressed with Blosc (LZ4 behind a bit shuffle). Measured on float16 codes of ViT-B-32 on one core, bytes
left and MB/s written and read: Blosc LZ4 with bit shuffle 85 %, 1650, 2380; with byte shuffle 98 %, 1690, 3830; Blosc
zstd with bit shuffle 92 %, 570, 1210; zstd 92 %, 880, 980. On the codes of the bundled model 90 % at 1800 and 2470.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import LocalStore

from clipfast.contributions import Contributions
from clipfast.dataset import pieces
from clipfast.dataset.manifest import Record
from clipfast.dataset.pieces import CheckedStore, files
from clipfast.errors import ClipfastError, InputError, NotKept

__all__ = ["ARRAYS", "DTYPES", "ArrayWriter", "UnitArrays", "files"]

CHUNK_BYTES = 128 << 10
ALIGNED = 64  # rows of a chunk are a multiple of it, where there are as many
DTYPES = ("float16", "float32", "float64")
_TORCH = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_LIMITS = {"float16": 65520.0, "float32": (2.0 - 2.0**-24) * 2.0**127, "float64": math.inf}
"""From here on numbers round to infinity."""
_PIECES = "clipfast_pieces"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Kind:
    """One of the arrays.

    Attributes:
        dims: its axes.
        meaning: of its numbers.
        values: them, from a batch.
        labels: names along its axes, from a batch.
        shard_bytes: the most that a shard holds, and that waits in memory.
    """

    dims: tuple[str, ...]
    meaning: str
    values: Callable[[Contributions], Tensor]
    labels: Callable[[Contributions], dict[str, list[Any]]]
    shard_bytes: int


def _heads(contributions: Contributions) -> dict[str, list[Any]]:
    return {"layer": list(contributions.layers), "head": list(range(contributions.basis.heads))}


def _terms(contributions: Contributions) -> dict[str, list[Any]]:
    mlps = [name for name in contributions.terms if name.endswith(".mlp")]
    return {"term": ["start", *mlps, "rest"]}


ARRAYS: Mapping[str, Kind] = {
    "codes": Kind(
        ("image", "layer", "head", "dim"),
        "each head's output before its output projection, divided by std * norm; times the basis: its contribution",
        lambda contributions: contributions.codes,
        _heads,
        48 << 20,
    ),
    "class_codes": Kind(
        ("image", "layer", "head", "dim"),
        "the class token's own part of codes: its attention to itself times its value",
        lambda contributions: contributions.class_codes,
        _heads,
        48 << 20,
    ),
    "terms": Kind(
        ("image", "term", "embed"),
        "contributions that are no head's, divided by norm",
        lambda contributions: torch.cat([contributions.start_and_mlps(), contributions.rest[:, None]], 1),
        _terms,
        16 << 20,
    ),
    "embeddings": Kind(
        ("image", "embed"),
        "image embeddings as the model gives them, not normalised",
        lambda contributions: contributions.embedding,
        lambda contributions: {},
        16 << 20,
    ),
}
"""Everything that can be kept per image, by name."""


class ArrayWriter:
    """Writes the arrays of a unit.

    Memory is that of one shard of each array, however many images there are. The same images in the same batches give
    the same bytes. The arrays are whole after :meth:`finish`; the caller flushes them to the disk and records them.

    Args:
        folder: of the unit; it exists.
        kept: the dtype of each array, ``"float16"``, ``"float32"`` or ``"float64"``; None for one that is not kept.

    Raises:
        InputError: no such array or dtype.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, kept: Mapping[str, str | None]) -> None:
        for name, dtype in kept.items():
            if name not in ARRAYS:
                raise InputError(f"{name!r} cannot be kept: choose from {', '.join(ARRAYS)}")
            if dtype not in (None, *DTYPES):
                raise InputError(f"{name} cannot be kept as {dtype!r}: choose from {', '.join(DTYPES)}")
        self._arrays = [
            GrowingArray(folder, name, np.dtype(dtype)) for name, dtype in kept.items() if dtype is not None
        ]
        if self._arrays:
            zarr.create_group(LocalStore(folder), zarr_format=3)

    def add(self, contributions: Contributions) -> None:
        """Appends a row per image of a batch.

        Raises:
            InputError: a number that is too large for the dtype.
            NotKept: the batch does not have what is to be kept.
            OSError: a shard cannot be written.
        """
        if not len(contributions):
            return
        batches = [(array, array.converted(contributions)) for array in self._arrays]  # all of them, or none
        for array, rows in batches:
            array.add(rows, array.kind.labels(contributions))

    def finish(self) -> None:
        """Writes what waits in memory, and how long the arrays are.

        Raises:
            OSError: a file cannot be written.
        """
        for array in self._arrays:
            array.finish()


class GrowingArray:
    """An array on disk to which rows are appended, a shard at a time.

    Args:
        folder: of the Zarr group.
        name: of the array.
        dtype: of its numbers.
        with_pieces: whether checksums of pieces of shards are kept in ``zarr.json``, some bytes per image.

    Attributes:
        name: of the array.
        dtype: of its numbers.
        kind: of the array.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], *, with_pieces: bool = True) -> None:
        self.name, self.dtype, self.kind = name, dtype, ARRAYS[name]
        self._folder, self._with_pieces = folder, with_pieces
        self._labels: dict[str, list[Any]] = {}
        self._buffer: Array | None = None  # [*axes, rows, last axis]: a chunk of a shard lies in one piece
        self._array: zarr.Array[Any] | None = None
        self._waiting = 0  # rows in the buffer
        self._chunk = 0  # rows of a chunk
        self._pieces: dict[str, str] = {}

    def converted(self, contributions: Contributions) -> Array:
        """The rows of a batch, ``[B, *axes, last axis]``, on the CPU in the dtype that is kept."""
        values = self.kind.values(contributions).detach()
        least, most = (float(bound) for bound in torch.aminmax(values))  # a tenth of the time of isfinite
        limit = _LIMITS[self.dtype.name]
        if not -limit < least <= most < limit:  # what rounds to infinity, infinity, or not a number
            reason = f"{self.name} from {least:.4g} to {most:.4g} do not fit {self.dtype}"
            raise InputError(f"{reason}: keep {self.name} in float32" if self.dtype == np.float16 else reason)
        rows: Array = values.to(_TORCH[self.dtype.name]).cpu().numpy()
        return rows

    def add(self, rows: Array, labels: dict[str, list[Any]]) -> None:
        """Appends rows.

        Args:
            rows: ``[B, *axes, last axis]``, at least one.
            labels: names along axes.

        Raises:
            OSError: a shard cannot be written.
        """
        if self._buffer is None:
            self._labels = labels
            self._chunk, shard = rows_of(rows.shape[1:], self.dtype.itemsize, self.kind.shard_bytes)
            self._buffer = np.empty((*rows.shape[1:-1], shard, rows.shape[-1]), self.dtype)
        while len(rows):
            shard = self._buffer.shape[-2]
            taken = rows[: shard - self._waiting]
            self._buffer[..., self._waiting : self._waiting + len(taken), :] = np.moveaxis(taken, 0, -2)
            self._waiting += len(taken)
            if self._waiting == shard:
                self._flush()
            rows = rows[len(taken) :]

    def _flush(self) -> None:
        """Writes the buffer as the next shard."""
        assert self._buffer is not None
        rows = np.moveaxis(self._buffer[..., : self._waiting, :], -2, 0)  # [rows, *axes, last axis]
        start = 0
        if self._array is None:
            self._array = self._created(rows.shape)
        else:
            start = self._array.shape[0]
            self._array.resize((start + len(rows), *rows.shape[1:]))
        self._array[start:] = rows
        self._waiting = 0
        if not self._with_pieces:
            return
        assert self._array.shards is not None
        place = (start // self._array.shards[0], *[0] * (rows.ndim - 1))
        name = "/".join([self.name, "c", *map(str, place)])
        chunks = math.prod(shard // chunk for shard, chunk in zip(self._array.shards, self._array.chunks, strict=True))
        self._pieces[name] = pieces.checksums_of_pieces(self._folder / name, chunks)

    def _created(self, shape: tuple[int, ...]) -> "zarr.Array[Any]":
        """The array with its first shard's shape: no larger than the unit, where that has few images."""
        chunk = min(self._chunk, shape[0])
        return zarr.create_array(
            LocalStore(self._folder),
            name=self.name,
            shape=shape,
            shards=(-(-shape[0] // chunk) * chunk, *shape[1:]),
            chunks=(chunk, *[1] * (len(shape) - 2), shape[-1]),
            dtype=self.dtype,
            filters=None,
            compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
            fill_value=float("nan"),  # what other readers make of a shard that is gone
            dimension_names=self.kind.dims,
            config={"write_empty_chunks": True},
            zarr_format=3,
        )

    def finish(self) -> None:
        """Writes the last shard and the attributes; nothing where there were no images."""
        if self._waiting:
            self._flush()
        if self._array is not None:
            named = {"labels": self._labels} | ({_PIECES: self._pieces} if self._with_pieces else {})
            self._array.update_attributes(cast(Any, {"long_name": self.kind.meaning, "units": "1", **named}))
        self._buffer = None


def rows_of(shape: Sequence[int], itemsize: int, shard_bytes: int) -> tuple[int, int]:
    """How many rows a chunk has, and a shard.

    Args:
        shape: of a row.
        itemsize: bytes of a number.
        shard_bytes: the most that a shard may have; more where a single row has.
    """
    budget = max(1, shard_bytes // (math.prod(shape) * itemsize))
    chunk = max(1, min(CHUNK_BYTES // (shape[-1] * itemsize), budget))
    if chunk > ALIGNED:
        chunk -= chunk % ALIGNED
    return chunk, budget // chunk * chunk


class UnitArrays:
    """The arrays of a unit, to read. What is read has been checked: damage is an error, never a wrong number.

    Args:
        folder: of the unit.
        record: of the unit.

    Attributes:
        names: of the arrays that were kept; none where no image of the unit is in the statistics.
    """

    def __init__(self, folder: Path, record: Record) -> None:
        self._folder = folder
        self._record = record
        self._store = CheckedStore(folder, record.files)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self.names = tuple(name for name in ARRAYS if f"{name}/zarr.json" in record.files)

    @property
    def bytes_read(self) -> int:
        """Bytes that were read from files so far."""
        return self._store.bytes_read

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array; raises as :meth:`read`."""
        return self._array(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The dtype of an array; raises as :meth:`read`."""
        return np.dtype(self._array(name).dtype)

    def shards(self, name: str) -> int:
        """How many shards an array has; raises as :meth:`read`."""
        array = self._array(name)
        with self._as_damage(name):
            return -(-array.shape[0] // cast(Any, array.shards)[0])

    def labels(self, name: str) -> dict[str, list[Any]]:
        """Names along axes of an array: layers of the model, heads, terms; raises as :meth:`read`."""
        with self._as_damage(name):
            return cast(Any, self._array(name).attrs["labels"])

    def read(
        self,
        name: str,
        rows: slice | Sequence[int] | Array = slice(None),
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        terms: Sequence[str] | None = None,
    ) -> Array:
        """Rows of an array, reading the chunks alone that they are in.

        Args:
            name: of the array.
            rows: which rows; all by default.
            layers: layers of the model, from 0; all for None.
            heads: heads, from 0; all for None.
            terms: names of terms; all for None.

        Returns:
            ``[rows, layers, heads, dim]``, ``[rows, terms, embed]`` or ``[rows, embed]``.

        Raises:
            NotKept: the array was not kept.
            InputError: no such row, layer, head or term; or a damaged file.
        """
        labels = self.labels(name)
        chosen: dict[str, Sequence[Any] | None] = {"layer": layers, "head": heads, "term": terms}
        selection: list[slice | list[int]] = []
        for dim in ARRAYS[name].dims[1:]:
            wanted = chosen.pop(dim, None)
            selection.append(slice(None) if wanted is None else [_place(dim, each, labels[dim]) for each in wanted])
        if unfit := [dim for dim, wanted in chosen.items() if wanted is not None]:
            raise InputError(f"{name} have no axis {unfit[0]!r}: theirs are {', '.join(ARRAYS[name].dims)}")
        return self.at(name, (rows, *selection))

    def at(self, name: str, places: Sequence[slice | Sequence[int] | Array]) -> Array:
        """The same by places along every axis, counted from 0; raises as :meth:`read`."""
        array = self._array(name)
        selection = tuple(_resolved(place, size, name) for place, size in zip(places, array.shape, strict=True))
        with self._as_damage(name):
            values: Array = np.asarray(array.oindex[selection])
        return values

    def _array(self, name: str) -> "zarr.Array[Any]":
        if name not in self.names:
            raise NotKept(f"{self._folder} has no {name}: they were not kept, or none of its images is in")
        if name not in self._arrays:
            with self._as_damage(name):
                array = zarr.open_array(self._store, path=name, mode="r", zarr_format=3)
                self._store.expect(cast(Any, array.attrs[_PIECES]))
                if len(array.shape) != len(ARRAYS[name].dims) or array.shape[0] != self._record.count:
                    raise ValueError(f"shape {array.shape} for {self._record.count} images")
                self._arrays[name] = array
        return self._arrays[name]

    @contextmanager
    def _as_damage(self, name: str) -> Iterator[None]:
        """Whatever Zarr raises about files that it cannot read becomes an :class:`InputError`."""
        try:
            yield
        except (ClipfastError, MemoryError):
            raise
        except Exception as error:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            raise pieces.damaged(self._folder / name, self._folder, what) from error


def _place(dim: str, wanted: Any, labels: Sequence[Any]) -> int:
    """Where a layer, a head or a term stands."""
    if dim == "layer" and isinstance(wanted, int) and wanted < 0:
        raise InputError(f"layer {wanted}: give layers from 0")
    try:
        return labels.index(wanted)
    except ValueError:
        raise InputError(f"{dim} {wanted!r} is not there: choose from {', '.join(map(str, labels))}") from None


def _resolved(place: slice | Sequence[int] | Array, size: int, name: str) -> slice | Array:
    """Places along an axis as Zarr takes them: a slice with step 1, or numbers from 0."""
    if isinstance(place, slice):
        numbers: Array = np.arange(*place.indices(size))
        if place.step in (None, 1):
            return slice(int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else slice(0, 0)
        return numbers
    numbers = np.asarray(place, np.int64).reshape(-1)
    wrong = numbers[(numbers < 0) | (numbers >= size)]
    if len(wrong):
        raise InputError(f"{wrong[0]} is outside an axis of {name}: it has {size}")
    return numbers
