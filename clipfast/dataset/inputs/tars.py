"""Tar shards: files of this machine, brace lists, globs and URLs, in any compression that fsspec knows.

A shard is read once, forward. Its members are put together to samples by webdataset: those that lie beside each other
and have the same name up to the first dot of their last part, ``000001.jpg`` with ``000001.txt``. Where no member has
an image ending right after that dot, but some have one further on (``photo.v2.png``), each of those images is a sample
of its own, named up to its ending: ``photo.v2``.

One sample is in memory at a time. Members that are neither images nor sidecars are not read.
"""

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from webdataset.tariterators import group_by_keys

from clipfast.dataset.inputs.archives import Archive, CutMemberError
from clipfast.dataset.inputs.locations import MAX_IMAGE_BYTES, Naming, Version, ahead, is_url, open_unit, version
from clipfast.dataset.inputs.reading import Reading, Samples
from clipfast.dataset.inputs.sidecars import MAX_SIDECAR_BYTES, SIDECARS, sidecar_columns
from clipfast.dataset.inputs.streams import Forward
from clipfast.dataset.plan import Unit, UnitError
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.dataset.shards import MASK_KINDS
from clipfast.images import SUFFIXES
from clipfast.inputs import printable

_HELD_BYTES = 64 << 20
"""The most bytes of images with further dots in their names that wait for one without."""


@dataclass(frozen=True)
class ShardInput:
    """Tar shards, a unit each.

    Attributes:
        name: what the user called them.
        shards: their absolute paths and URLs, in order.
        naming: gives the shards the names that the user gives them.
    """

    name: str
    shards: tuple[str, ...]
    naming: Naming = field(default_factory=Naming)

    def units(self, size: int) -> Iterator[Unit]:
        """A unit for each shard, whatever its size; one that is not there has one too."""
        return shard_units(self.shards)

    def read(self, unit: Unit) -> Reading:
        """The samples of a shard. Its :meth:`~Reading.source` has the checksum of its bytes.

        Raises:
            UnitError: the shard is missing, cannot be read or is damaged; samples given before count.
        """
        return read_shard(unit, self.naming)

    def names(self, unit: Unit) -> Reading:
        """The same samples without images and columns; of a local uncompressed shard only the headers are read."""
        return read_shard(unit, self.naming, content=False)


def shard_units(shards: Sequence[str], folder: str | None = None) -> Iterator[Unit]:
    """A unit for each shard; the versions of remote ones are asked for in several threads."""
    remote = any(map(is_url, shards))
    versions: Iterator[Version] = ahead(version, shards) if remote else map(version, shards)
    for shard, have in zip(shards, versions, strict=True):
        yield Unit("shard", shard, size=have.size, version=have.version, folder=folder)


def read_shard(unit: Unit, naming: Naming, *, content: bool = True) -> Reading:
    """The samples of a shard; see :class:`ShardInput`.

    Args:
        unit: the shard.
        naming: gives the shard the name that ids begin with.
        content: whether images and columns are read.
    """
    return Reading(lambda reading: _Shard(unit, naming.name(unit.path), content, reading).samples())


@dataclass
class _Member:
    """A member on its way to its sample.

    Attributes:
        path: its name in the shard.
        key: the name of its sample.
        ending: what follows the key, without the dot.
        data: its bytes, None where they were not read.
        failure: why not, where it should have been.
        part: which part of a group that is too large to be held.
    """

    path: str
    key: str
    ending: str
    data: bytes | None = field(default=None, repr=False)
    failure: Failure | None = None
    part: int = 0


def split_name(path: str) -> tuple[str, str]:
    """A member's key and ending."""
    pure = PurePosixPath(path)
    stem, _, ending = pure.name.partition(".")
    return str(pure.with_name(stem)), ending


def is_image(ending: str) -> bool:
    """Whether a member's ending is that of an image, masks apart: ``png``, ``v2.png``, not ``mask.png``."""
    kind, _, last = ending.lower().rpartition(".")
    return f".{last}" in SUFFIXES and kind not in MASK_KINDS


