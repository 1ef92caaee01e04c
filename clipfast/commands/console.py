"""What the user sees: plain lines, tables and progress, and nothing that a library says to itself.

Results go to stdout, everything else to stderr. Colours, boxes and moving bars appear on a terminal only; elsewhere
a table is tab-separated lines, so that ``clipfast models | cut -f2`` works.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

_PACKAGE = str(Path(__file__).resolve().parent.parent)
_LONGEST = 800


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Carries on without output; rich would end the process with exit code 1."""
        _discard(sys.stderr if self.stderr else sys.stdout)


out = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def help_console() -> Console:
    """Where ``--help`` is printed."""
    return _Console()


def one_line(message: object) -> str:
    """Any message as one line of at most 800 characters."""
    text = " ".join(str(message).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _discard(stream: TextIO) -> None:
    """Points a stream whose reader has gone at the null device: the work goes on, its files are what counts."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def say(message: str) -> None:
    """A line of the result, on stdout, at once; lost where its reader has gone (``clipfast models | head``)."""
    try:
        print(message, flush=True)  # rich would turn tabs into spaces
    except BrokenPipeError:
        _discard(sys.stdout)


def flush() -> None:
    """Writes what is still buffered for stdout."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)


def note(message: str) -> None:
    """A remark that is no result, on stderr."""
    err.print(one_line(message))


def warn(message: object) -> None:
    """``warning: …`` on stderr."""
    err.print(Text("warning: ", style="yellow") + Text(one_line(message)))


def error(message: object) -> None:
    """``error: …`` on stderr."""
    err.print(Text("error: ", style="bold red") + Text(one_line(message)))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on stdout: boxed on a terminal, else a line per row with tabs, the headers behind ``#``."""
    if not out.is_terminal:
        if title:
            say(f"# {title}")
        say("\t".join(["# " + headers[0], *headers[1:]]))
        for row in rows:
            say("\t".join(" ".join(cell.split()) for cell in row))
        return
    boxed = Table(*headers, title=title, title_justify="left", header_style="bold")
    for row in rows:
        boxed.add_row(*(Text(cell) for cell in row))
    out.print(boxed, soft_wrap=False)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while it is a terminal, else nothing; yields a function that advances it."""
    if not err.is_terminal:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # stdout is only redirected through the bar's console where both are the same screen
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        redirect_stdout=out.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda steps: bar.advance(task, steps)


@contextlib.contextmanager
def status(what: str) -> Iterator[None]:
    """A spinner on stderr while it is a terminal, else nothing."""
    if not err.is_terminal:
        yield
        return
    with err.status(what):
        yield


def _open_closed_streams() -> None:
    """Opens the null device as every standard stream that is closed (``clipfast … >&-``).

    Else the next file that is opened gets its descriptor, and what a library prints goes into that file.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            stream = open(descriptor, "w" if descriptor else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


class _Ours(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        warn(record.getMessage())


def _show_ours(message: Warning | str, category: type[Warning], filename: str, *_: object) -> None:
    if os.path.realpath(filename).startswith(_PACKAGE):
        warn(message)


def set_up() -> None:
    """Lets clipfast's own warnings through as single lines and keeps the libraries' from the terminal.

    Call it before the libraries are imported: some read their log level from the environment then.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold bytes that are no text
    warnings.showwarning = _show_ours  # type: ignore[assignment]
    logging.getLogger().addHandler(logging.NullHandler())
    ours = logging.getLogger("clipfast")
    if not any(isinstance(handler, _Ours) for handler in ours.handlers):
        ours.addHandler(_Ours(logging.WARNING))
    ours.propagate = False
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not err.is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
