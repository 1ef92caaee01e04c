"""CSV files with a row per image: which row belongs to which image."""

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath

from clipfast.dataset.files import Source
from clipfast.errors import InputError
from clipfast.inputs import open_regular, printable

FILE_COLUMNS = (
    "file",
    "path",
    "image",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "img_filename",
)
"""Usual names of the column that names images."""
_SHOWN = 3

Row = Mapping[str, str | None]


@dataclass(frozen=True)
class Table:
    """A CSV file, matched with images.

    Attributes:
        file_column: the column that names images.
        rows: the row of each image, None where it has none.
        unused: the rows that belong to no image, with the names in them.
    """

    file_column: str
    rows: list[Row | None]
    unused: list[tuple[str, Row]]


def match_rows(sources: Sequence[Source], file: Path, columns: Sequence[str], file_column: str | None) -> Table:
    """Finds the row of every image in a CSV file.

    Args:
        sources: the images.
        file: the CSV file.
        columns: columns that the file must have.
        file_column: the column that names images; None to choose one that does.

    Raises:
        InputError: the file cannot be read, lacks a column, or names an image more than once.
    """
    rows, header = _read(file)
    required = [*columns, *([] if file_column is None else [file_column])]
    lacking = [repr(column) for column in dict.fromkeys(required) if column not in header]
    names = _all_names(sources, file.parent)
    column = file_column or _file_column(file, header, rows, set(chain.from_iterable(names)))
    if column is None:
        lacking.insert(0, f"{FILE_COLUMNS[0]!r}")
    if column is None or lacking:
        raise InputError(
            f"{printable(file)} has no column {' and no '.join(lacking)}: its columns are {', '.join(header)}"
        )
    keys = [row[column] or "" for row in rows]
    repeated = [key for key, times in Counter(keys).items() if times > 1]
    if repeated:
        raise InputError(f"{printable(file)} names {some(repeated)} more than once")
    places = {key: at for at, key in enumerate(keys)}
    matches = [next((places[name] for name in names_of_image if name in places), None) for names_of_image in names]
    used = set(matches)
    return Table(
        column,
        [None if at is None else rows[at] for at in matches],
        [(key, rows[at]) for at, key in enumerate(keys) if at not in used],
    )


def some(names: Sequence[str]) -> str:
    """The first names of many, for a message."""
    return ", ".join(printable(name) for name in names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _file_column(
    file: Path, header: Sequence[str], rows: Sequence[Mapping[str, str | None]], names: set[str]
) -> str | None:
    """The column that names images: of those that do, one with a usual name, else the one that names the most.

    Raises:
        InputError: several columns name as many.
    """
    counts = {column: sum(row[column] in names for row in rows) for column in header}
    usual = [column for column in FILE_COLUMNS if column in counts]
    for column in usual:
        if counts[column]:
            return column
    most = max(counts.values(), default=0)
    if not most:
        return usual[0] if usual else None
    best = [column for column in header if counts[column] == most]
    if len(best) > 1:
        raise InputError(f"{printable(file)} names images in the columns {' and '.join(best)}: name the file column")
    return best[0]


def _all_names(sources: Sequence[Source], beside: Path) -> list[list[str]]:
    """What a CSV file may call each image, the most specific first; the bare name only where one image has it."""
    bare = [PurePath(source.key or source.path).name for source in sources]
    counts = Counter(bare)
    return [
        [*_names(source, beside), *([name] if counts[name] == 1 else [])]
        for source, name in zip(sources, bare, strict=True)
    ]


def _names(source: Source, beside: Path) -> list[str]:
    if source.key:
        return [f"{source.path}:{source.key}", f"{source.key}.{source.image}", source.key]
    names = [str(source.path), source.path.as_posix()]
    for folder in (beside, source.folder, Path()):
        if folder is not None and source.path.absolute().is_relative_to(folder.absolute()):
            names.append(source.path.absolute().relative_to(folder.absolute()).as_posix())
    return names


def _read(file: Path) -> tuple[list[dict[str, str | None]], list[str]]:
    """The rows of a CSV file, and its columns."""
    name = printable(file)
    try:
        with open_regular(file) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text)
            rows = list(reader)
            return rows, list(reader.fieldnames or ())
    except OSError as error:
        raise InputError(f"cannot read the labels in {name}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the labels in {name}: not a CSV file in UTF-8 ({error})") from None
