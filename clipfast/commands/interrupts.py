"""Ctrl-C, SIGTERM and SIGHUP while results must be saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from clipfast.errors import ClipfastError
from clipfast.signals import BetweenLocks

# Windows has no SIGHUP.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """The signals of a :func:`saving_interrupts` block."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._deferred = False
        self._handlers = {number: signal.getsignal(number) for number in _SIGNALS}

    @property
    def received(self) -> int | None:
        """The first signal that arrived, None before it."""
        return self._received

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: passes the first signal on, at once or when :meth:`check` is called."""
        if self._received is None:
            self._received = number
            if not self._deferred:
                self._interrupt(frame)

    def check(self) -> None:
        """Interrupts if a signal arrived: it was deferred, or code in between has swallowed the exception."""
        if self._received is not None:
            self._interrupt(None)

    def _interrupt(self, frame: FrameType | None) -> NoReturn:
        assert self._received is not None
        handler = self._handlers[self._received]
        if isinstance(handler, BetweenLocks):
            handler = handler.handler
        if callable(handler):
            handler(self._received, frame)
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that no signal interrupts; call :meth:`check` after it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


@contextlib.contextmanager
def saving_interrupts() -> Iterator[Interrupts]:
    """The first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, so that results are saved; later ones do nothing.

    It does so where no lock is left behind (:mod:`clipfast.signals`).
    The handler from outside the block is called first, and may raise an exception of its own. A signal that is ignored,
    as SIGHUP is under ``nohup``, stays ignored. Some libraries, safetensors and torch among them, turn a
    KeyboardInterrupt into an error of their own; it becomes a KeyboardInterrupt again. Outside the main thread nothing
    changes.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    handlers = [(number, signal.getsignal(number)) for number in _SIGNALS]
    handlers = [(number, handler) for number, handler in handlers if handler not in (signal.SIG_IGN, None)]
    try:
        for number, _ in handlers:
            signal.signal(number, BetweenLocks(interrupts.handle))
        yield interrupts
    except Exception as error:
        if interrupts.received is not None and not isinstance(error, ClipfastError | OSError):
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)
