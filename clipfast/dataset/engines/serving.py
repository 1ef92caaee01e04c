"""A worker of the local engine: computes the units that the driver names, and tells what becomes of them."""

import logging
import os
import pickle
import threading
from dataclasses import dataclass, replace
from logging.handlers import QueueHandler
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from clipfast.dataset.engines.raised import Raised
from clipfast.dataset.worker import Worker


@dataclass(frozen=True)
class Begin:
    """The driver's first message.

    Attributes:
        job: a pickled :class:`~clipfast.dataset.worker.Job`.
        device: where the worker computes.
        threads: of the worker.
        level: of the driver's logger.
    """

    job: bytes
    device: str
    threads: int
    level: int


@dataclass(frozen=True)
class Ready:
    """The worker has its model and waits for units."""


def serve(connection: Connection, first: bytes) -> None:
    """Computes units until the driver closes the connection; then the process ends, in the middle of a unit too.

    Over the connection come numbers of units. Back go :class:`Ready`,
    :class:`~clipfast.dataset.worker.Progress` and :class:`~clipfast.dataset.worker.Outcome`, log records, and at most
    one :class:`.Raised`, which is the last.

    Args:
        connection: to the driver.
        first: its first message, a pickled :class:`Begin`.
    """
    driver = _Driver(connection)
    try:
        begin = pickle.loads(first)
        _forward_log(driver, begin.level)
        job = pickle.loads(begin.job)
        worker = Worker(replace(job, device=begin.device, threads=begin.threads))
        driver.send(Ready())
        while True:
            driver.send(worker.run(driver.units.get(), driver.send))
    except BaseException as error:
        driver.send(Raised.of(error))
        threading.Event().wait()  # the driver closes the connection


class _Driver:
    """The other end of the connection; the process ends with it.

    Attributes:
        units: what it sends.
    """

    def __init__(self, connection: Connection) -> None:
        self.units: SimpleQueue[Any] = SimpleQueue()
        self._connection = connection
        self._sending = threading.Lock()
        threading.Thread(target=self._listen, name="clipfast-driver", daemon=True).start()

    def send(self, message: object) -> None:
        """Sends something, from any thread."""
        data = pickle.dumps(message)
        try:
            with self._sending:
                self._connection.send_bytes(data)
        except OSError:
            os._exit(0)

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            self.units.put(message)


class _Forwarding(QueueHandler):
    """Sends log records to the driver, as text."""

    def __init__(self, driver: _Driver) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._driver = driver

    def enqueue(self, record: logging.LogRecord) -> None:
        """Sends a record."""
        self._driver.send(record)


def _forward_log(driver: _Driver, level: int) -> None:
    logger = logging.getLogger("clipfast")
    logger.setLevel(level)
    logger.propagate = False
    logger.handlers[:] = [_Forwarding(driver)]
