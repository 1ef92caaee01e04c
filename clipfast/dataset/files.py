"""Finding images in files, folders and tar shards, identifying them, and naming their results."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from clipfast.dataset.shards import Place, Sample, read_index, read_member
from clipfast.errors import ImageError
from clipfast.images import SUFFIXES, decode_image, open_image
from clipfast.inputs import printable

SHARD = ".tar"

_LONGEST_NAME = 150
_SHOWN = 3


class Identity(NamedTuple):
    """Identifies an image and the version of its file: equal identities mean the same image, unchanged.

    Attributes:
        path: the file or the shard, from the root of the file system.
        member: the image's name in the shard, empty for a file of its own.
        size: bytes of the file or the shard, None where there is no such file.
        modified_ns: when the file or the shard was last written, in nanoseconds since 1970; None where it is not there.
    """

    path: str
    member: str
    size: int | None
    modified_ns: int | None


@dataclass(frozen=True)
class Source:
    """An image, in a file of its own or in a tar shard, and the name of its results.

    Attributes:
        path: the file or the shard, as the user named it.
        name: a file name without suffix, different for every image of a run.
        folder: the folder that was searched, None for a path that was named itself.
        key: its sample's name in the shard, empty for a file of its own.
        members: the sample's members by ending, for a shard.
        image: which of them is the image.
    """

    path: Path
    name: str
    folder: Path | None = None
    key: str = ""
    members: Mapping[str, Place] = field(default_factory=dict)
    image: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.key}.{self.image}" if self.key else str(self.path)

    def identity(self) -> Identity:
        """The identity of the image as it is on disk now; a file that is gone has no size and no time."""
        path = os.path.abspath(self.path)
        member = f"{self.key}.{self.image}" if self.key else ""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return Identity(path, member, None, None)
        return Identity(path, member, status.st_size, status.st_mtime_ns)

    def open(self) -> Image.Image:
        """The image as RGB.

        Raises:
            ImageError: it cannot be read.
        """
        if not self.key:
            return open_image(self.path)
        if self.image not in self.members:
            raise ImageError(f"{printable(self.path)}: it holds no image {printable(self.key)} any more", "missing")
        return decode_image(BytesIO(read_member(self.path, self.members[self.image])), str(self))


@dataclass(frozen=True)
class Missing:
    """A path without readable images, and the reason."""

    path: Path
    error: ImageError


class Listing(NamedTuple):
    """The result of :func:`find_images`.

    Attributes:
        sources: the images.
        missing: paths that gave no images, or not all of theirs.
        notes: what was left out, a line for each reason with a count and examples.
    """

    sources: list[Source]
    missing: list[Missing]
    notes: list[str]


def find_images(paths: Sequence[Path], skip: Path | None = None) -> Listing:
    """Finds the images of files, tar shards and folders, which are searched recursively, in a stable order.

    A file that is named twice counts once. Hidden files and folders are skipped, and links to folders are not followed.

    Args:
        paths: image files, tar shards and folders.
        skip: a folder whose files are results, not images.

    Returns:
        The images; an error for every path that does not exist, every damaged shard, and every folder or shard without
        images; and notes of what is left out.
    """
    files: dict[str, tuple[Path, Path | None]] = {}
    errors: list[Missing] = []
    left_out = _LeftOut()
    for path in paths:
        if not os.path.isdir(path):
            if not os.path.lexists(path):
                errors.append(Missing(path, ImageError(f"{printable(path)}: no such file", "missing")))
                continue
            files.setdefault(os.path.abspath(path), (path, None))
            continue
        inside = list(_walk(path, skip, errors, left_out))
        if not inside:
            looked = " ".join(sorted({*SUFFIXES, SHARD}))
            reason = f"{printable(path)}: no images in this folder (looked for {looked})"
            errors.append(Missing(path, ImageError(reason, "no_image")))
        for file in inside:
            files.setdefault(os.path.abspath(file), (file, path))
    sources = [source for path, folder in files.values() for source in _sources(path, folder, errors, left_out)]
    names = distinct(source.name for source in sources)
    named = [replace(source, name=name) for source, name in zip(sources, names, strict=True)]
    return Listing(named, errors, left_out.notes())


class _LeftOut:
    """Counts what is left out, by reason, with a few names for each."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self._counts[reason] += 1
        examples = self._names.setdefault(reason, [])
        if len(examples) < _SHOWN:
            examples.append(printable(name))

    def notes(self) -> list[str]:
        lines = []
        for reason, count in self._counts.items():
            more = ", …" if count > _SHOWN else ""
            lines.append(f"left out: {reason}: {count} ({', '.join(self._names[reason])}{more})")
        return lines


def _sources(path: Path, folder: Path | None, errors: list[Missing], left_out: _LeftOut) -> Iterator[Source]:
    """The images of one file or shard, with names that may not be distinct yet."""
    label = path.stem if folder is None else "__".join(path.relative_to(folder).with_suffix("").parts)
    if path.suffix.lower() != SHARD:
        yield Source(path, label, folder)
        return
    index = read_index(path)
    images = 0
    for sample in index.samples:
        if sample.image is not None:
            images += 1
            name = f"{label}__{sample.key.replace('/', '__')}"
            yield Source(path, name, folder, sample.key, sample.members, sample.image)
    beside, without = index.passed_over()
    for reason, names in (
        ("tar members whose name occurs again (the last is read)", index.repeated),
        ("tar members that are no regular files", index.irregular),
        ("images beside another image of the same sample", beside),
        ("samples without an image", without),
    ):
        for name in names:
            left_out.add(reason, f"{path}:{name}")
    if index.damage is not None:
        errors.append(Missing(path, index.damage))
    elif not images:
        errors.append(Missing(path, ImageError(f"{printable(path)}: no images in this shard", "no_image")))


def found_again(places: Sequence[Source]) -> list[Source]:
    """Completes sources of which only path, name, folder and key are known, from the headers of their tar shards."""
    shards = {
        path: {sample.key: sample for sample in read_index(path).samples} for path in {p.path for p in places if p.key}
    }
    return [_with_members(place, shards[place.path]) if place.key else place for place in places]


def _with_members(place: Source, samples: Mapping[str, Sample]) -> Source:
    sample = samples.get(place.key, Sample(place.key))
    return replace(place, members=sample.members, image=sample.image or "")


def _walk(folder: Path, skip: Path | None, errors: list[Missing], left_out: _LeftOut) -> Iterator[Path]:
    def refused(error: OSError) -> None:
        path = Path(error.filename)
        errors.append(Missing(path, ImageError(f"{printable(path)}: {error.strerror}", "unreadable")))

    for root, folders, files in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if os.path.islink(os.path.join(root, name)):
                left_out.add("links to folders", os.path.join(root, name))
        for name in sorted(files):
            path = Path(root, name)
            if name.startswith(".") or (skip is not None and _is_below(path, skip)):
                continue
            if path.suffix.lower() in SUFFIXES or path.suffix.lower() == SHARD:
                yield path
            else:
                left_out.add("files with other endings than images and shards have", str(path))


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def distinct(labels: Iterable[str]) -> list[str]:
    """Turns labels into distinct file names, even where case is ignored: ``cat``, ``cat-2``, ``cat-3``."""
    taken: set[str] = set()
    names = []
    for label in labels:
        stem = _shortened(_cleaned(label).lstrip(".") or "image")
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _cleaned(name: str) -> str:
    """A name without characters that cannot be printed, such as line breaks and undecodable bytes."""
    return "".join(character if character.isprintable() else "_" for character in name)


def _shortened(name: str) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST_NAME else raw[:_LONGEST_NAME].decode(errors="ignore")
