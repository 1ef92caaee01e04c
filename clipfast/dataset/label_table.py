"""A CSV file with a row for each image, for images that are never all in memory.

Which row belongs to which image is decided once, before a pass, from the names of all images: a name that several
images have cannot be told from one image alone. A row is that image's whose name in it is the most specific: an
id or a path goes before a key, a key before a bare file name. Where several images are named as specifically, the row
is nobody's. So a bare file name gives a label only where one image has it, and no label is a guess.

What is kept is a table of 128-bit hashes of the images that have a row, with their labels: 25 bytes for an image.
"""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import xxhash
from numpy.typing import NDArray

from clipfast.dataset.labels import LabelColumns
from clipfast.dataset.samples import Sample
from clipfast.dataset.tables import FILE_COLUMNS, some
from clipfast.errors import InputError
from clipfast.inputs import open_regular, printable

_SHOWN = 3
_FIRST_IMAGES, _MOST_IMAGES = 4096, 1 << 18
"""From how many images the column that names them is found: more where the first ones are in no row."""
_NOBODY = 255

Names = Callable[[], Iterable[Sample]]
"""Gives all images of a pass, without their content; called several times."""


@dataclass
class _Found:
    """Distinct texts, by number; -1 is none."""

    texts: list[str] = field(default_factory=list)
    numbers: dict[str, int] = field(default_factory=dict)

    def number(self, text: str | None) -> int:
        if not text:
            return -1
        if text not in self.numbers:
            self.numbers[text] = len(self.texts)
            self.texts.append(text)
        return self.numbers[text]


