"""Ctrl-C, SIGTERM and SIGHUP while results must be saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from clipfast.errors import ClipfastError

# Windows has no SIGHUP.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """The state of :func:`saving_interrupts`.

    Attributes:
        received: the first signal that came, None before it.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: raises at the first signal, unless :meth:`deferred` holds it back."""
        if self.received is None:
            self.received = number
            if not self._deferred:
                raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal came: code that runs in between may have swallowed the first one."""
        if self.received is not None:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that no signal interrupts; use :meth:`check` after it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False


@contextlib.contextmanager
def saving_interrupts() -> Iterator[Interrupts]:
    """The first SIGINT, SIGTERM or SIGHUP raises KeyboardInterrupt, so that results are saved; later ones do nothing.

    A signal that is ignored, as SIGHUP is under ``nohup``, stays ignored. Some libraries, safetensors and torch among
    them, turn a KeyboardInterrupt into an error of their own; it becomes a KeyboardInterrupt again. Outside the main
    thread nothing changes.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, interrupts.handle)
        yield interrupts
    except Exception as error:
        if interrupts.received is not None and not isinstance(error, ClipfastError | OSError):
            raise KeyboardInterrupt from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
