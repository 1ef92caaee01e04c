"""How a command ends: exceptions become one line on stderr and an exit code.

====  ==================================================================================================
code  meaning
====  ==================================================================================================
0     done
1     an error inside clipfast; a traceback follows
2     something that the user can correct: arguments, files, memory; or some images failed
130   interrupted with Ctrl-C (SIGINT); 143 after SIGTERM, 129 after SIGHUP. What was computed is saved first
====  ==================================================================================================
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from clipfast.commands import console
from clipfast.errors import ClipfastError, is_out_of_memory
from clipfast.signals import BetweenLocks

FAILED = 2
INTERRUPTED = 130


class OutOfMemory(ClipfastError):
    """The images in one batch, or the texts, do not fit in memory."""

    def __init__(self, batch_size: int, where: str, what: str = "images") -> None:
        if what == "texts":
            advice = f"give fewer texts than {batch_size}"
        elif batch_size > 1:
            advice = f"try --batch-size {batch_size // 2} (it was {batch_size})"
        else:
            advice = "--batch-size is 1 already: give fewer texts or --layers, leave out --tokens and --per-head"
        super().__init__(f"out of memory on {where}: {advice}")


@contextlib.contextmanager
def memory_for(batch_size: int, where: str, what: str = "images") -> Iterator[None]:
    """Turns running out of memory into :class:`OutOfMemory`, which names the batch size to try."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(batch_size, where, what) from None
        raise


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP: handled wherever Ctrl-C is."""


class _Signals:
    """Handlers that raise :class:`Interrupted` for SIGINT, SIGTERM and SIGHUP.

    After the first signal SIGTERM and SIGHUP are ignored, so that saving is not disturbed; Ctrl-C is not. A signal that
    was ignored from the start (``nohup``) stays ignored. No lock is left behind (:mod:`clipfast.signals`).

    Attributes:
        first: the first signal that arrived, None before it.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._replaced: dict[int, Any] = {}

    def install(self) -> None:
        """Replaces Python's own handlers; outside the main thread nothing changes."""
        if threading.current_thread() is threading.main_thread():
            defaults = (signal.SIG_DFL, signal.default_int_handler)
            before = {number: signal.getsignal(number) for number in _SIGNALS}
            self._replaced = {number: handler for number, handler in before.items() if handler in defaults}
            for number in self._replaced:
                signal.signal(number, BetweenLocks(self._interrupt))

    def restore(self) -> None:
        """Puts back the handlers that :meth:`install` replaced."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        repeated = self.first is not None
        if not repeated:
            self.first = number
        if not repeated or number == signal.SIGINT:
            raise Interrupted


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def exit_code_of(body: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, also where it ends with an exception that the user can act on.

    A signal stays an interrupt where a library turns it into an error of its own, as safetensors and torch can. No
    context manager does this: a signal that arrives while ``contextlib`` enters or leaves one is outside every ``try``.

    Args:
        body: the command; returns an exit code.
    """
    signals = _Signals()
    try:
        console.set_up()
        try:
            signals.install()
            code = body()
        except Exception as error:
            if signals.first is not None:
                raise Interrupted from error
            raise
        finally:
            signals.restore()
        console.flush()
    except KeyboardInterrupt as error:
        console.error(f"interrupted: {error}" if str(error) else "interrupted")
        code = INTERRUPTED
    except ClipfastError as error:
        console.error(error)
        code = FAILED
    except OSError as error:
        console.error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
        code = FAILED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        console.error(f"out of memory: {error}" if str(error) else "out of memory")
        code = FAILED
    return 128 + signals.first if code == INTERRUPTED and signals.first is not None else code
