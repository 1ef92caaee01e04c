"""What engines with other processes have in common: a thread that sees to the workers, apart from signals."""

import logging
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from logging import LogRecord
from queue import Empty, SimpleQueue
from typing import Any

from clipfast.dataset.engines.engine import Events
from clipfast.dataset.worker import Outcome, Progress

_BETWEEN_LOOKS = 0.01  # seconds


@dataclass(frozen=True)
class Lost:
    """A worker that ended in the middle of a unit.

    Attributes:
        unit: its number.
        reason: how it ended.
    """

    unit: int
    reason: str


class Pool(ABC):
    """Workers, seen to by a thread of its own.

    A signal's handler runs in the main thread and may raise anywhere there: between the start of a process and the note
    of it, for example. In this thread nothing interrupts. What happens is passed on in the thread that calls
    :meth:`run`.
    """

    def __init__(self) -> None:
        self._stopping, self._watching = False, True
        self._happened: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._see_to_them, name="clipfast-workers", daemon=True)

    def run(self, events: Events) -> None:
        """Has everything computed. Every worker has ended when this returns or raises, also when it is interrupted.

        Raises:
            BaseException: what a worker, the events or a signal's handler raise.
        """
        try:
            self._thread.start()
            while (happened := self._next()) is not None:
                _pass_on(happened, events)
        finally:
            self._stop()

    @abstractmethod
    def work(self) -> None:
        """Starts workers and gives them units; returns when all is done, or soon after :attr:`stopping` is set."""

    @abstractmethod
    def end(self) -> None:
        """Ends all workers and waits for their ends."""

    @abstractmethod
    def hurry(self) -> None:
        """Called in another thread, again and again until the thread has ended: it is to stop."""

    @property
    def stopping(self) -> bool:
        """Whether the rest is not wanted any more."""
        return self._stopping

    def tell(self, worker: str, message: Progress | Outcome | Lost | LogRecord) -> None:
        """Notes what has happened to a worker."""
        self._happened.put((worker, message))

    def watch(self) -> bool:
        """Called in the thread of :meth:`run` while nothing happens, some times a second; whether to call it again."""
        return False

    def _next(self) -> Any:
        while self._watching:
            try:
                return self._happened.get(timeout=_BETWEEN_LOOKS)
            except Empty:
                self._watching = self.watch()
        return self._happened.get()

    def _see_to_them(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self._happened.put(error)
        try:
            self.end()
        except BaseException as error:
            self._happened.put(error)
        self._happened.put(None)

    def _stop(self) -> None:
        self._stopping = True
        interrupt: BaseException | None = None
        while self._thread.is_alive():
            try:
                self.hurry()
                self._thread.join(1.0)
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt


def _pass_on(happened: Any, events: Events) -> None:
    """Tells what has happened.

    Raises:
        BaseException: the thing itself, where it is an error.
    """
    if isinstance(happened, BaseException):
        raise happened
    worker, message = happened
    match message:
        case Progress():
            events.progressed(worker, message)
        case Outcome():
            events.finished(message)
        case Lost():
            events.lost(worker, message.unit, message.reason)
        case LogRecord():
            logging.getLogger(message.name).handle(message)
