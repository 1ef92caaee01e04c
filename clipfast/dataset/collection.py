"""What one pass over many images leaves behind: moments, each image's contributions, labels. Analyses start from it.

A folder with

* ``collection.json``: the model, what was kept, which images failed, whether the pass is complete;
* ``moments.safetensors``: :class:`~clipfast.analyses.moments.Moments` of all images;
* ``images.jsonl``: a line per image: file, name, label, group, and where its contributions are;
* ``contributions-00000.safetensors`` and so on, unless only moments were wanted.

The moments are written last: an image counts once it is in them, and a pass that ends early, however it ends, is taken
up where they stand.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from time import monotonic
from typing import Any

from clipfast.analyses.moments import Moments
from clipfast.contributions import Contributions
from clipfast.dataset.files import Source, found_again
from clipfast.dataset.labels import Labels
from clipfast.dataset.store import ShardWriter
from clipfast.errors import InputError
from clipfast.files import atomic_write

FORMAT = "clipfast.collection/2"
HEADER, IMAGES, MOMENTS = "collection.json", "images.jsonl", "moments.safetensors"
_SECONDS = 300.0
"""Between two times that everything is written: what a killed process loses at most."""


@dataclass(frozen=True)
class Entry:
    """One image of a collection.

    Attributes:
        file: what the user calls it.
        name: its name, different for every image.
        path: the image's file, or the tar shard it is in, from the root of the file system.
        key: its sample's name in the tar shard, empty for a file of its own.
        folder: the folder that was searched, None for a file that was named itself.
        label: its label, None where there is none.
        group: its group, None where there is none.
        shard: the file with its contributions, None where only moments were kept.
        row: where in that file.
    """

    file: str
    name: str
    path: str
    key: str = ""
    folder: str | None = None
    label: str | None = None
    group: str | None = None
    shard: str | None = None
    row: int = 0

    @classmethod
    def of(cls, source: Source) -> "Entry":
        """The image of a source, without labels."""
        folder = None if source.folder is None else os.path.abspath(source.folder)
        return cls(str(source), source.name, os.path.abspath(source.path), source.key, folder)


def labelled(entries: Sequence[Entry], labels: Labels) -> list[Entry]:
    """The images with these labels, and groups where there are any, in place of those they had."""
    groups = labels.groups or (None,) * len(entries)
    return [
        replace(entry, label=label, group=group)
        for entry, label, group in zip(entries, labels.values, groups, strict=True)
    ]


def is_collection(folder: Path) -> bool:
    """Whether a folder holds a collection, finished or not."""
    return (folder / HEADER).is_file()


def refuse_collection(folder: Path) -> None:
    """For commands whose results would overwrite the files of a collection: call it before the first one is written.

    Raises:
        InputError: the folder holds a collection.
    """
    if is_collection(folder):
        raise InputError(f"{folder} holds a collection, and results here would overwrite it: give another --out")


class Collection:
    """A collection on disk, to read.

    Args:
        folder: where it is.

    Attributes:
        folder: where it is.
        header: contents of ``collection.json``.
        entries: its images, in order.

    Raises:
        InputError: no collection, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = _read_header(folder)
        if not (folder / MOMENTS).is_file():
            raise InputError(f"{folder} holds a pass that was stopped before any image: run it again")
        self.moments = Moments.load(folder / MOMENTS)
        self.entries = _read_entries(folder, self.moments.count)

    def sources(self) -> list[Source]:
        """The images themselves, in order; one that is gone says so when it is opened."""
        places = [
            Source(Path(each.path), each.name, None if each.folder is None else Path(each.folder), each.key)
            for each in self.entries
        ]
        return found_again(places)

    def batches(self) -> Iterator[tuple[Sequence[Entry], Contributions]]:
        """The images with their contributions, a file at a time, in order.

        Raises:
            InputError: only moments were kept, or a file is gone or damaged.
        """
        for shard, entries in groupby(self.entries, lambda entry: entry.shard):
            if shard is None:
                raise InputError(f"{self.folder} holds moments only: collect the images again with their contributions")
            path = self.folder / shard
            if not path.is_file():
                raise InputError(f"{path} is gone: collect the images again")
            yield list(entries), Contributions.load(path)


class CollectionWriter:
    """Writes a collection, or goes on with one that was not finished.

    Args:
        folder: where; it exists.
        settings: what the result depends on: a pass with others is not continued but refused.
        keep: whether contributions are kept, or moments alone.
        moments: empty ones of the model.

    Attributes:
        entries: images that are in, of earlier passes too.

    Raises:
        InputError: the folder holds a collection with other settings, or a damaged one.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], keep: bool, moments: Moments) -> None:
        self._folder, self._settings, self._keep = folder, dict(settings), keep
        self.moments = moments
        self.entries: list[Entry] = []
        self._failed: list[dict[str, str]] = []
        if is_collection(folder):
            self._resume()
        written = len({entry.shard for entry in self.entries if entry.shard is not None})
        self._writer = ShardWriter(folder, written)
        self._since = monotonic()

    def _resume(self) -> None:
        header = _read_header(self._folder)
        other = [name for name, value in self._settings.items() if header.get(name) != value]
        if other:
            name = other[0]
            if name == "images":  # which is a hash of their names
                raise InputError(f"{self._folder} holds a pass over other images: give another folder")
            raise InputError(
                f"{self._folder} holds images collected with {name} {header.get(name)!r}, "
                f"not {self._settings[name]!r}: give another folder"
            )
        if (self._folder / MOMENTS).is_file():
            self.moments = Moments.load(self._folder / MOMENTS, backend=self.moments.backend)
            self.entries = _read_entries(self._folder, self.moments.count)

    def add(self, entries: Sequence[Entry], found: Contributions) -> None:
        """Takes a batch with its contributions.

        Raises:
            InputError: contributions that do not fit the others, or that are not finite.
            OSError: a file cannot be written.
        """
        self.moments.update(found)
        if self._keep:
            places = self._writer.add(found)
            entries = [
                replace(entry, shard=shard, row=row) for entry, (shard, row) in zip(entries, places, strict=True)
            ]
        self.entries += entries
        if monotonic() - self._since > _SECONDS:
            self.flush(complete=False)

    def fail(self, file: str, reason: str) -> None:
        """Notes an image that could not be read."""
        self._failed.append({"file": file, "error": reason})

    def flush(self, *, complete: bool) -> None:
        """Writes everything.

        Raises:
            OSError: a file cannot be written.
        """
        self._writer.flush()
        header = {"format": FORMAT, "complete": complete, "count": len(self.entries), **self._settings}
        with atomic_write(self._folder / HEADER) as partial:
            partial.write_text(json.dumps({**header, "failed": self._failed}, indent=2) + "\n", encoding="utf-8")
        lines = [json.dumps(asdict(entry), ensure_ascii=False) for entry in self.entries]
        with atomic_write(self._folder / IMAGES) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if self.moments.count:
            with atomic_write(self._folder / MOMENTS) as partial:
                self.moments.save(partial)
        self._since = monotonic()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} is no collection: it has no {HEADER}, see `clipfast stats`") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise InputError(f"{path} is not one that this version's `clipfast stats` wrote: collect the images again")
    return header


def _read_entries(folder: Path, count: int) -> list[Entry]:
    """The first ``count`` images, those that are in the moments."""
    path = folder / IMAGES
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [Entry(**json.loads(line)) for line in lines[:count]]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if len(entries) < count:
        raise InputError(f"{path} names {len(entries)} images, the moments hold {count}: collect them again")
    return entries
