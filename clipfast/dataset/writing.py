"""Writing a collection so that every state of it, in memory and on disk, is one to go on with.

In memory: a batch is added to a copy of the moments, and one assignment makes copy, images and contributions count
(:meth:`CollectionWriter.add`). An exception anywhere before it, Ctrl-C included, leaves the state before the batch.

On disk: new files are written first, ``collection.json`` last (:meth:`CollectionWriter.flush`). Until it is replaced,
the old one names the old files, which are still there.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

import xxhash
from filelock import FileLock, Timeout

from clipfast import storage
from clipfast.analyses.moments import Moments
from clipfast.contributions import Contributions
from clipfast.dataset.collection import (
    HEADER,
    IMAGES,
    Entry,
    Header,
    is_collection,
    read_entries,
    read_moments,
)
from clipfast.dataset.store import ShardWriter
from clipfast.errors import InputError
from clipfast.files import write_text

LOCK = ".lock"
_SECONDS = 300.0
"""Between two times that everything is written: what a killed process loses at most."""
_OWN_FILES = re.compile(r"(contributions|moments)-\d{5,}\.safetensors|\.clipfast-[0-9a-f]{16}\.part")


@dataclass(frozen=True)
class Failure:
    """An image, or a path of the command line, that is not in the collection.

    Attributes:
        file: its name for messages.
        error: why.
        path: its file or shard, from the root of the file system.
        member: its name in the shard, empty for a file of its own.
    """

    file: str
    error: str
    path: str
    member: str = ""

    @classmethod
    def of(cls, entry: Entry, error: str) -> "Failure":
        """The failure of an image."""
        return cls(entry.file, error, entry.path, entry.member)

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the image."""
        return self.path, self.member


@dataclass(frozen=True)
class _State:
    """What counts of the lists that only grow.

    Attributes:
        moments: of the images that count; never changed.
        count: entries that count.
        waiting: batches of contributions in memory that count.
        position: images of the pass that were taken.
        failed: images that could not be read, by path and member.
    """

    moments: Moments
    count: int
    waiting: int
    position: int
    failed: Mapping[tuple[str, str], Failure]


@dataclass(frozen=True)
class _Written:
    """The header on disk, and the checksum of the list of images that it counts, to go on with."""

    header: Header
    list_checksum: Any


