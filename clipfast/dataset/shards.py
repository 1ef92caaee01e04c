"""Tar shards, read in place: one pass over the headers, then every member by its position in the file.

Shards follow the WebDataset convention: members with the same name up to the first dot of their last part are one
sample, ``000001.jpg`` with ``000001.txt``. Where no member has an image ending right after that dot, but some have one
further on (``photo.v2.png``), each of those images is a sample of its own, named up to its ending: ``photo.v2``.
"""

import io
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from clipfast.errors import ImageError
from clipfast.images import SUFFIXES
from clipfast.inputs import open_regular, printable, read_part

MASK_KINDS = ("mask", "seg")
"""What stands before the ending of a member that is a mask: ``000001.mask.png``."""
_SIDECARS = ("cls", "txt", "json")
_MAX_SIDECAR_BYTES = _MAX_METADATA_BYTES = 16 << 20


@dataclass(frozen=True)
class Place:
    """Where a member's bytes are: ``start`` and ``size`` in the shard."""

    start: int
    size: int


@dataclass
class Sample:
    """The members of a shard that belong together.

    Attributes:
        key: their common name.
        members: place by what follows the key, without the dot and in lower case: ``"jpg"``, ``"cls"``.
    """

    key: str
    members: dict[str, Place] = field(default_factory=dict)

    @property
    def image(self) -> str | None:
        """The ending of the sample's image, None where it has none."""
        return next((ending for ending in self.members if f".{ending}" in SUFFIXES), None)


@dataclass
class Index:
    """What a pass over a shard's headers gave.

    Attributes:
        samples: the samples in order, those without an image too.
        damage: what is wrong with the rest of the shard, None where it is whole.
        repeated: members whose name occurs again; the last one of a name is read, as tar does.
        irregular: members that are no regular files, such as links.
    """

    samples: list[Sample] = field(default_factory=list)
    damage: ImageError | None = None
    repeated: list[str] = field(default_factory=list)
    irregular: list[str] = field(default_factory=list)

    def passed_over(self) -> tuple[list[str], list[str]]:
        """Images beside another one of their sample, masks apart, and samples without an image; by their names."""
        beside: list[str] = []
        without: list[str] = []
        for sample in self.samples:
            if sample.image is None:
                without.append(sample.key)
            else:
                beside += [
                    f"{sample.key}.{ending}"
                    for ending in sample.members
                    if ending != sample.image and _is_image(ending)
                ]
        return beside, without


def read_index(shard: Path) -> Index:
    """The samples of a shard, up to where it is damaged."""
    index = Index()
    members: dict[str, Place] = {}
    name = printable(shard)
    try:
        with _CappedReader(open_regular(shard).detach()) as file:
            for path, place in _members(file, os.fstat(file.fileno()).st_size, index):
                if path in members:
                    index.repeated.append(path)
                members[path] = place
    except tarfile.TarError as error:
        _group(members, index)
        if isinstance(error, _CutMemberError):
            index.samples = [sample for sample in index.samples if sample.key != _split(error.member)[0]]
        count = len(index.samples)
        hint = "" if count or isinstance(error, _CutMemberError) else " (only uncompressed tar files can be read)"
        index.damage = ImageError(f"{name}: not a whole tar file after {count} samples: {error}{hint}")
    except OSError as error:
        _group(members, index)
        status = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
        index.damage = ImageError(f"{name}: {error.strerror or error}", status)
    else:
        _group(members, index)
    return index


class _CutMemberError(tarfile.ReadError):
    """A member that is longer than the rest of the file, whether the file was cut or the header is wrong."""

    def __init__(self, member: str, size: int) -> None:
        self.member = member
        super().__init__(f"the file ends in the member {printable(member)}, which claims {size} bytes")


