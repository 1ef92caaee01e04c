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
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from clipfast.commands import console
from clipfast.errors import ClipfastError, is_out_of_memory

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


@dataclass
class Ending:
    """How a command ended.

    Attributes:
        code: the exit code.
        signal: the first signal that arrived, None if none did.
    """

    code: int = 0
    signal: int | None = None


_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def _signals(ending: Ending) -> Iterator[None]:
    """Raises :class:`Interrupted` for each of the signals, and notes the first.

    It also stays an interrupt where a library turns it into an error of its own, as safetensors and torch can. After
    the first signal SIGTERM and SIGHUP are ignored, so that saving is not disturbed; Ctrl-C is not. A signal that was
    ignored from the start (``nohup``) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    replaced = {number: before for number in _SIGNALS if (before := signal.getsignal(number)) in defaults}

    def interrupt(number: int, _: FrameType | None) -> None:
        repeated = ending.signal is not None
        if not repeated:
            ending.signal = number
        if not repeated or number == signal.SIGINT:
            raise Interrupted

    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:
        if ending.signal is not None:
            raise Interrupted from error
        raise
    finally:
        for number, before in replaced.items():
            signal.signal(number, before)


@contextlib.contextmanager
def exit_codes() -> Iterator[Ending]:
    """Runs a command's body, which sets ``code``; an exception that the user can act on sets it too."""
    ending = Ending()
    try:
        console.set_up()
        with _signals(ending):
            yield ending
        console.flush()
    except KeyboardInterrupt:
        console.error("interrupted")
        ending.code = INTERRUPTED
    except ClipfastError as error:
        console.error(error)
        ending.code = FAILED
    except OSError as error:
        console.error(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
        ending.code = FAILED
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        console.error(f"out of memory: {error}" if str(error) else "out of memory")
        ending.code = FAILED
    if ending.code == INTERRUPTED and ending.signal is not None:
        ending.code = 128 + ending.signal
