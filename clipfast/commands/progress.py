"""What is seen of a pass while it runs: a live line on a terminal, else a line of JSON per interval, on stderr.

``--log-to`` writes the same numbers for TensorBoard or Weights & Biases, too.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.live import Live
from rich.text import Text

from clipfast.commands import console
from clipfast.commands.interrupts import Interrupts
from clipfast.commands.passing import Shown
from clipfast.commands.quantities import duration, plural
from clipfast.dataset.progress import Snapshot, Tracker
from clipfast.dataset.worker import Outcome, Progress
from clipfast.errors import MissingExtra

LogTo = Literal["tensorboard", "wandb"]

LOGS = "logs"
"""Folder of a collection for what ``--log-to`` writes."""


class Tracked(Shown):
    """Events that are counted as well as shown.

    Args:
        tracker: counts.
        interrupts: end the pass when a signal has arrived that a library swallowed.
    """

    def __init__(self, tracker: Tracker, interrupts: Interrupts) -> None:
        super().__init__(interrupts)
        self._tracker = tracker

    def progressed(self, worker: str, progress: Progress) -> None:
        """A worker has computed some images of a unit."""
        self._tracker.progressed(worker, progress)
        super().progressed(worker, progress)

    def finished(self, outcome: Outcome) -> None:
        """A unit has its record."""
        self._tracker.finished(outcome)
        super().finished(outcome)

    def lost(self, worker: str, unit: int, reason: str) -> None:
        """A worker ended in the middle of a unit."""
        self._tracker.lost(worker, unit, reason)
        super().lost(worker, unit, reason)


class Log(Protocol):
    """Takes the numbers of a pass."""

    def write(self, snapshot: Snapshot) -> None:
        """How far the pass has come."""

    def close(self) -> None:
        """The pass has ended."""


class TensorBoardLog:
    """Scalars in an event file.

    Args:
        folder: where the file is made.

    Raises:
        MissingExtra: TensorBoard is not installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        require_log("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]

    def write(self, snapshot: Snapshot) -> None:
        """As :meth:`Log.write`; the step is the number of images."""
        for name, value in scalars(snapshot).items():
            self._writer.add_scalar(name, value, snapshot.images)  # type: ignore[no-untyped-call]
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """As :meth:`Log.close`."""
        self._writer.close()  # type: ignore[no-untyped-call]


class WandbLog:
    """A run of Weights & Biases.

    Args:
        folder: where the package keeps its files.
        settings: of the pass.

    Raises:
        MissingExtra: wandb is not installed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        require_log("wandb")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(project="clipfast", dir=str(folder), config=dict(settings))

    def write(self, snapshot: Snapshot) -> None:
        """As :meth:`Log.write`; the step is the number of images."""
        self._run.log(scalars(snapshot), step=snapshot.images)

    def close(self) -> None:
        """As :meth:`Log.close`."""
        self._run.finish()


def require_log(log_to: LogTo | None) -> None:
    """Checks that what ``--log-to`` needs is installed, before anything slow begins.

    Raises:
        MissingExtra: it is not.
    """
    if log_to is not None and find_spec(log_to) is None:
        raise MissingExtra(log_to, log_to, f"--log-to {log_to}")


def open_log(log_to: LogTo | None, collection: Path, settings: Mapping[str, Any]) -> Log | None:
    """Where the numbers of a pass go besides stderr; None for nowhere.

    Raises:
        MissingExtra: the package is not installed.
        OSError: the folder cannot be written.
    """
    if log_to == "tensorboard":
        return TensorBoardLog(collection / LOGS)
    return WandbLog(collection / LOGS, settings) if log_to == "wandb" else None


def scalars(snapshot: Snapshot) -> dict[str, float]:
    """The numbers of a snapshot by name."""
    left = {} if snapshot.left is None else {"hours_left": snapshot.left / 3600}
    return {
        "images": snapshot.images,
        "failed": snapshot.failed,
        "units": snapshot.units,
        "images_per_second": snapshot.rate,
        **{f"share/{stage}": share for stage, share in snapshot.shares.items()},
        **left,
    }


@contextmanager
def showing(tracker: Tracker | None, interval: float, log: Log | None = None) -> Iterator[None]:
    """Shows how far a pass has come until the block ends; then, where no terminal is, once more.

    Args:
        tracker: knows it; None where nothing is to be shown.
        interval: seconds between two lines of JSON.
        log: gets the same numbers, at the end, too.
    """
    if tracker is None:
        yield
        return
    with ExitStack() as stack:
        if log is not None:
            stack.callback(log.close)
        live = _live(tracker) if console.err.is_terminal else None
        if live is not None:
            stack.enter_context(live)
        stack.enter_context(_Ticking(tracker, interval, live is None, log))
        yield


class _Ticking(AbstractContextManager[None]):
    """A thread that writes at every interval, and once more at the end."""

    def __init__(self, tracker: Tracker, interval: float, lines: bool, log: Log | None) -> None:
        self._tracker, self._interval, self._lines, self._log = tracker, interval, lines, log
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clipfast-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._write()

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            self._write()

    def _write(self) -> None:
        snapshot = self._tracker.snapshot()
        if self._lines:
            console.err.print(Text(json.dumps(snapshot.to_json())))
        if self._log is not None:
            self._log.write(snapshot)


def _live(tracker: Tracker) -> Live:
    """The live line."""
    return Live(
        get_renderable=lambda: Text(" · ".join(words(tracker.snapshot()))),
        console=console.err,
        refresh_per_second=2,
        transient=True,
        redirect_stdout=console.out.is_terminal,  # else what is printed would go to the other stream
    )


def words(snapshot: Snapshot) -> Sequence[str]:
    """What the live line says, part by part."""
    failed = f", {snapshot.failed:,} failed" if snapshot.failed else ""
    shares = ", ".join(f"{stage} {share:.0%}" for stage, share in snapshot.shares.items())
    parts = [
        f"{snapshot.units:,} of {snapshot.all_units:,} units",
        f"{plural(snapshot.images, 'image')}{failed}",
        f"{snapshot.rate:,.1f} images/s" if snapshot.rate else "",
        shares,
        f"{duration(snapshot.left)} left" if snapshot.left is not None else "",
        ", ".join(snapshot.devices),
    ]
    return [part for part in parts if part]
