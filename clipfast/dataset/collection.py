"""What one pass over many images leaves on disk, to read: moments, every image's contributions, labels.

A collection is a folder with

* ``collection.json``: the model, what was kept, which images failed, whether the pass is complete, and the names and
  checksums of the other files;
* ``moments-00001.safetensors``: :class:`~clipfast.analyses.moments.Moments` of all images;
* ``images.jsonl``: a line per image: file, name, label, group, and where its contributions are;
* ``contributions-00000.safetensors`` and so on, unless only moments were kept.

``collection.json`` is written last and replaced as a whole, and the files that it names are never changed: they are new
files, or longer ones of which it counts a part. So it describes a whole state of the pass at any time, also when the
writer was killed or the disk was full (:mod:`clipfast.dataset.writing`). Everything it says is checked on reading.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from clipfast import storage
from clipfast.analyses.moments import Moments
from clipfast.contributions import Contributions
from clipfast.dataset.files import Identity, Source, found_again
from clipfast.dataset.labels import Labels
from clipfast.dataset.store import Shard
from clipfast.errors import InputError
from clipfast.inputs import printable

FORMAT = "clipfast.collection/4"
HEADER, IMAGES = "collection.json", "images.jsonl"
_CHECKSUM = "checksum"
_SHOWN = 3

logger = logging.getLogger("clipfast")


@dataclass(frozen=True)
class Entry:
    """One image of a collection.

    Attributes:
        file: the image as the user named it.
        name: a file name without suffix, different for every image.
        path: the image's file, or the tar shard it is in, from the root of the file system.
        key: its sample's name in the tar shard, empty for a file of its own.
        member: its own name in the tar shard, empty for a file of its own.
        size: bytes of the file or the shard when it was read.
        modified_ns: when the file or the shard was last written before it was read, in nanoseconds since 1970.
        folder: the folder that was searched, None for a file that was named itself.
        label: its label, None where there is none.
        group: its group, None where there is none.
        shard: the file with its contributions, None where only moments were kept.
        row: its row in that file.
    """

    file: str
    name: str
    path: str
    key: str = ""
    member: str = ""
    size: int | None = None
    modified_ns: int | None = None
    folder: str | None = None
    label: str | None = None
    group: str | None = None
    shard: str | None = None
    row: int = 0

    @classmethod
    def of(cls, source: Source) -> "Entry":
        """The image of a source, without labels."""
        folder = None if source.folder is None else os.path.abspath(source.folder)
        path, member, size, modified_ns = source.identity()
        return cls(str(source), source.name, path, source.key, member, size, modified_ns, folder)

    @property
    def identity(self) -> Identity:
        """What identifies the image that was read."""
        return Identity(self.path, self.member, self.size, self.modified_ns)


@dataclass(frozen=True)
class Header:
    """Contents of ``collection.json``.

    Attributes:
        settings: what the pass depends on: the model, its weights, the images, what is kept.
        count: images that are in.
        position: how many images of the pass were taken, those that failed too.
        complete: whether the pass came to its end.
        images: bytes and checksum of the part of ``images.jsonl`` that counts.
        moments: file name and checksum of the moments, None before the first image.
        shards: the files of contributions.
        failed: file and reason of every image that could not be read.
    """

    settings: Mapping[str, Any]
    count: int = 0
    position: int = 0
    complete: bool = False
    images: tuple[int, str] = (0, storage.checksum(b""))
    moments: tuple[str, str] | None = None
    shards: tuple[Shard, ...] = ()
    failed: tuple[Mapping[str, str], ...] = ()

    def to_json(self) -> str:
        """The text of the file, with its own checksum."""
        content = {
            "format": FORMAT,
            "complete": self.complete,
            "count": self.count,
            **self.settings,
            "position": self.position,
            "images.jsonl": {"bytes": self.images[0], _CHECKSUM: self.images[1]},
            "moments": None if self.moments is None else {"file": self.moments[0], _CHECKSUM: self.moments[1]},
            "shards": [{"file": shard.file, "rows": shard.rows, _CHECKSUM: shard.checksum} for shard in self.shards],
            "failed": list(self.failed),
        }
        return json.dumps({**content, _CHECKSUM: _content_checksum(content)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Header":
        """Reads the header of a collection.

        Raises:
            InputError: no collection, one of another version, or a damaged header.
        """
        path = folder / HEADER
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{folder} is no collection: it has no {HEADER}, see `clipfast stats`") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is damaged: it is not JSON ({type(error).__name__})") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path} is not one that this version's `clipfast stats` wrote: collect the images again")
        expected = content.pop(_CHECKSUM, None)
        if _content_checksum(content) != expected:
            raise InputError(f"{path} is damaged or was edited: its checksum does not match")
        with storage.as_damage(path):
            return cls._of(content)

    @classmethod
    def _of(cls, content: dict[str, Any]) -> "Header":
        del content["format"]
        images, moments = content.pop(IMAGES), content.pop("moments")
        return cls(
            count=content.pop("count"),
            position=content.pop("position"),
            complete=content.pop("complete"),
            images=(images["bytes"], images[_CHECKSUM]),
            moments=None if moments is None else (moments["file"], moments[_CHECKSUM]),
            shards=tuple(Shard(shard["file"], shard["rows"], shard[_CHECKSUM]) for shard in content.pop("shards")),
            failed=tuple(content.pop("failed")),
            settings=content,
        )


def _content_checksum(content: Mapping[str, Any]) -> str:
    return storage.checksum(json.dumps(content, sort_keys=True).encode())


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
        unfinished: whether one whose pass did not come to its end is read too.

    Attributes:
        folder: where it is.
        header: settings of the pass, and ``complete``, ``count`` and ``failed`` of ``collection.json``.
        moments: of all its images.
        entries: its images, in order.

    Raises:
        InputError: no collection, an unfinished one, or a damaged one.
    """

    def __init__(self, folder: Path, *, unfinished: bool = False) -> None:
        self.folder = folder
        header, self.moments, self.entries = _read_all(folder, unfinished)
        self._shards = {shard.file: shard for shard in header.shards}
        self.header: dict[str, Any] = {
            **header.settings,
            "complete": header.complete,
            "count": header.count,
            "failed": list(header.failed),
        }

    @property
    def complete(self) -> bool:
        """Whether the pass came to its end."""
        return bool(self.header["complete"])

    def sources(self) -> list[Source]:
        """The images themselves, in order. One that is gone raises when it is opened; changed ones give a warning."""
        places = [
            Source(Path(entry.path), entry.name, None if entry.folder is None else Path(entry.folder), entry.key)
            for entry in self.entries
        ]
        sources = found_again(places)
        changed = changed_images(self.entries, [source.identity() for source in sources])
        if changed:
            logger.warning(
                "%s: %d images have changed since they were collected (%s)", self.folder, len(changed), shown(changed)
            )
        return sources

    def batches(self) -> Iterator[tuple[Sequence[Entry], Contributions]]:
        """The images with their contributions, a file at a time, in order.

        Raises:
            InputError: only moments were kept, or a file is gone, damaged, or not the one that the pass wrote.
        """
        for file, group in groupby(self.entries, lambda entry: entry.shard):
            if file is None:
                raise InputError(f"{self.folder} holds moments only: collect the images again with their contributions")
            entries, path, shard = list(group), self.folder / file, self._shards.get(file)
            if not path.is_file():
                raise InputError(f"{path} is gone: collect the images again")
            contributions = Contributions.load(path)
            if shard is None or storage.file_checksum(path) != shard.checksum:
                raise InputError(f"{path} is not the file that this pass wrote: collect the images again")
            if [entry.row for entry in entries] != list(range(len(contributions))):
                raise InputError(f"{path} has {len(contributions)} rows, {IMAGES} names others: collect them again")
            yield entries, contributions