class _CappedReader(io.BufferedReader):
    """A file that gives at most 16 MiB at once: tarfile reads as much as a header claims, in one piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_MAX_METADATA_BYTES if size is None or size < 0 else min(size, _MAX_METADATA_BYTES))


def _members(file: BinaryIO, size: int, index: Index) -> Iterator[tuple[str, Place]]:
    """Name and place of the regular members; raises ``tarfile.TarError`` where the archive is damaged."""
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            for member in tar:
                if member.offset_data + max(member.size, 0) > size or member.size < 0:
                    raise _CutMemberError(member.name, member.size)
                name = PurePosixPath(member.name).name
                if member.isdir() or not name or name.startswith("."):
                    continue
                if not member.isreg() or member.issparse():
                    index.irregular.append(member.name)
                    continue
                yield member.name, Place(member.offset_data, member.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile stops at odd headers too
                raise tarfile.ReadError("no end mark where the archive ends, it is cut off or damaged there")
    except (tarfile.TarError, OSError):
        raise
    except (ValueError, ArithmeticError, LookupError, RecursionError) as error:  # what tarfile raises on odd headers
        raise tarfile.ReadError(f"a damaged header ({error})") from None


def _split(path: str) -> tuple[str, str]:
    """A member's key and ending."""
    pure = PurePosixPath(path)
    stem, _, ending = pure.name.partition(".")
    return str(pure.with_name(stem)), ending


def _group(members: Mapping[str, Place], index: Index) -> None:
    """Puts members into samples, with their endings in lower case."""
    groups: dict[str, dict[str, Place]] = {}
    for path, place in members.items():
        key, ending = _split(path)
        groups.setdefault(key, {})[ending] = place
    for key, group in groups.items():
        sample = Sample(key)
        for ending, place in group.items():
            if ending.lower() in sample.members:
                index.repeated.append(f"{key}.{ending}")
            sample.members[ending.lower()] = place
        dotted = [ending for ending in group if _is_image(ending.lower())]
        index.samples += [sample] if sample.image is not None or not dotted else _dotted(key, group, dotted)


def _dotted(key: str, group: Mapping[str, Place], images: list[str]) -> Iterator[Sample]:
    """A sample per image of a group that has none right after the key."""
    common = {ending.lower(): place for ending, place in group.items() if ending.lower() in _SIDECARS}
    for image in images:
        stem = image.rpartition(".")[0]
        own = {
            ending[len(stem) + 1 :].lower(): place for ending, place in group.items() if ending.startswith(f"{stem}.")
        }
        yield Sample(f"{key}.{stem}", {**common, **own})


def _is_image(ending: str) -> bool:
    """Whether a member's ending is that of an image, masks apart: ``png``, ``v2.png``, not ``mask.png``."""
    kind, _, last = ending.rpartition(".")
    return f".{last}" in SUFFIXES and kind not in MASK_KINDS


def read_member(shard: Path, place: Place) -> bytes:
    """A member's bytes.

    Raises:
        ImageError: the shard is shorter than its own headers say, or cannot be read.
    """
    try:
        data = read_part(shard, place.start, place.size)
    except OSError as error:
        raise ImageError(f"{printable(shard)}: {error.strerror or error}", "unreadable") from None
    if data is None:
        raise ImageError(f"{printable(shard)}: the file ends in the middle of a member", "unreadable")
    return data


def read_sidecars(shard: Path, members: Mapping[str, Place]) -> dict[str, str]:
    """The text of a sample's small members by their ending: ``cls``, ``txt`` and ``json``.

    Raises:
        ImageError: one that is not UTF-8 text, or larger than 16 MiB.
    """
    texts = {}
    for ending in _SIDECARS:
        if ending in members:
            if members[ending].size > _MAX_SIDECAR_BYTES:
                raise ImageError(f"{printable(shard)}: a .{ending} member of {members[ending].size} bytes is no label")
            try:
                texts[ending] = read_member(shard, members[ending]).decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                raise ImageError(f"{printable(shard)}: a .{ending} member is not UTF-8 text") from None
    return texts
