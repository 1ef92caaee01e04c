"""A worker's process, as the driver sees it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

from clipfast.dataset.engines import process

_KEPT = 1 << 12  # bytes of what it writes to stderr
_CLOSING = 5.0  # seconds between the end of its connection and its own
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class Child:
    """A worker's process; it dies with the thread that starts it.

    Args:
        threads: that its libraries compute with.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, threads: int) -> None:
        self._connection, theirs = Pipe()
        program = [sys.executable, "-P", *(["-X", "utf8"] if sys.flags.utf8_mode else []), process.__file__]
        try:
            with theirs:
                before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the process inherits this
                try:
                    self._process = subprocess.Popen(
                        [*program, str(theirs.fileno()), str(os.getpid())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        env={**os.environ, **dict.fromkeys(_THREADS, str(threads))},
                    )
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, before)
        except BaseException:
            self._connection.close()
            raise
        assert self._process.stderr is not None
        self._stderr = self._process.stderr.fileno()
        os.set_blocking(self._stderr, False)
        self._written, self._open = b"", True
        self._ended: str | None = None
        self._pidfd = _pidfd(self._process.pid)
        self.send([*map(str, sys.path), str(Path(process.__file__).parents[3])])

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def sources(self) -> list[Any]:
        """What becomes readable when there is something to hear: for :func:`multiprocessing.connection.wait`."""
        own = [each for each in (self._pidfd,) if each is not None]
        return [self._connection, *own, *([self._stderr] if self._open else [])]

    def send(self, message: object) -> None:
        """Sends it something; does nothing where it has ended."""
        with suppress(OSError):
            self._connection.send(message)

    def hear(self) -> Iterator[Any]:
        """What it has sent until now; returns when there is no more for the moment, or when it has ended."""
        self._read_stderr()
        while self._ended is None:
            ended = self._process.poll() is not None
            try:
                while self._connection.poll():
                    yield self._connection.recv()
            except (EOFError, OSError):
                ended = True
            if not ended:
                return
            try:
                self._process.wait(_CLOSING)
            except subprocess.TimeoutExpired:  # it has only closed its end
                self._process.kill()
                self._process.wait()
            self._read_stderr()
            self._ended = _ending(self._process.returncode, self._written)

    @property
    def ended(self) -> str | None:
        """How it ended; None while it is there."""
        return self._ended

    def kill(self) -> None:
        """Kills it, from any thread."""
        self._process.kill()

    def end(self, seconds: float) -> None:
        """Waits for its end, and kills it after some time; it has been asked to end.

        Args:
            seconds: from now on.
        """
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()
        assert self._process.stderr is not None
        self._process.stderr.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def ask_to_end(self) -> None:
        """Asks it to end at once, whatever it is at."""
        self._process.terminate()

    def _read_stderr(self) -> None:
        while self._open:
            try:
                data = os.read(self._stderr, 1 << 16)
            except BlockingIOError:
                return
            self._open = bool(data)
            self._written = (self._written + data)[-_KEPT:]


def _pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when a process ends; None where the system has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _ending(status: int, written: bytes) -> str:
    """How a process ended, for people.

    Args:
        status: as :mod:`subprocess` has it.
        written: the last of what it wrote to stderr.
    """
    if status < 0:
        try:
            return f"by {signal.Signals(-status).name}"
        except ValueError:
            return f"by signal {-status}"
    lines = [line.strip() for line in written.decode(errors="replace").splitlines() if line.strip()]
    return f"with exit status {status}" + (f" ({lines[-1]})" if lines and status else "")