def _read_all(folder: Path, unfinished: bool) -> tuple[Header, Moments, list[Entry]]:
    """Header, moments and images of one state, also while a pass replaces it by the next."""
    while True:
        header = Header.read(folder)
        if header.moments is None:
            raise InputError(f"{folder} holds a pass that was stopped before any image: run it again")
        if not (header.complete or unfinished):
            of = f" of {header.settings['sources']}" if "sources" in header.settings else ""
            raise InputError(
                f"{folder} holds an unfinished pass with {header.count}{of} images: run the command that began it once "
                "more to finish it"
            )
        try:
            return header, read_moments(folder, header), read_entries(folder, header)
        except (InputError, FileNotFoundError):
            if Header.read(folder) == header:
                raise


def changed_images(entries: Sequence[Entry], identities: Sequence[Identity]) -> list[Entry]:
    """Images whose files were written again since they were read; files that are gone do not count."""
    return [
        entry
        for entry, now in zip(entries, identities, strict=True)
        if now.size is not None and (now.size, now.modified_ns) != (entry.size, entry.modified_ns)
    ]


def shown(entries: Sequence[Entry]) -> str:
    """Some of the images by name, for messages."""
    return ", ".join(printable(entry.file) for entry in entries[:_SHOWN]) + (", …" if len(entries) > _SHOWN else "")


def read_moments(folder: Path, header: Header, backend: str = "auto") -> Moments:
    """The moments that a header names.

    Raises:
        InputError: they are gone, damaged, or not those that the pass wrote.
    """
    assert header.moments is not None
    path = folder / header.moments[0]
    if not path.is_file():
        raise InputError(f"{path} is gone: collect the images again")
    moments = Moments.load(path, backend=backend)
    if storage.file_checksum(path) != header.moments[1]:
        raise InputError(f"{path} is not the file that this pass wrote: collect the images again")
    if moments.count != header.count:
        raise InputError(f"{path} holds {moments.count} images, {HEADER} counts {header.count}: collect them again")
    return moments


def read_entries(folder: Path, header: Header) -> list[Entry]:
    """The images that a header counts.

    Raises:
        InputError: the list is gone, shorter than the header says, or was edited.
    """
    path, (size, checksum) = folder / IMAGES, header.images
    try:
        with path.open("rb") as file:
            data = file.read(size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) < size or storage.checksum(data) != checksum:
        raise InputError(f"{path} is damaged or was edited: its checksum does not match")
    with storage.as_damage(path):
        entries = [Entry(**json.loads(line)) for line in data.decode("ascii").split("\n")[:-1]]
    if len(entries) != header.count:
        raise InputError(f"{path} names {len(entries)} images, {HEADER} counts {header.count}: collect them again")
    return entries
