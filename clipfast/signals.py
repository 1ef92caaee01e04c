"""Signal handlers that raise an exception where no lock can be left behind, and that is not lost.

Python runs a handler between two instructions of the main thread, wherever that is: also in
``threading.Condition.__enter__``, right after the lock is taken. If it raises there, the lock is never released, and
another thread waits for it for ever. What ``threading`` and ``queue`` do with a lock takes microseconds, so a handler
can wait until they are through, or until the thread is blocked where they expect exceptions.

Nor does an exception get anywhere that is raised in a finalizer, ``__del__`` or a callback of :mod:`weakref`: Python
prints it and goes on. It is raised again a few milliseconds later.
"""

import _thread
import dis
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType

Handler = Callable[[int, FrameType | None], object]

_FILES = frozenset({threading.__file__, queue.__file__})
_WAITS = frozenset({"wait", "join", "_wait_for_tstate_lock"})
"""Functions of these files in which a thread may be blocked for long: in a call of ``acquire`` or ``join``."""
_BETWEEN_LOOKS = 0.005  # seconds
_RAISED_BY = "_clipfast_raised_by"
"""Attribute of an exception that a handler raised."""


class BetweenLocks:
    """A signal handler that calls another one, later where the main thread takes or releases a lock.

    What the other one raises is raised again where a finalizer has swallowed it.

    Args:
        handler: is called; it may raise.

    Attributes:
        handler: the same.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self._seen: tuple[FrameType, int] | None = None  # where the main thread was at the last look
        self._looks = 0
        self._lost: BaseException | None = None  # was raised in a finalizer

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Calls the handler, or sends the signal again a few milliseconds later."""
        self._looks += 1
        seen, self._seen = self._seen, None
        if frame is not None and frame.f_code.co_filename in _FILES and not _waits(frame, seen):
            self._seen = frame, frame.f_lasti
            _thread.start_new_thread(self._send_again, (number, self._looks))  # takes no lock itself
            return
        lost, self._lost = self._lost, None
        if lost is not None:
            raise lost.with_traceback(None)
        try:
            self.handler(number, frame)
        except BaseException as error:
            vars(error)[_RAISED_BY] = self, number
            _watch_finalizers()
            raise

    def lose(self, error: BaseException, number: int) -> None:
        """Notes that what the handler raised got nowhere, and sends the signal again to raise it once more."""
        self._lost = error
        _thread.start_new_thread(self._send_again, (number, self._looks))

    def _send_again(self, number: int, look: int) -> None:
        time.sleep(_BETWEEN_LOOKS)
        main = threading.main_thread().ident
        if look != self._looks:  # the same signal has come again in the meantime
            return
        if hasattr(signal, "pthread_kill") and main is not None:
            signal.pthread_kill(main, number)
        else:
            _thread.interrupt_main(signal.Signals(number))


def _watch_finalizers() -> None:
    """From now on the interpreter tells a :class:`BetweenLocks` that what it raised got nowhere."""
    before = sys.unraisablehook
    if getattr(before, _RAISED_BY, False):
        return

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        handler, number = getattr(unraisable.exc_value, _RAISED_BY, (None, 0))
        if handler is None or unraisable.exc_value is None:
            before(unraisable)
        else:
            handler.lose(unraisable.exc_value, number)

    setattr(hook, _RAISED_BY, True)
    sys.unraisablehook = hook


def _waits(frame: FrameType, seen: tuple[FrameType, int] | None) -> bool:
    """Whether the main thread waits: by the instruction that it is at, or because it has been there for a while."""
    if frame.f_code.co_name not in _WAITS:
        return False
    is_blocked = seen is not None and seen[0] is frame and seen[1] == frame.f_lasti
    return is_blocked or frame.f_lasti in _waiting_calls(frame.f_code)


@cache
def _waiting_calls(code: CodeType) -> frozenset[int]:
    """Offsets of the calls of methods named ``acquire`` and ``join``."""
    offsets, waits = set(), False
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_METHOD", "LOAD_ATTR"):
            waits = instruction.argval in ("acquire", "join")
        elif instruction.opname.startswith("CALL"):
            if waits:
                offsets.add(instruction.offset)
            waits = False
    return frozenset(offsets)


@contextmanager
def interrupts_between_locks() -> Iterator[None]:
    """A block in which Ctrl-C, as the program handles it, leaves no lock behind. Only in the main thread."""
    handler = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or not callable(handler) or isinstance(handler, BetweenLocks):
        yield
        return
    signal.signal(signal.SIGINT, BetweenLocks(handler))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
