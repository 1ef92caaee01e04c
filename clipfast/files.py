"""Writing files so that a reader sees the old file or the new one, never a part of one. Imports no torch."""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

PARTIAL = ".clipfast-"
"""How the names of unfinished files begin; they end in ``.part``."""

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextlib.contextmanager
def atomic_write(path: str | PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Yields an empty file in the same folder that replaces ``path`` when the block ends without an exception.

    The temporary file has a random name and is new: a link planted under its name, or under ``path``, is not followed.
    When the block raises, the temporary file is removed and ``path`` stays as it was.

    Args:
        path: the file to write. Its folder exists.
        durable: whether the new file survives a power failure: file and folder are flushed to the disk before and
            after the rename. That takes 1 to 15 ms; leave it out for results that are quickly made again.

    Raises:
        OSError: the file cannot be written; the message names ``path``.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}.part")
    try:
        descriptor = os.open(partial, _NEW, 0o666)  # the umask decides on the mode
        try:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
        yield partial
        partial.chmod(mode)  # some writers replace the file by one that only its owner can read
        if durable:
            _flush_to_disk(partial)
        partial.replace(path)
        if durable:
            flush_folder(path.parent)
    except OSError as error:
        # A write without a name in its error (a full disk) or one about the temporary file is about this file.
        if error.errno is not None and error.filename in (None, partial, str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: str | PathLike[str], text: str, *, durable: bool = True) -> None:
    """Writes UTF-8 text with :func:`atomic_write`; lines end as they do in ``text``.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path, durable=durable) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def flush_folder(folder: Path) -> None:
    """Flushes a folder's list of files to the disk, where the system can do that.

    Raises:
        OSError: the disk failed.
    """
    if hasattr(os, "O_DIRECTORY"):
        _flush_to_disk(folder, os.O_DIRECTORY)


def flush_tree(folder: Path) -> None:
    """Flushes every file of a folder and of the folders in it to the disk, and the lists of their names.

    Raises:
        OSError: the disk failed.
    """
    for root, _, files in os.walk(folder):
        for name in files:
            _flush_to_disk(Path(root, name))
        flush_folder(Path(root))


def _flush_to_disk(path: Path, flags: int = 0) -> None:
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
