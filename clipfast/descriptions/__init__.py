"""Text pools that describe the outputs of heads, and a reader for text files of users.

>>> from clipfast import descriptions
>>> texts = descriptions.pool("general")
>>> descriptions.categories("general")[texts[0]]
>>> mine = descriptions.read("my_texts.txt")
>>> mine.texts, mine.notes

The pools are written by ``python -m clipfast.descriptions.compose`` from the word lists in ``words/``.
"""

import tomllib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from clipfast.errors import InputError
from clipfast.inputs import open_regular

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = Path(__file__).parent
INDEX = FOLDER / "index.toml"

POOLS = {
    "general": "image descriptions of every kind: colours, shapes, counts, textures, places, styles, actions …",
    "classes": "names of everyday things, animals, plants, food, vehicles, buildings and landscapes",
    "common_words": "common English words with their regular forms, as a pool that describes no images",
    "scenes": "descriptions in the vocabulary of the bundled scenes model, each with the attributes it names",
}
"""The pools by name, with a description of their contents."""

_SHOWN = 5  # most line numbers in a note


@dataclass(frozen=True)
class Pool:
    """The texts of a file.

    Attributes:
        path: the file.
        texts: the distinct texts in the order of the file, without surrounding white space.
        blank: numbers of the blank lines, from 1.
        duplicates: (line, line of the first occurrence); case and white space are ignored.
    """

    path: Path
    texts: tuple[str, ...]
    blank: tuple[int, ...]
    duplicates: tuple[tuple[int, int], ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence per kind of line that was skipped; empty if none was."""
        notes = []
        if self.blank:
            notes.append(f"{self.path}: {_count(self.blank, 'blank line')} left out: {_lines(self.blank)}")
        if self.duplicates:
            places = [f"{line} (as {first})" for line, first in self.duplicates]
            notes.append(f"{self.path}: {_count(places, 'duplicate')} left out: {_lines(places)}")
        return tuple(notes)


def _count(items: tuple[int, ...] | list[str], what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def _lines(items: tuple[int, ...] | list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"line{'' if len(items) == 1 else 's'} {', '.join(map(str, items[:_SHOWN]))}{more}"


def pool(name: str) -> list[str]:
    """The texts of one of :data:`POOLS`.

    Raises:
        InputError: no such pool.
    """
    if name not in POOLS:
        raise InputError(f"there is no pool {name!r}: choose one of {', '.join(POOLS)}, or read a file of your own")
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def categories(name: str = "general") -> dict[str, str]:
    """The category of every text of a pool: ``"colour"``, ``"animals"``, ``"place"`` …

    In the pool ``"scenes"`` the category lists the attributes that the text names: ``"shape"``, ``"shape, colour"``.

    Raises:
        InputError: no such pool.
    """
    texts = iter(pool(name))
    counts = tomllib.loads(INDEX.read_text(encoding="utf-8"))[name]
    return {text: category for category, count in counts.items() for _, text in zip(range(count), texts, strict=False)}


def scene_attributes() -> dict[str, str]:
    """The attribute of every text of the pool ``"scenes"`` that names exactly one."""
    return {text: names for text, names in categories("scenes").items() if "," not in names}


def read(path: str | PathLike[str]) -> Pool:
    """Reads texts from a file: one per line, UTF-8 with or without a byte order mark.

    Raises:
        InputError: a folder, a file that is not UTF-8 (with the line), or one without any text.
        FileNotFoundError: no such file.
        OSError: the file cannot be read, or it is not a regular file.
    """
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{file} is a folder: give a file with one text per line")
    with open_regular(file) as opened:
        data = opened.read()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8, one text per line"
        ) from error
    if "\0" in content:
        line = content.count("\n", 0, content.index("\0")) + 1
        raise InputError(f"{file} is not UTF-8 text: a zero byte in line {line}; save it as UTF-8, one text per line")
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    texts: dict[str, str] = {}
    first: dict[str, int] = {}
    blank, duplicates = [], []
    for number, line_text in enumerate(content.split("\n"), 1):
        text = line_text.strip()
        key = normalised(text)
        if not key:
            blank.append(number)
        elif key in first:
            duplicates.append((number, first[key]))
        else:
            first[key], texts[key] = number, text
    if not texts:
        raise InputError(f"{file} contains no text: write one per line")
    if content.endswith("\n"):
        blank.pop()  # the text after the last newline is not a line
    return Pool(file, tuple(texts.values()), tuple(blank), tuple(duplicates))


def normalised(text: str) -> str:
    """A text as CLIP's tokenizers read it: lower case, single spaces."""
    return " ".join(text.casefold().split())


def random_features(count: int, width: int, seed: int = 0) -> "Tensor":
    """Random unit vectors, as a control for text features.

    Args:
        count: number of vectors.
        width: embed_dim of the model.
        seed: seed of the generator.

    Returns:
        ``[count, width]``, float32, unit norm, uniform on the sphere.

    Raises:
        InputError: a count or width below one.
    """
    import torch

    if count < 1 or width < 1:
        raise InputError(f"{count} random features of width {width} were asked for: both must be at least 1")
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1).float()
