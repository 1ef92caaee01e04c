"""Which input each name is that a user gives: told by its ending, and by what is there."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from os import PathLike
from pathlib import Path

from braceexpand import braceexpand

from clipfast.dataset.inputs.endings import LISTS, TABLES, kind_of
from clipfast.dataset.inputs.files import FileInput
from clipfast.dataset.inputs.folders import FolderInput
from clipfast.dataset.inputs.huggingface import HuggingFaceRows, is_saved, saved_splits
from clipfast.dataset.inputs.lists import ListInput
from clipfast.dataset.inputs.locations import Naming, absolute, file_system, is_url
from clipfast.dataset.inputs.objects import IndexedInput
from clipfast.dataset.inputs.rows import Selection
from clipfast.dataset.inputs.tables import TableInput
from clipfast.dataset.inputs.tars import ShardInput
from clipfast.dataset.plan import Input
from clipfast.errors import InputError
from clipfast.inputs import printable

_READ = (
    "give image files, folders, tar shards, tables "
    f"({' '.join(TABLES)}) or lists of paths ({' '.join(LISTS)}), by path, pattern or URL"
)


@dataclass(frozen=True)
class _Named:
    """One file or folder that was named, or found by a pattern.

    Attributes:
        given: as the user would name it.
        path: its absolute path or URL.
        kind: ``"folder"``, ``"data set"`` for one that Hugging Face's datasets saved, or as :func:`kind_of` says.
        pattern: what found it; its own name where it was named itself.
    """

    given: str
    path: str
    kind: str
    pattern: str


def open_inputs(
    names: Sequence[str | PathLike[str]],
    *,
    skip: str | PathLike[str] | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    columns: Iterable[str] | None = None,
) -> list[Input]:
    """The inputs that a user names, in their order.

    A file that is named twice counts once, as does one in a folder that is named too.

    Args:
        names: paths, patterns or URLs of image files, folders, tar shards (``.tar``, compressed or not), tables
            (``.parquet``, ``.arrow``, ``.feather``), lists of paths or URLs (``.txt``, ``.csv``, ``.tsv``,
            ``.jsonl``), and folders that ``Dataset.save_to_disk`` wrote. A pattern has braces
            (``shards-{0000..0099}.tar``) or ``*``, ``?``, ``[…]``, as in a shell; of URLs braces and ``*``. URLs are
            those that fsspec opens: ``s3://``, ``hf://``, ``https://``, ``file://``.
        skip: a folder whose files are results, not images.
        image_column: the column of tables and lists with images, paths or URLs; None to choose one by its usual names.
        id_column: the column of tables and lists with a name for each image; None for the path, or the number of the
            row.
        columns: the other columns of tables and lists that are given with each image; None for all.

    Raises:
        InputError: a name that is none of these, or that nothing is there for.
    """
    skipped = None if skip is None else os.path.abspath(skip)
    selection = Selection(image_column, id_column, None if columns is None else frozenset(columns))
    working = os.getcwd()
    found = list(_distinct(each for name in names for each in _expanded(os.fspath(name))))
    inputs: list[Input] = []
    before: list[str] = []
    for (kind, _), group in groupby(found, lambda each: (each.kind, Naming.of(each.given))):
        members = list(group)
        paths = tuple(each.path for each in members)
        label = _label(members)
        naming = Naming.of(members[0].given)
        if kind == "data set":
            inputs += [each for member in members for each in _saved(member, selection)]
            continue
        if kind == "folder":
            for each in members:
                inside = frozenset(path for path in before if path.startswith(os.path.join(each.path, "")))
                inputs.append(FolderInput(each.given, each.path, skipped, inside, selection))
                before.append(each.path)
            continue
        before += paths
        if kind == "shard":
            inputs.append(ShardInput(label, paths, naming))
        elif kind == "image":
            inputs.append(FileInput(label, paths, naming))
        elif kind == "table":
            inputs += [TableInput(each.given, each.path, working, selection) for each in members]
        else:
            inputs += [ListInput(each.given, each.path, working, selection) for each in members]
    return inputs


def _saved(folder: _Named, selection: Selection) -> Iterator[Input]:
    """The data sets that a folder was saved with: one, or one for each split."""
    for split in saved_splits(folder.path):
        name = os.path.join(folder.given, split) if split else folder.given
        path = os.path.join(folder.path, split) if split else folder.path
        yield IndexedInput(name, HuggingFaceRows(path, selection, name))


def _label(members: Sequence[_Named]) -> str:
    patterns = list(dict.fromkeys(printable(each.pattern) for each in members))
    return ", ".join(patterns[:3]) + (", …" if len(patterns) > 3 else "")


def _distinct(found: Iterable[_Named]) -> Iterator[_Named]:
    """Each path once; nothing that lies in a folder that came before and would be found in it."""
    seen: set[str] = set()
    folders: list[str] = []
    for each in found:
        if each.path in seen or any(_is_found(each.path, folder) for folder in folders):
            continue
        seen.add(each.path)
        if each.kind == "folder":
            folders.append(each.path)
        yield each


def _is_found(path: str, folder: str) -> bool:
    """Whether a search of a folder comes to a path: neither it nor a folder on the way is hidden or a link."""
    if not path.startswith(os.path.join(folder, "")):
        return False
    parts = os.path.relpath(path, folder).split(os.sep)
    steps = [os.path.join(folder, *parts[: end + 1]) for end in range(len(parts) - 1)]
    steps += [path] if os.path.isdir(path) else []
    return not any(part.startswith(".") for part in parts) and not any(map(os.path.islink, steps))


def _expanded(name: str) -> Iterator[_Named]:
    """What a name stands for."""
    if not name:
        raise InputError(f"an input without a name: {_READ}")
    if is_url(name):
        file_system(name)
    elif os.path.lexists(name):  # a name that has braces or stars itself
        yield _named(name, name)
        return
    try:
        patterns = list(braceexpand(name)) if "{" in name else [name]
    except ValueError:
        raise InputError(f"{printable(name)}: a brace without its other one") from None
    for pattern in patterns:
        if not ("*" in pattern if is_url(pattern) else glob.has_magic(pattern)):
            yield _named(pattern, name)
            continue
        matches = _matches(pattern)
        if not matches:
            raise InputError(f"{printable(pattern)}: no file has such a name")
        yield from (_named(match, name) for match in matches)


def _matches(pattern: str) -> list[str]:
    """The sorted names that a pattern fits."""
    if not is_url(pattern):
        return sorted(glob.iglob(pattern, recursive=True))
    system, inside = file_system(pattern)
    try:
        return sorted(system.unstrip_protocol(path) for path in system.glob(inside))
    except Exception as error:  # file systems raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{printable(pattern)}: cannot be searched ({reason})") from None


def _named(given: str, pattern: str) -> _Named:
    path = absolute(given)
    kind: str | None = kind_of(given)
    if not is_url(path):
        if os.path.isdir(path):
            kind = "data set" if is_saved(path) else "folder"
        elif kind is None and os.path.lexists(path) and not os.path.splitext(path)[1]:
            kind = "image"  # its content decides
        elif kind is None and not os.path.lexists(path):
            raise InputError(f"{printable(given)}: no such file or folder")
    if kind is None:
        raise InputError(f"{printable(given)}: no input by its name: {_READ}")
    return _Named(given if is_url(given) else str(Path(given)), path, kind, pattern)
