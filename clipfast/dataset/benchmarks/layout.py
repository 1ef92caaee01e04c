"""What the readers of public data sets have in common."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clipfast.errors import InputError
from clipfast.files import atomic_write
from clipfast.images import SUFFIXES
from clipfast.inputs import open_regular, printable

_SHOWN = 3


@dataclass(frozen=True)
class LabelledImage:
    """One image.

    Attributes:
        path: its file.
        label: its class, as the data set's own files call it.
        group: its group, None where the data set has none.
    """

    path: Path
    label: str
    group: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """The labelled images of a data set.

    Attributes:
        name: of the data set.
        images: in the order of the data set.
        names: names of every class by label; empty where the data set's files have none.
        source: where the labels are from, for people to read.
    """

    name: str
    images: tuple[LabelledImage, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = ""

    @property
    def labels(self) -> list[str]:
        """Labels that occur, sorted."""
        return sorted({image.label for image in self.images})

    @property
    def groups(self) -> Counter[str]:
        """Images of every group; empty where there are none."""
        return Counter(image.group for image in self.images if image.group is not None)

    def write_list(self, path: Path) -> Path:
        """Writes a CSV file with the columns ``file`` (absolute), ``label`` and ``group``, an input of a pass.

        A file that says the same already is left as it is: a pass that goes on finds its input unchanged.

        Raises:
            OSError: the file cannot be written.
        """
        text = io.StringIO()
        rows = [(str(image.path.resolve()), image.label, image.group or "") for image in self.images]
        csv.writer(text, lineterminator="\n").writerows([("file", "label", "group"), *rows])
        content = text.getvalue()
        if not path.exists() or path.read_bytes() != content.encode("utf-8", "surrogateescape"):
            with atomic_write(path) as partial:
                partial.write_bytes(content.encode("utf-8", "surrogateescape"))
        return path


class WrongLayout(InputError):
    """A folder that is not laid out as the data set is published."""

    def __init__(self, name: str, place: Path, expected: str, found: str) -> None:
        super().__init__(f"{printable(place)} is not laid out as {name}: expected {expected}, found {found}")


def require_folder(name: str, folder: Path) -> None:
    """Raises :class:`InputError` unless it is a folder."""
    if not folder.is_dir():
        what = printable(folder)
        raise InputError(f"{name}: {f'{what} is a file, not a folder' if folder.exists() else f'no {what}'}")


def contents(folder: Path) -> str:
    """What is in a folder, in a few words."""
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    return some(names) if names else "an empty folder"


def some(names: Sequence[str]) -> str:
    """A few of many names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + more


def is_image(path: Path) -> bool:
    """Whether a file's name ends as images' names do."""
    return path.suffix.lower() in SUFFIXES


def read_text(path: Path) -> str:
    """A text file in UTF-8.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with open_regular(path) as opened:
            return opened.read().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {printable(path)}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read {printable(path)}: not UTF-8 text") from None


def read_pairs(path: Path, what: str) -> dict[str, str]:
    """The lines of a text file as first word → the rest of the line.

    Args:
        path: the file.
        what: what a line consists of, for messages.

    Raises:
        InputError: it cannot be read, a line has one word only, or a first word occurs twice.
    """
    pairs: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        first, _, rest = line.strip().partition(" ")
        if not rest.strip():
            raise InputError(f"{printable(path)}:{number} is {line.strip()[:60]!r}: expected {what}")
        if first in pairs:
            raise InputError(f"{printable(path)}:{number} names {first!r} a second time")
        pairs[first] = rest.strip()
    if not pairs:
        raise InputError(f"{printable(path)} has no lines: expected {what}")
    return pairs


def read_columns(path: Path, columns: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file: the place of each, ``FILE:LINE``, and its values in some columns.

    Raises:
        InputError: it cannot be read or lacks a column.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    header = [name for name in reader.fieldnames or () if name]
    lacking = [name for name in columns if name not in header]
    if lacking:
        raise InputError(
            f"{printable(path)} has no column {lacking[0]!r}: expected {', '.join(columns)}, found "
            f"{', '.join(header) or 'an empty file'}"
        )
    return [
        (f"{printable(path)}:{reader.line_num}", {name: (row[name] or "").strip() for name in columns})
        for row in reader
    ]


def first_that_exists(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    """The first file with one of these names in these folders, None where there is none."""
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)
