"""Labels of images, from where somebody wrote them down: folders, a CSV file, or members of tar shards.

Nothing is assumed from an order: every image is looked up by its name, and what has no label is said.
"""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from clipfast.dataset.files import Source
from clipfast.dataset.shards import read_sidecars
from clipfast.errors import InputError

FOLDER, SHARD = "folder", "shard"
_FILE_COLUMNS = ("file", "path", "image", "filename")
_SHOWN = 3


@dataclass(frozen=True)
class Labels:
    """What is known of every image, in the order of the images.

    Attributes:
        values: label of each image, None where nothing says.
        groups: group of each image (for worst-group accuracy), None where nothing says; None altogether without groups.
        notes: what did not fit together, a sentence each.
    """

    values: tuple[str | None, ...]
    groups: tuple[str | None, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> list[str]:
        """Labels that occur, sorted."""
        return sorted({value for value in self.values if value is not None})


def read_labels(sources: Sequence[Source], where: str, *, label: str = "label", group: str | None = None) -> Labels:
    """Looks up every image's label.

    Args:
        sources: the images.
        where: ``"folder"`` (the first folder below the one that was searched), ``"shard"`` (the member of a tar shard
            beside the image: ``.cls``, ``.txt``, or ``.json`` with the columns as keys), or a CSV file with a column
            ``file`` (a path relative to the file itself or to the folder searched, a shard's key, or a bare name).
        label: name of the column with labels.
        group: name of the column with groups; None for no groups.

    Raises:
        InputError: no image has a label, or the CSV file cannot be read or lacks a column.
    """
    if where == FOLDER:
        found = Labels(tuple(_folder(source) for source in sources))
    elif where == SHARD:
        rows = [_shard(source, label, group) for source in sources]
        found = Labels(tuple(row[0] for row in rows), None if group is None else tuple(row[1] for row in rows))
    else:
        found = _csv(sources, Path(where), label, group)
    missing = [str(source) for source, value in zip(sources, found.values, strict=True) if value is None]
    if sources and len(missing) == len(sources):
        raise InputError(f"no image has a label from {where}: {_hint(where)}")
    notes = found.notes
    if missing:
        notes = (*notes, f"{len(missing)} of {len(sources)} images have no label ({_some(missing)}): left out")
    return Labels(found.values, found.groups, notes)


def _hint(where: str) -> str:
    if where == FOLDER:
        return "give the folder that holds one folder per class"
    if where == SHARD:
        return "shards hold a .cls, .txt or .json member beside each image"
    return "its column 'file' names none of these images"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _folder(source: Source) -> str | None:
    if source.folder is None:
        return None
    inside = source.path.relative_to(source.folder)
    parts = (*inside.parts[:-1], *PurePath(source.key).parts[:-1])
    return parts[0] if parts else None


def _shard(source: Source, label: str, group: str | None) -> tuple[str | None, str | None]:
    if not source.key:
        return None, None
    texts = read_sidecars(source.path, source.members)
    if "json" in texts:
        try:
            row = json.loads(texts["json"])
        except ValueError:
            raise InputError(f"{source.path}:{source.key}.json is not JSON") from None
        if isinstance(row, dict) and label in row:
            return str(row[label]), None if group is None or group not in row else str(row[group])
    return texts.get("cls") or texts.get("txt") or None, None


def _csv(sources: Sequence[Source], file: Path, label: str, group: str | None) -> Labels:
    rows = _rows(file, label, group)
    places = {key: at for at, (key, _, _) in enumerate(rows)}
    images = Counter(_bare(source) for source in sources)
    found: list[int | None] = []
    for source in sources:
        names = _names(source, file.parent)
        if images[_bare(source)] == 1:  # a bare name says enough where one image has it
            names.append(_bare(source))
        found.append(next((places[name] for name in names if name in places), None))
    used = set(found)
    unused = [key for at, (key, _, _) in enumerate(rows) if at not in used]
    notes = (f"{len(unused)} rows of {file} name no image here ({_some(unused)})",) if unused else ()
    values = tuple(None if at is None else rows[at][1] for at in found)
    groups = None if group is None else tuple(None if at is None else rows[at][2] for at in found)
    return Labels(values, groups, notes)


def _bare(source: Source) -> str:
    return PurePath(source.key or source.path).name


def _names(source: Source, beside: Path) -> list[str]:
    """What a CSV file may call an image, the most exact first."""
    if source.key:
        return [f"{source.path}:{source.key}", f"{source.key}.{source.image}", source.key]
    names = [str(source.path), source.path.as_posix()]
    for folder in (beside, source.folder, Path()):
        if folder is not None and source.path.absolute().is_relative_to(folder.absolute()):
            names.append(source.path.absolute().relative_to(folder.absolute()).as_posix())
    return names


def _rows(file: Path, label: str, group: str | None) -> list[tuple[str, str | None, str | None]]:
    """(file, label, group) of every row."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            columns = reader.fieldnames or []
            name = next((column for column in _FILE_COLUMNS if column in columns), None)
            lacking = [f"{_FILE_COLUMNS[0]!r}"] if name is None else []
            lacking += [repr(column) for column in (label, group) if column is not None and column not in columns]
            if name is None or lacking:
                raise InputError(
                    f"{file} has no column {' and no '.join(lacking)}: its columns are {', '.join(columns)}"
                )
            rows = [(row[name] or "", row[label] or None, row[group] or None if group else None) for row in reader]
    except OSError as error:
        raise InputError(f"cannot read the labels in {file}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the labels in {file}: not a CSV file in UTF-8 ({error})") from None
    twice = [key for key, times in Counter(key for key, _, _ in rows).items() if times > 1]
    if twice:
        raise InputError(f"{file} names {_some(twice)} more than once")
    return rows