def _is_direct(ending: str) -> bool:
    return f".{ending.lower()}" in SUFFIXES


class _Shard:
    """One reading of a shard."""

    def __init__(self, unit: Unit, name: str, content: bool, reading: Reading) -> None:
        self._unit, self._name, self._content = unit, name, content
        self._reading, self._notes = reading, reading.notes
        self._version = version(unit.path)
        self._finished: set[str] = set()  # keys of samples that were given
        self._beside: list[Sample] = []  # failures to be given after the sample
        self._member = _Member("", "", "")  # the last that was handed to webdataset
        self._count = 0
        self._damage: tarfile.TarError | UnitError | None = None
        self._cut: str | None = None  # the key of the sample that the damage is in

    def samples(self) -> Samples:
        path = self._unit.path
        stream = Forward(open_unit(path, self._name), self._name, seeks=not self._content)
        try:
            size = self._version.size if stream.compression is None else None
            for group in group_by_keys(
                self._members(Archive(stream, size)), keys=_group_of, lcase=False, handler=self._repeated
            ):
                yield from self._group(group)
            yield from self._failures()
            if self._damage is None and self._content and stream.finish():
                self._damage = tarfile.ReadError("more data after its end mark: are there several archives in it?")
            self._raise_damage()
            if self._content:
                self._finish(stream)
        finally:
            stream.close()

    def _finish(self, stream: Forward) -> None:
        now = version(self._unit.path)
        if now != self._version and not is_url(self._unit.path):
            raise UnitError("damaged", f"{printable(self._name)}: it was changed while it was read: read it again")
        self._reading.read_from = {
            "path": self._unit.path,
            "size": stream.size,
            "version": self._version.version,
            "checksum": stream.checksum,
        }

    def _raise_damage(self) -> None:
        error, name = self._damage, printable(self._name)
        if isinstance(error, UnitError):
            after = f", after {self._count} samples" if self._count else ""
            raise UnitError(error.kind, f"{error}{after}")
        if error is not None:
            hint = "" if self._count or isinstance(error, CutMemberError) else " (is it a tar file?)"
            raise UnitError("damaged", f"{name}: not a whole tar file after {self._count} samples: {error}{hint}")

    def _members(self, archive: Archive) -> Iterator[dict[str, Any]]:
        """The members as webdataset takes them. At damage the iteration ends; the damage is kept for later."""
        try:
            for member in self._read(archive):
                self._member = member
                yield {"fname": member, "data": member, "__url__": self._unit.path}
        except (tarfile.TarError, UnitError) as error:
            self._damage = error
            self._cut = None if archive.inside is None else split_name(archive.inside)[0]

    def _read(self, archive: Archive) -> Iterator[_Member]:
        last = _Member("", "", "")
        held, has_direct = 0, False
        for info in archive.members():
            key, ending = split_name(info.name)
            if not info.isreg() or info.issparse():
                self._irregular(info.name, key, ending)
                continue
            member = _Member(info.name, key, ending)
            if key == last.key:
                member.part = last.part
            else:
                held, has_direct = 0, False
            has_direct = has_direct or _is_direct(ending)
            if is_image(ending) and (_is_direct(ending) or not has_direct):
                if not _is_direct(ending):
                    held += info.size
                    if held > _HELD_BYTES:
                        held, member.part = info.size, member.part + 1
                self._load(archive, info, member, MAX_IMAGE_BYTES)
            elif ending.lower().rpartition(".")[2] in SIDECARS and not self._load(
                archive, info, member, MAX_SIDECAR_BYTES
            ):
                self._notes.add("sidecars of more than 16 MiB", f"{self._name}:{info.name}")
            last = member
            yield member

    def _load(self, archive: Archive, info: tarfile.TarInfo, member: _Member, limit: int) -> bool:
        """Reads a member; False for one that is too large, which then has a failure."""
        if info.size > limit:
            member.failure = Failure(Status.TOO_LARGE, f"{printable(self._id(member.path))}: {info.size} bytes")
            return False
        if self._content:
            member.data = archive.content(info)
        return True

    def _irregular(self, path: str, key: str, ending: str) -> None:
        if _is_direct(ending) or is_image(ending):
            reason = f"{printable(self._id(path))}: a link or a special file, not a regular file"
            self._beside.append(self._failed(path, key, Status.UNREADABLE, reason))
        else:
            self._notes.add("tar members that are no regular files", self._id(path))

    def _repeated(self, error: Exception) -> bool:
        """What webdataset calls for a member whose name occurs again: the first one counts."""
        member = self._member
        if is_image(member.ending):
            reason = f"{printable(self._id(member.path))}: its name occurs again, the first image of this name counts"
            self._beside.append(self._failed(member.path, member.key, Status.DUPLICATE, reason))
        else:
            self._notes.add("tar members whose name occurs again (the first is read)", self._id(member.path))
        return True

    def _failures(self) -> Iterator[Sample]:
        failures, self._beside = self._beside, []
        yield from failures

    def _group(self, group: Mapping[str, Any]) -> Iterator[Sample]:
        """The samples of members that webdataset put together."""
        members = {name[1:]: each for name, each in group.items() if isinstance(each, _Member)}
        first = next(iter(members.values()))
        if first.key == self._cut:
            return  # what it lacks is not known
        if first.part == 0 and first.key in self._finished:
            self._notes.add("samples whose members lie apart (sort the archive by name)", self._id(first.key))
        self._finished.add(first.key)
        lower: dict[str, _Member] = {}
        for ending, member in members.items():
            if ending.lower() not in lower:
                lower[ending.lower()] = member
            elif _is_direct(ending) or not is_image(ending):
                self._member = member
                self._repeated(ValueError())
        image = next((ending for ending in lower if _is_direct(ending)), None)
        dotted = [ending for ending in members if is_image(ending)]
        if image is not None:
            yield self._sample(first.key, lower, image)
        elif dotted:
            yield from self._dotted(first.key, members, dotted)
        else:
            self._count += 1
            beside = ", ".join(f".{ending}" for ending in members)
            reason = f"{printable(self._id(first.key))}: no image among its members {printable(beside)[:80]}"
            yield self._failed("", first.key, Status.NO_IMAGE, reason)
        yield from self._failures()

    def _dotted(self, key: str, members: Mapping[str, _Member], images: Sequence[str]) -> Iterator[Sample]:
        """A sample per image of a group that has none right after the key."""
        common = {ending.lower(): each for ending, each in members.items() if ending.lower() in SIDECARS}
        for image in images:
            stem, _, last = image.rpartition(".")
            own = {
                ending[len(stem) + 1 :].lower(): each
                for ending, each in members.items()
                if ending.startswith(f"{stem}.")
            }
            yield self._sample(f"{key}.{stem}", {**common, **own}, last.lower())

    def _sample(self, key: str, members: Mapping[str, _Member], image: str) -> Sample:
        self._count += 1
        name = f"{key}.{image}"
        texts = {ending: each.data for ending, each in members.items() if ending in SIDECARS and each.data is not None}
        columns, problems = sidecar_columns(texts)
        for problem in problems:
            self._notes.add(problem, self._id(name))
        for ending in members:
            if ending != image and is_image(ending):
                self._notes.add("images beside another image of the same sample", self._id(f"{key}.{ending}"))
        return Sample(
            self._id(name),
            self._unit.path,
            name,
            key,
            self._unit.folder,
            members[image].data,
            columns,
            self._version.size,
            self._version.modified_ns,
            failure=members[image].failure,
        )

    def _failed(self, member: str, key: str, status: Status, reason: str) -> Sample:
        return Sample(
            self._id(member or key),
            self._unit.path,
            member,
            key,
            self._unit.folder,
            size=self._version.size,
            modified_ns=self._version.modified_ns,
            failure=Failure(status, reason),
        )

    def _id(self, member: str) -> str:
        return f"{self._name}:{member}"


def _group_of(member: _Member) -> tuple[tuple[str, int], str]:
    """What webdataset puts members together by, and what it tells them apart by; no name of its own has a dot."""
    return (member.key, member.part), f".{member.ending}"
