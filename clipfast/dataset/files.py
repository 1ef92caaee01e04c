"""Which image files were meant, and what results are called."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from PIL import Image

from clipfast.dataset.shards import Place, Sample, read_index, read_member
from clipfast.errors import ImageError
from clipfast.images import SUFFIXES, decode_image, open_image

SHARD = ".tar"

_LONGEST_NAME = 150


@dataclass(frozen=True)
class Source:
    """An image with the name its results get: a file of its own, or a member of a tar shard.

    Attributes:
        path: the file or the shard, as the user would call it.
        name: a file name without suffix, different for every image of a run.
        folder: the folder that was searched, None for what was named itself.
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

    def open(self) -> Image.Image:
        """The image as RGB.

        Raises:
            ImageError: it cannot be read.
        """
        if not self.key:
            return open_image(self.path)
        if self.image not in self.members:
            raise ImageError(f"{self.path}: it holds no image {self.key} any more")
        return decode_image(BytesIO(read_member(self.path, self.members[self.image])), str(self))


@dataclass(frozen=True)
class Missing:
    """A path that gave no images, and why."""

    path: Path
    error: ImageError


def find_images(given: Sequence[Path], skip: Path | None = None) -> tuple[list[Source], list[Missing]]:
    """Files as they are, folders searched recursively for images and tar shards, in a stable order.

    A file found twice counts once. Hidden files and folders are passed over, and links to folders not followed.

    Args:
        given: image files, tar shards and folders.
        skip: a folder whose files are results, not images.

    Returns:
        The images, and an error for every path that does not exist, every damaged shard, and everything without images.
    """
    found: dict[str, tuple[Path, Path | None]] = {}
    errors: list[Missing] = []
    for path in given:
        if not path.is_dir():
            if not os.path.lexists(path):
                errors.append(Missing(path, ImageError(f"{path}: no such file")))
                continue
            found.setdefault(os.path.abspath(path), (path, None))
            continue
        inside = [file for file in _walk(path, errors) if skip is None or not _is_below(file, skip)]
        if not inside:
            looked = " ".join(sorted({*SUFFIXES, SHARD}))
            errors.append(Missing(path, ImageError(f"{path}: no images in this folder (looked for {looked})")))
        for file in inside:
            found.setdefault(os.path.abspath(file), (file, path))
    sources = [source for path, folder in found.values() for source in _sources(path, folder, errors)]
    names = distinct(source.name for source in sources)
    return [replace(source, name=name) for source, name in zip(sources, names, strict=True)], errors


def _sources(path: Path, folder: Path | None, errors: list[Missing]) -> Iterator[Source]:
    """The images of one file, named for now by where they are."""
    label = path.stem if folder is None else "__".join(path.relative_to(folder).with_suffix("").parts)
    if path.suffix.lower() != SHARD:
        yield Source(path, label, folder)
        return
    samples, damage = read_index(path)
    images = 0
    for sample in samples:
        ending = _image_of(sample)
        if ending is not None:
            images += 1
            name = f"{label}__{sample.key.replace('/', '__')}"
            yield Source(path, name, folder, sample.key, sample.members, ending)
    if damage is not None:
        errors.append(Missing(path, damage))
    elif not images:
        errors.append(Missing(path, ImageError(f"{path}: no images in this shard")))


def _image_of(sample: Sample) -> str | None:
    """The ending of a sample's image, None where it has none."""
    return next((ending for ending in sample.members if f".{ending}" in SUFFIXES), None)


def found_again(places: Sequence[Source]) -> list[Source]:
    """Sources of which only path, name, folder and key are known, with what their tar shards say of them now."""
    shards = {
        path: {sample.key: sample for sample in read_index(path)[0]} for path in {p.path for p in places if p.key}
    }
    return [_found(place, shards[place.path]) if place.key else place for place in places]


def _found(place: Source, samples: Mapping[str, Sample]) -> Source:
    sample = samples.get(place.key, Sample(place.key))
    return replace(place, members=sample.members, image=_image_of(sample) or "")


def _walk(folder: Path, errors: list[Missing]) -> Iterator[Path]:
    def refused(error: OSError) -> None:
        errors.append(Missing(Path(error.filename), ImageError(f"{error.filename}: {error.strerror}")))

    for root, folders, files in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in {*SUFFIXES, SHARD}:
                yield Path(root, name)


def _is_below(path: Path, folder: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def distinct(labels: Iterable[str]) -> list[str]:
    """Labels made into different file names, also where case does not count: ``cat``, ``cat-2``, ``cat-3``."""
    taken: set[str] = set()
    names = []
    for label in labels:
        stem = _shortened(label.lstrip(".") or "image")
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _shortened(name: str) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST_NAME else raw[:_LONGEST_NAME].decode(errors="ignore")