class CollectionWriter:
    """Writes a collection, or goes on with one that is there. Use it in a ``with`` block: it locks the folder.

    Args:
        folder: an existing folder.
        settings: what the result depends on; a pass with others is refused. Values are those of JSON.
        keep: whether contributions are kept, or moments alone.
        moments: empty ones of the model.
        descriptions: what a setting is called where it differs, for messages; its name and both values by default.

    Attributes:
        entries: images that are in, those of earlier passes too.
        position: how many images of the pass were taken, those that failed too.
        failed: images that could not be read.

    Raises:
        InputError: another process writes to the folder; or it holds a collection with other settings, a damaged one,
            or results of another command.
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        keep: bool,
        moments: Moments,
        descriptions: Mapping[str, str] | None = None,
    ) -> None:
        self._folder, self._keep = folder, keep
        self._settings = json.loads(json.dumps(settings))  # as it is compared with what is read
        self._descriptions = descriptions or {}
        self._lock = _locked(folder)
        try:
            self._open(moments)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, moments: Moments) -> None:
        header = Header(self._settings)
        self._entries: list[Entry] = []
        if is_collection(self._folder):
            header = Header.read(self._folder)
            self._refuse_other_settings(header.settings)
            if header.moments is not None:
                moments = read_moments(self._folder, header, moments.backend)
                self._entries = read_entries(self._folder, header)
        else:
            _refuse_other_results(self._folder)
            write_text(self._folder / HEADER, header.to_json())  # first: it says whose the files are that follow
        self._remove_leftovers(header)
        self._shards = ShardWriter(self._folder, header.shards)
        with storage.as_damage(self._folder / HEADER):
            failures = [Failure(**failure) for failure in header.failed]
        failed = {failure.key: failure for failure in failures}
        self._state = _State(moments, len(self._entries), 0, header.position, failed)
        self._written = _Written(header, xxhash.xxh3_128(_lines(self._entries)))
        self._since = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    @property
    def entries(self) -> list[Entry]:
        """Images that are in."""
        return self._entries[: self._state.count]

    @property
    def position(self) -> int:
        """How many images of the pass were taken."""
        return self._state.position

    @property
    def failed(self) -> list[Failure]:
        """Images that could not be read."""
        return list(self._state.failed.values())

    @property
    def moments(self) -> Moments:
        """Of all images that are in; not to be changed."""
        return self._state.moments

    def _refuse_other_settings(self, settings: Mapping[str, Any]) -> None:
        reasons = []
        for name, value in self._settings.items():
            if settings.get(name) != value:
                known = self._descriptions.get(name)
                reasons.append(known or f"images collected with {name} {settings.get(name)!r}, not {value!r}")
        if reasons:
            raise InputError(f"{self._folder} holds {'; '.join(reasons)}: give another folder")

    def _remove_leftovers(self, header: Header) -> None:
        """Removes files that a killed writer left and the header does not name; this process has the lock."""
        named = {shard.file for shard in header.shards}
        if header.moments is not None:
            named.add(header.moments[0])
        for path in list(self._folder.iterdir()):
            if _OWN_FILES.fullmatch(path.name) and path.name not in named and not path.is_dir():
                path.unlink(missing_ok=True)

    def add(
        self,
        entries: Sequence[Entry],
        contributions: Contributions | None,
        failed: Sequence[Failure] = (),
        position: int | None = None,
    ) -> None:
        """Takes a batch: all of it or, when this raises, nothing.

        Args:
            entries: images with contributions, in their order.
            contributions: of these images; None where there are none.
            failed: images of the batch that could not be read. One that failed before is listed once.
            position: how many images of the pass are taken with this batch; None where that does not change.

        Raises:
            InputError: contributions that do not fit the others, or that are not finite.
        """
        state = self._state
        del self._entries[state.count :]  # what an addition that failed left behind
        self._shards.drop(state.waiting)
        moments = state.moments
        if contributions is not None:
            moments = copy(moments)  # an update replaces what it holds, so the state's own do not change
            moments.update(contributions)
            moments.settle()  # before anything is listed or written: the list and the sums are of the same images
            if self._keep:
                places = self._shards.add(contributions)
                entries = [
                    replace(entry, shard=shard, row=row) for entry, (shard, row) in zip(entries, places, strict=True)
                ]
            self._entries.extend(entries)
        failures = state.failed
        if failures or failed:
            taken = {(entry.path, entry.member) for entry in entries}
            failures = {key: failure for key, failure in failures.items() if key not in taken}
            failures |= {failure.key: failure for failure in failed}
        self._state = _State(
            moments,
            len(self._entries),
            self._shards.waiting,
            state.position if position is None else position,
            failures,
        )

    def replace_failures(self, failed: Sequence[Failure]) -> None:
        """Lists these failures in place of all others."""
        self._state = replace(self._state, failed={failure.key: failure for failure in failed})

    @property
    def is_due(self) -> bool:
        """Whether enough waits in memory, or long enough, to be written."""
        return self._shards.is_full or monotonic() - self._since > _SECONDS

    def flush(self, *, complete: bool) -> None:
        """Writes everything, the header last. When this raises, the collection on disk is the one before.

        Raises:
            OSError: a file cannot be written.
        """
        state, written = self._state, self._written
        self._shards.drop(state.waiting)
        self._shards.flush()
        self._state = state = replace(state, waiting=0)
        header = replace(
            written.header,
            count=state.count,
            position=state.position,
            complete=complete,
            shards=self._shards.shards,
            failed=tuple(asdict(failure) for failure in state.failed.values()),
        )
        checksum = written.list_checksum
        if state.count != written.header.count:
            lines = _lines(self._entries[written.header.count : state.count])
            size = self._append(lines)
            checksum = checksum.copy()
            checksum.update(lines)
            path = self._new_moments_path()
            state.moments.save(path)
            moments = (path.name, storage.file_checksum(path))
            header = replace(header, images=(size, checksum.hexdigest()), moments=moments)
        if header != written.header:
            write_text(self._folder / HEADER, header.to_json())
        self._written = _Written(header, checksum)
        self._since = monotonic()
        old_moments = written.header.moments
        if old_moments is not None and old_moments != header.moments:
            (self._folder / old_moments[0]).unlink(missing_ok=True)

    def _append(self, lines: bytes) -> int:
        """Writes to the list of images behind those that the header counts; returns the bytes that count then."""
        start = self._written.header.images[0]
        path = self._folder / IMAGES
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            with open(os.open(path, flags, 0o666), "r+b") as file:
                file.seek(start)
                file.write(lines)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
        return start + len(lines)

    def _new_moments_path(self) -> Path:
        moments = self._written.header.moments
        number = 0 if moments is None else int(moments[0].removesuffix(".safetensors").rpartition("-")[2])
        while True:  # no file of that name, whatever an earlier flush left
            number += 1
            path = self._folder / f"moments-{number:05d}.safetensors"
            if not os.path.lexists(path):
                return path


def _lines(entries: Sequence[Entry]) -> bytes:
    """A line of JSON per image, in ASCII: names may hold line separators, and bytes that are not UTF-8."""
    return "".join(f"{json.dumps(asdict(entry))}\n" for entry in entries).encode("ascii")


def _locked(folder: Path) -> FileLock:
    """A lock on the folder that the system releases when the process ends, however it ends."""
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{folder} is being written by another process: wait until it is done, or give another folder"
        ) from None
    return lock


def _refuse_other_results(folder: Path) -> None:
    results = sorted(path.name for path in folder.iterdir() if _OWN_FILES.fullmatch(path.name))
    results = [name for name in results if name.endswith(".safetensors")]
    if results:
        raise InputError(
            f"{folder} holds results of another command, which would be overwritten ({results[0]}): give another folder"
        )
