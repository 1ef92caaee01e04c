"""Where a file is: a path of this machine, or a URL that fsspec opens. Its version, its bytes, and its name for people.

A local file is opened as every file that a user names: regular files only (:mod:`clipfast.inputs`).
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, cast

import fsspec

from clipfast.dataset.plan import Unit, UnitError
from clipfast.errors import ImageError, InputError
from clipfast.inputs import open_regular, printable

MAX_IMAGE_BYTES = 1 << 30
"""The most bytes of an encoded image that are read: 1 GiB."""
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_LOCAL = ("file://", "local://")
REMOTE_THREADS = 16
"""How many files are asked for at once over a network."""
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "LastModified", "last_modified", "mtime", "created")
_BLOCK = 8 << 20

Item = TypeVar("Item")
Value = TypeVar("Value")


class Version(NamedTuple):
    """The version of a file.

    Attributes:
        size: its bytes, None where that is not known.
        version: what changes with its content: the time of modification in nanoseconds of a local file, the ETag or
            what the file system has in its place of a remote one; None where that is not known.
        modified_ns: when it was last written, in nanoseconds since 1970; None where that is not known.
    """

    size: int | None = None
    version: str | None = None
    modified_ns: int | None = None


@dataclass(frozen=True)
class Naming:
    """Gives files the names that the user would give them: what the absolute path begins with is replaced.

    Attributes:
        given: what names begin with.
        absolute: what absolute paths begin with in its place.
    """

    given: str = ""
    absolute: str = ""

    @classmethod
    def of(cls, name: str) -> "Naming":
        """The naming of files whose names are given as ``name`` is: absolute, relative to the working folder, URLs."""
        for scheme in _LOCAL:
            if name.lower().startswith(scheme):
                return cls(name[: len(scheme)], "")
        if is_url(name) or os.path.isabs(name):
            return cls()
        return cls("", os.path.join(os.getcwd(), ""))

    @classmethod
    def below(cls, folder: str) -> "Naming":
        """The naming of files in a folder."""
        given = folder if is_url(folder) else str(Path(folder))
        given = "" if given == os.curdir else os.path.join(given, "")
        return cls(given, os.path.join(absolute(folder), ""))

    def name(self, path: str) -> str:
        """The name of the file at an absolute path."""
        if path.startswith(self.absolute):
            return self.given + path[len(self.absolute) :]
        return path if is_url(path) else os.path.relpath(path, self.absolute)


def is_url(name: str) -> bool:
    """Whether a name is a URL: it begins with a protocol and ``://``."""
    return _URL.match(name) is not None


def absolute(name: str) -> str:
    """A path from the root of the file system, or a URL that is not of a local file."""
    for scheme in _LOCAL:
        if name.lower().startswith(scheme):
            return os.path.abspath(name[len(scheme) :])
    return name if is_url(name) else os.path.abspath(name)


def file_system(url: str) -> tuple[Any, str]:
    """The file system of fsspec for a URL, and the path in there.

    Raises:
        InputError: there is none for its protocol, or the package for it is not installed.
    """
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(url))
    except (ImportError, ValueError) as error:
        raise InputError(f"{printable(url)}: fsspec cannot open it ({_line(error)})") from None


def version(path: str) -> Version:
    """The version of a file as it is now; nothing is known of one that is not there or cannot be asked."""
    if not is_url(path):
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return Version()
        return Version(status.st_size, str(status.st_mtime_ns), status.st_mtime_ns)
    try:
        system, inside = file_system(path)
        info = system.info(inside)
    except Exception:  # file systems raise what they like; reading the file gives the reason
        return Version()
    size = info.get("size")
    have = next((str(info[name]) for name in _VERSIONS if info.get(name) is not None), None)
    return Version(int(size) if size is not None else None, have or _key(system, inside))


def _key(system: Any, path: str) -> str | None:
    try:
        return str(system.ukey(path))
    except Exception:
        return None


