"""No run begins while a worker of an earlier one makes a unit count.

A worker may outlive its run for a moment, on another node of a cluster for longer. It looks for another run before it
writes a record, but that run could begin right after it has looked. It would take the worker's files for leftovers and
remove them, and then their record would be written. So workers share a lock while they look and write, and a run takes
it alone while it gives itself a name. The system releases it when a process ends.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipfast.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where all workers of a run are processes of its own machine and end with it
    fcntl = None  # type: ignore[assignment]

GUARD = ".guard"
_PATIENCE = 120.0  # seconds; a network file system takes up to a minute to notice that a node is gone
_BETWEEN = 0.02


@contextmanager
def beginning(folder: Path) -> Iterator[None]:
    """A block in which no worker makes a unit count.

    Raises:
        InputError: a worker does not end.
        OSError: the folder cannot be written.
    """
    with _opened(folder) as descriptor:
        deadline = time.monotonic() + _PATIENCE
        while not _locks(descriptor, alone=True):
            if time.monotonic() > deadline:
                raise InputError(f"a worker of an earlier run is still writing to {folder}: end it, and run this again")
            time.sleep(_BETWEEN)
        yield


@contextmanager
def counting(folder: Path) -> Iterator[None]:
    """A block in which no run begins.

    Raises:
        OSError: the folder cannot be written.
    """
    with _opened(folder) as descriptor:
        while not _locks(descriptor, alone=False):
            time.sleep(_BETWEEN)
        yield


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder / GUARD, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)  # releases the lock


def _locks(descriptor: int, *, alone: bool) -> bool:
    """Whether the lock could be taken now; True also where the file system has none."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
