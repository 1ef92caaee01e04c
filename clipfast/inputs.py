"""Opening the files that a user names: regular files only, so that nothing waits and no device is read."""

import errno
import os
import stat
import unicodedata
from io import BufferedReader
from os import PathLike

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"))

_UNPRINTABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories: control characters, surrogates, line and paragraph separators."""


def open_regular(path: str | PathLike[str]) -> BufferedReader:
    """Opens a regular file, or a link to one, for reading bytes.

    A FIFO would wait for a writer and a device may have no end, so neither is opened. The kind is checked before
    opening, because opening a device can act on it, and again afterwards on what was opened.

    Raises:
        OSError: there is no such file, it may not be read, or it is not a regular file; ``strerror`` has the reason.
    """
    descriptor, _ = _open(path)
    return os.fdopen(descriptor, "rb")


def read_part(path: str | PathLike[str], start: int, size: int) -> bytes | None:
    """``size`` bytes of a regular file from ``start`` on; None, without reading, where the file has fewer.

    Raises:
        OSError: as :func:`open_regular`.
    """
    descriptor, length = _open(path)
    try:
        if start + size > length:
            return None
        os.lseek(descriptor, start, os.SEEK_SET)
        data = os.read(descriptor, size)
        while len(data) < size:  # one call reads at most 2 GiB
            more = os.read(descriptor, size - len(data))
            if not more:
                return None
            data += more
        return data
    finally:
        os.close(descriptor)


def _open(path: str | PathLike[str]) -> tuple[int, int]:
    """A descriptor of a regular file, and its size in bytes."""
    _check_kind(os.stat(path).st_mode, path)
    descriptor = os.open(path, _FLAGS)
    try:
        status = os.fstat(descriptor)
        _check_kind(status.st_mode, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _check_kind(mode: int, path: str | PathLike[str]) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a folder, not a file", os.fspath(path))
    kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
    raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))


def printable(name: str | PathLike[str]) -> str:
    """A name for messages, on one line: escapes replace line breaks, control characters and undecodable bytes."""
    text = os.fspath(name)
    if text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNPRINTABLE:
        return character
    return character.encode("unicode_escape").decode("ascii")