def changed(unit: Unit) -> str | None:
    """Why the file of a unit is not the one that the pass was planned with, one line; None where it may be.

    Where nothing was known of the file, because it was not there, it may be.
    """
    if unit.kind in ("files", "items"):
        return None
    now, reason = version(unit.path), None
    if None not in (unit.size, now.size) and unit.size != now.size:
        reason = f"{now.size} bytes, not {unit.size}"
    elif unit.kind != "list" and None not in (unit.version, now.version) and unit.version != now.version:
        reason = "another time of modification" if now.modified_ns is not None else "another version"
    return reason and f"{printable(unit.path)}: it was changed after the pass was planned: {reason}"


def open_unit(path: str, name: str, *, anywhere: bool = False) -> BinaryIO:
    """Opens a file for reading.

    Args:
        path: an absolute path or a URL.
        name: what the user calls it, for messages.
        anywhere: whether it is read in any order; else it may be readable forward alone.

    Raises:
        UnitError: it is not there or cannot be read.
    """
    try:
        if not is_url(path):
            return cast(BinaryIO, open_regular(path).detach())
        system, inside = file_system(path)
        return cast(BinaryIO, system.open(inside, "rb", block_size=_BLOCK if anywhere else _block(system)))
    except InputError as error:
        raise UnitError("unreadable", str(error)) from None
    except Exception as error:  # file systems raise what they like
        raise unit_error(name, error) from None


def _block(system: Any) -> int:
    """Bytes asked for at once when a file is read forward; 0 for one answer, which any web server gives."""
    protocols = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    return 0 if {"http", "https"} & set(protocols) else _BLOCK


def unit_error(name: str, error: BaseException) -> UnitError:
    """What an exception of a file system says about a unit."""
    kind, reason = _reason(error)
    return UnitError(kind, f"{printable(name)}: {reason}")


def fetch(url: str, limit: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of an image at a URL.

    Raises:
        ImageError: it is not there, cannot be read, or is longer than ``limit`` bytes.
    """
    try:
        system, inside = file_system(url)
        with system.open(inside, "rb", block_size=_block(system)) as file:
            parts, size = [], 0
            while size <= limit and (part := file.read(limit + 1 - size)):  # what comes over HTTP comes in parts
                parts.append(part)
                size += len(part)
    except InputError as error:
        raise ImageError(str(error), "unreadable") from None
    except Exception as error:  # file systems raise what they like
        kind, reason = _reason(error)
        raise ImageError(f"{printable(url)}: {reason}", kind) from None
    if size > limit:
        raise ImageError(f"{printable(url)}: more than {limit} bytes", "too_large")
    return b"".join(parts)


def _reason(error: BaseException) -> tuple[Literal["missing", "unreadable"], str]:
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and cause is not None:  # what fsspec makes of any answer but a good one
        status = getattr(cause, "status", None)
        if (isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)) or status not in (None, 404, 410):
            return "unreadable", f"it cannot be read ({_line(cause)})"
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "missing", "no such file"
    if isinstance(error, PermissionError):
        return "unreadable", "no permission to read"
    if isinstance(error, OSError) and error.strerror:
        return "unreadable", error.strerror
    if isinstance(error, TimeoutError):
        return "unreadable", "no answer in time"
    return "unreadable", f"it cannot be read ({_line(error)})"


def _line(error: BaseException) -> str:
    """An exception's text on one line."""
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__


def ahead(function: Callable[[Item], Value], items: Iterable[Item]) -> Iterator[Value]:
    """Results of a function that waits for a network, in order; up to 32 items are begun ahead, in 16 threads."""
    waiting: list[Future[Value]] = []
    todo = iter(items)
    with ThreadPoolExecutor(REMOTE_THREADS, thread_name_prefix="clipfast-fetching") as pool:
        try:
            waiting = [pool.submit(function, item) for item in islice(todo, 2 * REMOTE_THREADS)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [pool.submit(function, item) for item in islice(todo, 1)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
