"""Rows with an image each, whatever they come from: the column with the images, and the sample of a row."""

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clipfast.dataset.inputs.files import located
from clipfast.dataset.inputs.locations import MAX_IMAGE_BYTES, absolute, is_url
from clipfast.dataset.inputs.sidecars import Columns, as_text, is_unicode
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.errors import InputError
from clipfast.inputs import printable

Form = Literal["image", "bytes", "path"]
"""What a column holds: a Hugging Face image, ``{bytes, path}``; encoded images; paths or URLs."""

IMAGE_COLUMNS = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_bytes",
    "img_bytes",
    "bytes",
    "content",
    "picture",
)
"""Usual names of columns with images, the first one that is there is taken."""
PATH_COLUMNS = (
    "file",
    "path",
    "image",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "img_path",
    "img_filename",
    "url",
    "image_url",
    "img_url",
    "uri",
)
"""Usual names of columns with paths or URLs."""


@dataclass(frozen=True)
class Selection:
    """Which columns of a table are read.

    Attributes:
        image: the one with images; None to choose one by its usual names.
        id: the one with a name for each image; None for the number of the row.
        kept: the others that are given with each image; None for all.
    """

    image: str | None = None
    id: str | None = None
    kept: frozenset[str] | None = None

    def keeps(self, column: str) -> bool:
        """Whether a column that is not the image's is given with each image."""
        return self.kept is None or column in self.kept

    def check(self, columns: Sequence[str], where: str) -> None:
        """Raises :class:`InputError` where a column that was named is not there."""
        for column in (self.image, self.id):
            if column is not None and column not in columns:
                raise InputError(f"{printable(where)} has no column {column!r}: {having(columns)}")


def having(columns: Sequence[str]) -> str:
    """The columns there are, for a message."""
    shown = ", ".join(printable(column) for column in columns[:20])
    return f"its columns are {shown}{', …' if len(columns) > 20 else ''}" if columns else "it has no columns"


def image_column(forms: Mapping[str, Form], columns: Sequence[str], wanted: str | None, where: str) -> str:
    """The column with the images: the one that is wanted, else images before bytes before paths, by usual names.

    Args:
        forms: the columns that can hold images.
        columns: all columns.
        wanted: the name that the user gave.
        where: the name of the table, for messages.

    Raises:
        InputError: there is none, or several that are as likely.
    """
    if wanted is not None:
        if wanted not in forms:
            reason = "holds no images, bytes or paths" if wanted in columns else "is not there"
            raise InputError(f"{printable(where)}: the column {wanted!r} {reason}: {having(columns)}")
        return wanted
    for form, usual in (("image", IMAGE_COLUMNS), ("bytes", IMAGE_COLUMNS), ("path", PATH_COLUMNS)):
        fitting = [column for column, each in forms.items() if each == form]
        lower = {column.lower(): column for column in reversed(fitting)}
        named = next((lower[name] for name in usual if name in lower), None)
        if named is not None:
            return named
        if form != "path" and len(fitting) == 1:
            return fitting[0]
        if form != "path" and fitting:
            raise InputError(
                f"{printable(where)} has images in the columns {' and '.join(fitting)}: name the image column"
            )
    raise InputError(
        f"{printable(where)} has no column of images, paths or URLs: {having(columns)}; name the image column"
    )


@dataclass(frozen=True)
class Place:
    """Where rows come from.

    Attributes:
        path: the absolute path or URL of the table or the list; empty for a data set in memory.
        name: what the user calls it.
        working: the folder that relative paths are looked up in where they are not beside the table.
        folder: the folder that was searched, None for a table that was named itself.
        size: bytes of the file at ``path``, where that is known.
        modified_ns: when it was last written, where that is known.
    """

    path: str
    name: str
    working: str
    folder: str | None = None
    size: int | None = None
    modified_ns: int | None = None

    def resolve(self, value: str) -> str:
        """The absolute path or URL that a row gives: relative to the table's folder, or to the working folder."""
        if is_url(value) or os.path.isabs(value):
            return absolute(value)
        if is_url(self.path):
            return posixpath.join(posixpath.dirname(self.path), value)
        beside = os.path.join(os.path.dirname(self.path) or self.working, value)
        if not os.path.lexists(beside):
            elsewhere = os.path.join(self.working, value)
            if os.path.lexists(elsewhere):
                return os.path.abspath(elsewhere)
        return os.path.abspath(beside)

    def sample(self, row: int, value: Any, name: str | None, columns: Columns, *, content: bool = True) -> Sample:
        """The sample of a row.

        Args:
            row: its number, from 0.
            value: the image: bytes, a path or URL, a Hugging Face image, a decoded one; None for none.
            name: its id, None for the number of the row.
            columns: what stands beside it.
            content: whether the bytes are given.
        """
        own = name or f"{self.name}:{row}"
        if isinstance(value, Mapping):
            value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str) and value:
            sample = located(own, self.resolve(value), self.folder)
            return Sample(own, sample.path, "", "", self.folder, None, columns, sample.size, sample.modified_ns)
        member = f"row {row}"
        inside = Sample(own, self.path, member, "", self.folder, None, columns, self.size, self.modified_ns)
        if value is None or (isinstance(value, str | bytes) and not value):
            return inside.failed(Failure(Status.NO_IMAGE, f"{printable(own)}: no image in this row"))
        if isinstance(value, bytes) and len(value) > MAX_IMAGE_BYTES:
            return inside.failed(Failure(Status.TOO_LARGE, f"{printable(own)}: {len(value)} bytes"))
        given = value if content else None
        return Sample(own, self.path, member, "", self.folder, given, columns, self.size, self.modified_ns)


def row_id(value: Any) -> str | None:
    """A value of the id column as an id, None where it is none."""
    text = as_text(value)
    return text if text and is_unicode(text) else None
