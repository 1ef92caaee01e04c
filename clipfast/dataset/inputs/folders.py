"""Folder trees: image files, and the shards and tables in them.

A tree is walked one folder at a time, each in the order of its names, so that memory holds the names of the folders on
the way to one folder and of one range of files, whatever the size of the tree.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from clipfast.dataset.inputs.endings import TABLES, kind_of
from clipfast.dataset.inputs.files import file_units, read_files
from clipfast.dataset.inputs.locations import Naming
from clipfast.dataset.inputs.reading import Reading
from clipfast.dataset.inputs.rows import Selection
from clipfast.dataset.inputs.tables import TableInput, form_of
from clipfast.dataset.inputs.tars import read_shard, shard_units
from clipfast.dataset.notes import Notes
from clipfast.dataset.plan import Unit, UnitError
from clipfast.errors import InputError
from clipfast.images import SUFFIXES
from clipfast.inputs import printable

_SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class FolderInput:
    """A folder that is searched, with all folders in it.

    Hidden files and folders are skipped, and links to folders are not followed.

    Attributes:
        name: what the user called it.
        folder: its absolute path.
        skip: a folder whose files are results, not images; None for none.
        taken: absolute paths of files and folders that are other inputs of the same pass.
        selection: the columns of tables in it. Only tables that hold the images themselves are read.
    """

    name: str
    folder: str
    skip: str | None = None
    taken: frozenset[str] = frozenset()
    selection: Selection = field(default_factory=Selection)
    _notes: Notes = field(default_factory=Notes, compare=False)
    _problems: list[str] = field(default_factory=list, compare=False)

    def notes(self) -> list[str]:
        """What was left out when its units were listed: a line for each reason, with a count and examples."""
        return self._notes.lines()

    def problems(self) -> list[str]:
        """What could not be read when its units were listed, one line each."""
        return list(self._problems)

    def units(self, size: int) -> Iterator[Unit]:
        """Ranges of at most ``size`` image files, and a unit for each shard, in the order of the walk."""
        self._notes.counts.clear()
        self._notes.names.clear()
        self._problems.clear()
        files: list[str] = []
        start = found = 0
        for path in self._walk():
            found += 1
            kind = kind_of(path)
            if kind == "shard":
                yield from shard_units([path], self.folder)
                continue
            if kind == "table":
                yield from self._table(path).units(size)
                continue
            files.append(path)
            if len(files) == size:
                yield self._range(files, start)
                start += len(files)
                files = []
        if files:
            yield self._range(files, start)
        if not found:
            looked = " ".join(sorted({*SUFFIXES, ".tar", *TABLES}))
            self._problems.append(f"{printable(self.name)}: no images in this folder (looked for {looked})")

    def _range(self, files: list[str], start: int) -> Unit:
        [unit] = file_units(files, len(files), self.folder)
        return Unit("files", unit.path, start, start + len(files), folder=self.folder, files=unit.files)

    def read(self, unit: Unit) -> Reading:
        """The samples of a range of files, or of a shard.

        Raises:
            UnitError: a shard that is missing, cannot be read or is damaged; samples given before count.
        """
        return self._read(unit, content=True)

    def names(self, unit: Unit) -> Reading:
        """The same samples without bytes and columns."""
        return self._read(unit, content=False)

    def _read(self, unit: Unit, *, content: bool) -> Reading:
        naming = Naming.below(self.name)
        if unit.kind == "table":
            table = self._table(unit.path)
            return table.read(unit) if content else table.names(unit)
        if unit.kind == "shard":
            return read_shard(unit, naming, content=content)
        return read_files(unit, naming, content=content)

    def _table(self, path: str) -> TableInput:
        name = Naming.below(self.name).name(path)
        return TableInput(name, path, self.folder, self.selection, self.folder)

    def _is_input(self, name: str, path: str, beside: set[str]) -> bool:
        """Whether a file is read; what is left out is noted."""
        kind = kind_of(name)
        if kind in ("image", "shard"):
            return True
        shown = Naming.below(self.name).name(path)
        if kind != "table":
            self._notes.add("files with other endings than images and shards have", shown)
        elif {f"{os.path.splitext(name)[0]}{ending}" for ending in _SHARD_ENDINGS} & beside:
            self._notes.add("tables beside a shard of the same name", shown)
        else:
            try:
                if form_of(path, shown, self.selection) != "path":
                    return True
                self._notes.add("tables of paths (they are read when they are named themselves)", shown)
            except InputError:
                self._notes.add("tables without a column of images", shown)
            except UnitError as error:
                self._problems.append(str(error))
        return False

    def _walk(self) -> Iterator[str]:
        """Absolute paths of images and shards: those in a folder before those in the folders in it."""
        skip = None if self.skip is None else os.path.realpath(self.skip)
        below = Naming.below(self.name)
        waiting = [self.folder]
        while waiting:
            folder = waiting.pop()
            if skip is not None and _leads_into(folder, skip):
                continue
            try:
                listing = _list(folder)
            except OSError as error:
                self._problems.append(f"{printable(below.name(folder))}: {error.strerror}")
                continue
            for name in listing.links:
                self._notes.add("links to folders", below.name(os.path.join(folder, name)))
            beside = {name for name in listing.files if kind_of(name) == "shard"}
            for name in listing.files:
                path = os.path.join(folder, name)
                if path in self.taken or (skip is not None and name in listing.linked and _leads_into(path, skip)):
                    continue
                if self._is_input(name, path, beside):
                    yield path
            inner = (os.path.join(folder, name) for name in reversed(listing.folders))
            waiting += [path for path in inner if path not in self.taken]


class _Listing(NamedTuple):
    """The sorted names in a folder, without hidden ones.

    Attributes:
        files: all that is no folder.
        folders: those that are no links.
        links: the links to folders.
        linked: the names in ``files`` that are links.
    """

    files: list[str]
    folders: list[str]
    links: list[str]
    linked: set[str]


def _list(folder: str) -> _Listing:
    listing = _Listing([], [], [], set())
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            is_link = entry.is_symlink()
            if _is_folder(entry):
                (listing.links if is_link else listing.folders).append(entry.name)
                continue
            listing.files.append(entry.name)
            if is_link:
                listing.linked.add(entry.name)
    for names in listing[:3]:
        names.sort()
    return listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_into(path: str, folder: str) -> bool:
    """Whether a path is that of a folder or of something in it; ``folder`` has no links."""
    real = os.path.realpath(path)
    return real == folder or real.startswith(os.path.join(folder, ""))
