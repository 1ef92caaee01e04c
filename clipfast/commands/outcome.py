"""From what a command raises to one line and an exit code.

0: done.  1: a fault of clipfast (a traceback follows).  2: something the user can mend, or images that failed.
130: interrupted.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import typer

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


def _drop_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, sys.stdout.fileno())


@contextlib.contextmanager
def _lasting_interrupts() -> Iterator[None]:
    """Ctrl-C stays Ctrl-C where a library makes an error of its own out of it, as safetensors and torch can."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def note(number: int, frame: FrameType | None) -> NoReturn:
        nonlocal seen
        seen = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if seen:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Runs a command's body; what the user can mend becomes ``error: …`` and exit code 2, Ctrl-C 130.

    Raises:
        typer.Exit: with the code.
    """
    try:
        console.set_up()
        with _lasting_interrupts():
            yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        console.error("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # `clipfast models | head`: whoever read has enough
        _drop_stdout()
        raise typer.Exit(0) from None
    except ClipfastError as error:
        console.error(error)
        raise typer.Exit(FAILED) from None
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        console.error(named)
        raise typer.Exit(FAILED) from None
    except MemoryError:
        console.error("out of memory")
        raise typer.Exit(FAILED) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        console.error(f"out of memory: {error}")
        raise typer.Exit(FAILED) from None
