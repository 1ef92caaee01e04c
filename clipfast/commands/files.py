"""Files in and out: which images were meant, what results are called, and writing that leaves no half files."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfast.errors import ImageError, InputError
from clipfast.images import SUFFIXES

_LONGEST_NAME = 150


@dataclass(frozen=True)
class Source:
    """An image file with the name its results get.

    Attributes:
        path: the file, as the user would call it.
        name: a file name without suffix, different for every image of a run.
    """

    path: Path
    name: str


@dataclass(frozen=True)
class Missing:
    """A path that gave no images, and why."""

    path: Path
    error: ImageError


def find_images(given: Sequence[Path], skip: Path | None = None) -> tuple[list[Source], list[Missing]]:
    """Files as they are, folders searched recursively for :data:`clipfast.images.SUFFIXES`, in a stable order.

    A file found twice counts once. Hidden files and folders are passed over, and links to folders not followed.

    Args:
        given: files and folders.
        skip: a folder whose files are results, not images.

    Returns:
        The images, and an error for every path that does not exist and every folder without images.
    """
    found: dict[str, tuple[Path, str]] = {}
    errors: list[Missing] = []
    for path in given:
        if not path.is_dir():
            if not os.path.lexists(path):
                errors.append(Missing(path, ImageError(f"{path}: no such file")))
                continue
            found.setdefault(os.path.abspath(path), (path, path.stem))
            continue
        inside = [image for image in _walk(path, errors) if skip is None or not _is_below(image, skip)]
        if not inside:
            looked = " ".join(sorted(SUFFIXES))
            errors.append(Missing(path, ImageError(f"{path}: no images in this folder (looked for {looked})")))
        for image in inside:
            label = "__".join(image.relative_to(path).with_suffix("").parts)
            found.setdefault(os.path.abspath(image), (image, label))
    names = distinct(label for _, label in found.values())
    return [Source(path, name) for (path, _), name in zip(found.values(), names, strict=True)], errors


def _walk(folder: Path, errors: list[Missing]) -> Iterator[Path]:
    def refused(error: OSError) -> None:
        errors.append(Missing(Path(error.filename), ImageError(f"{error.filename}: {error.strerror}")))

    for root, folders, files in os.walk(folder, onerror=refused):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
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


def prepare_folder(folder: Path) -> Path:
    """Makes a folder and checks that files can be written in it, before anything slow begins.

    Raises:
        InputError: it is a file, or cannot be made or written.
    """
    probe = folder / f".clipfast-{os.getpid()}"
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"cannot write to {folder}: it is a file, not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from None
    return folder


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path`` that becomes ``path`` when all went well and vanishes when not."""
    partial = path.with_name(f".{path.name}.part")
    partial.touch()
    mode = partial.stat().st_mode & 0o777  # as the user's umask has it; some writers make their files private
    try:
        yield partial
        partial.chmod(mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON that a person can read too, all at once: a line per key, and per item of a list of objects."""
    entries = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"    {json.dumps(item)}" for item in value) + "\n  ]"
        else:
            text = json.dumps(value)
        entries.append(f"  {json.dumps(key)}: {text}")
    with replacing(path) as partial:
        partial.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")


def read_texts(texts: Sequence[str], file: Path | None) -> list[str]:
    """Texts as given, then those of a file with one per line; blank lines do not count.

    Raises:
        InputError: a file that is missing, no text, or empty; a text of blanks only.
    """
    if any(not text.strip() for text in texts):
        raise InputError("one of --texts is empty")
    found = list(texts)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(f"cannot read the texts in {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"cannot read the texts in {file}: not UTF-8 text") from None
        inside = [line.strip() for line in lines if line.strip()]
        if not inside:
            raise InputError(f"the texts file {file} is empty")
        found += inside
    return list(dict.fromkeys(found))