@dataclass(frozen=True)
class LabelTable:
    """The labels of images by their identity. It can be pickled.

    Attributes:
        file_column: the column of the file that names images.
        hashes: of the images that have a row, ``[2, image]``: both halves, sorted by the first.
        labels: number of each one's label in ``texts``, -1 for none.
        groups: number of each one's group, -1 for none.
        kept: whether the row filter keeps it.
        texts: distinct labels and groups.
        notes: what did not fit together, a sentence each.
    """

    file_column: str
    hashes: NDArray[np.uint64]
    labels: NDArray[np.int32]
    groups: NDArray[np.int32]
    kept: NDArray[np.bool_]
    texts: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def row(self, sample: Sample) -> tuple[str | None, str | None, bool] | None:
        """An image's label and group, and whether the filter keeps it; None where it has no row."""
        high, low = identity(sample)
        highs, lows = self.hashes
        at = int(np.searchsorted(highs, np.uint64(high)))
        while at < len(highs) and highs[at] == high:
            if lows[at] == low:
                return self._text(self.labels[at]), self._text(self.groups[at]), bool(self.kept[at])
            at += 1
        return None

    def _text(self, number: np.int32) -> str | None:
        return None if number < 0 else self.texts[number]

    def digest(self) -> str:
        """A hash of all that labels depend on."""
        digest = xxhash.xxh3_128()
        for array in (self.hashes, self.labels, self.groups, self.kept):
            digest.update(array.tobytes())
        digest.update("\0".join(self.texts).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def identity(sample: Sample) -> tuple[int, int]:
    """A hash of the place that an image is in, in two halves: the same for two names of one file."""
    place = (sample.path, sample.member, "" if sample.path else sample.id)
    value = xxhash.xxh3_128_intdigest("\0".join(place).encode("utf-8", "surrogatepass"))
    return value >> 64, value & ((1 << 64) - 1)


def match_table(file: Path, columns: LabelColumns, file_column: str | None, names: Names) -> LabelTable:
    """Finds the row of every image in a CSV file.

    Args:
        file: the CSV file.
        columns: what is read.
        file_column: the column that names images; None to choose one that does.
        names: all images.

    Raises:
        InputError: the file cannot be read, lacks a column, names an image more than once, or gives no image a label.
    """
    header = _header(file)
    wanted = [columns.label, *columns.named(), *([] if file_column is None else [file_column])]
    lacking = [repr(column) for column in dict.fromkeys(wanted) if column not in header]
    column = file_column or _file_column(file, header, names)
    if column is None:
        lacking.insert(0, f"{FILE_COLUMNS[0]!r}")
    if column is None or lacking:
        listed = ", ".join(map(printable, header))
        raise InputError(f"{printable(file)} has no column {' and no '.join(lacking)}: its columns are {listed}")
    return _Matching(file, columns, column).table(names)


class _Matching:
    """The rows of a file, and whose each one is."""

    def __init__(self, file: Path, columns: LabelColumns, column: str) -> None:
        self._file, self._columns, self._column = file, columns, column
        self._rows: dict[str, int] = {}
        self._found = _Found()
        labels, groups, kept, repeated = [], [], [], []
        for number, row in enumerate(_rows(file)):
            name = row.get(column) or ""
            if name in self._rows:
                repeated.append(name)
            if name:
                self._rows[name] = number
            labels.append(self._found.number(row.get(columns.label)))
            groups.append(self._found.number(columns.group(row)))
            kept.append(columns.keeps(row))
        if repeated:
            raise InputError(f"{printable(file)} names {some(list(dict.fromkeys(repeated)))} more than once")
        self._labels, self._groups = np.array(labels, np.int32), np.array(groups, np.int32)
        self._kept = np.array(kept, np.bool_)
        self._owners = np.zeros((len(kept), 2), np.uint64)
        self._levels = np.full(len(kept), _NOBODY, np.uint8)
        self._shared = np.zeros(len(kept), np.bool_)

    def table(self, names: Names) -> LabelTable:
        beside, working = self._file.parent.absolute(), Path.cwd()
        for sample in names():
            for level, name in names_of(sample, beside, working):
                row = self._rows.get(name)
                if row is not None:
                    self._claim(row, level, identity(sample))
        return self._result()

    def _claim(self, row: int, level: int, owner: tuple[int, int]) -> None:
        if level < self._levels[row]:
            self._levels[row], self._owners[row], self._shared[row] = level, owner, False
        elif level == self._levels[row] and tuple(map(int, self._owners[row])) != owner:
            self._shared[row] = True

    def _result(self) -> LabelTable:
        named = self._levels != _NOBODY
        rows = self._best(np.flatnonzero(named & ~self._shared))
        if not (self._kept & (self._labels >= 0))[rows].any():
            shared = f"its names are those of several images each ({self._some(self._shared)})"
            nobody = f"its column {self._column!r} names none of these images"
            reason = shared if self._shared.any() else nobody if not named.any() else "no row that is kept has one"
            raise InputError(f"no image has a label from {printable(self._file)}: {reason}")
        notes = []
        unused = self._kept & ~named
        if unused.any():
            notes.append(f"{unused.sum()} rows of {printable(self._file)} name no image here ({self._some(unused)})")
        if self._shared.any():
            count = f"{self._shared.sum()} rows of {printable(self._file)} name several images each"
            notes.append(f"{count} ({self._some(self._shared)}): they label none, name images by their paths")
        return LabelTable(
            self._column,
            np.ascontiguousarray(self._owners[rows].T),
            self._labels[rows],
            self._groups[rows],
            self._kept[rows],
            tuple(self._found.texts),
            tuple(notes),
        )

    def _best(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Of the rows of each image the one that names it the most specifically, sorted by the images' hashes."""
        owners = self._owners[rows]
        order = np.lexsort((self._levels[rows], owners[:, 1], owners[:, 0]))
        owners = owners[order]
        is_first = np.ones(len(rows), np.bool_)
        is_first[1:] = (owners[1:] != owners[:-1]).any(axis=1)
        return rows[order][is_first]

    def _some(self, rows: NDArray[np.bool_]) -> str:
        """The first names in some rows."""
        first = set(np.flatnonzero(rows)[: _SHOWN + 1].tolist())
        return some(list(islice((name for name, row in self._rows.items() if row in first), _SHOWN + 1)))


def names_of(sample: Sample, beside: Path, working: Path) -> Iterator[tuple[int, str]]:
    """What a CSV file may call an image, the most specific first, each with how specific it is, 0 the most.

    Args:
        sample: the image.
        beside: the folder of the CSV file.
        working: the working folder.
    """
    yield 0, sample.id
    if sample.key:
        shard = sample.id.removesuffix(f":{sample.member}")
        yield 1, f"{shard}:{sample.key}"
        yield 1, f"{sample.path}:{sample.key}"
        yield 5, sample.member
        yield 6, sample.key
        yield 7, PurePosixPath(sample.key).name
        return
    if sample.member:
        return
    yield 0, sample.path
    path = PurePath(sample.path)
    for level, folder in enumerate((beside, sample.folder, working), 2):
        if folder is not None and path.is_relative_to(folder):
            yield level, path.relative_to(folder).as_posix()
    yield 7, path.name


# ------------------------------------------------------------------------------------------------------------ the file


def _file_column(file: Path, header: Sequence[str], names: Names) -> str | None:
    """The column that names images: of those that do, one with a usual name, else the one that names the most.

    The first images decide, or more where those are in no row.

    Raises:
        InputError: several columns name as many.
    """
    beside, working = file.parent.absolute(), Path.cwd()
    usual = [column for column in FILE_COLUMNS if column in header]
    samples, count = iter(names()), _FIRST_IMAGES
    while count <= _MOST_IMAGES:
        first = {name for sample in islice(samples, count) for _, name in names_of(sample, beside, working)}
        if not first:
            break
        counts = dict.fromkeys(header, 0)
        for row in _rows(file):
            for column in header:
                counts[column] += row.get(column) in first
        for column in usual:
            if counts[column]:
                return column
        most = max(counts.values(), default=0)
        best = [column for column in header if counts[column] == most]
        if most and len(best) > 1:
            raise InputError(
                f"{printable(file)} names images in the columns {' and '.join(best)}: name the file column"
            )
        if most:
            return best[0]
        count *= 8
    return usual[0] if usual else None


def _header(file: Path) -> list[str]:
    rows = _read(file)
    return next(rows, [])


def _rows(file: Path) -> Iterator[dict[str, str | None]]:
    """The rows by column; a short one lacks its last columns."""
    rows = _read(file)
    header = next(rows, [])
    for row in rows:
        yield dict(zip(header, chain(row, [None] * (len(header) - len(row))), strict=False))


def _read(file: Path) -> Iterator[list[str]]:
    """The rows of a CSV file, the one with the columns first.

    Raises:
        InputError: it cannot be read.
    """
    name = printable(file)
    try:
        with open_regular(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
            yield from (row for row in csv.reader(text) if row)
    except OSError as error:
        raise InputError(f"cannot read the labels in {name}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the labels in {name}: not a CSV file in UTF-8 ({error})") from None
