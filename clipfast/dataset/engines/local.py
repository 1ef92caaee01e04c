"""Workers that are processes of this machine, each with a model of its own; the weights are shared through a file."""

import logging
import pickle
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from logging import LogRecord
from multiprocessing.connection import wait
from types import FunctionType
from typing import Any

import torch

from clipfast.dataset.engines.child import Child
from clipfast.dataset.engines.engine import Events
from clipfast.dataset.engines.pool import Lost, Pool
from clipfast.dataset.engines.raised import Raised
from clipfast.dataset.engines.serving import Begin, Ready
from clipfast.dataset.engines.waiting import ATTEMPTS, LostWorkersError, Waiting
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.worker import Job, Outcome, Progress, default_threads
from clipfast.errors import InputError

_GRACE = 5.0  # seconds, for a process to end
_CORES_PER_WORKER = 8

logger = logging.getLogger("clipfast")


class LocalEngine:
    """Computes units in processes of this machine.

    The processes are started anew, not forked, and do not run the main program. Each gets the next unit when it has
    finished one. They end when this process ends, however it does. One that ends in the middle of a unit, killed when
    memory runs out for example, is replaced, and its unit computed again.

    Args:
        workers: how many; default one per device; on the CPU one per eight cores, or as many as fit with the job's
            threads.
        devices: where they compute, in turn; default every CUDA device, or the CPU, as the job's device says.

    Raises:
        InputError: fewer than one worker.
    """

    def __init__(self, workers: int | None = None, devices: Sequence[str] | None = None) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"{workers} workers cannot compute anything: give 1 or more")
        self._workers, self._devices = workers, tuple(devices or ())

    def run(self, job: Job, units: Sequence[int], events: Events) -> None:
        """As :meth:`.Engine.run`.

        Raises:
            LostWorkersError: workers end again and again, at one unit or before they begin.
            WorkerError: a fault in a worker.
        """
        if not units:
            return
        devices = self._devices or _devices_like(job.device)
        workers = self._workers or _default_workers(devices, job.threads)
        threads = job.threads or default_threads(workers)
        pickled = _pickled(job)
        slots = [
            _Slot(str(number), Begin(pickled, devices[number % len(devices)], threads, logger.getEffectiveLevel()))
            for number in range(min(workers, len(units)))
        ]
        waiting = Waiting(units, Manifest(job.folder))
        _Processes(slots, waiting).run(events)
        waiting.raise_given_up()


@dataclass
class _Slot:
    """A place for one worker after another.

    Attributes:
        name: of the worker in it.
        begin: what it is sent first.
        child: its process, None where there is none.
        ready: whether it has its model.
        unit: that it computes.
        failures: how many ended before they were ready, one after the other.
    """

    name: str
    begin: Begin
    child: Child | None = None
    ready: bool = False
    unit: int | None = None
    failures: int = 0


class _Processes(Pool):
    """The processes of a pass."""

    def __init__(self, slots: Sequence[_Slot], waiting: Waiting) -> None:
        super().__init__()
        self._slots, self._waiting = slots, waiting
        self._wake, self._woken = socket.socketpair()
        self._hurry_at = float("inf")

    def work(self) -> None:
        """As :meth:`.Pool.work`."""
        while not self.stopping and not self._waiting.done:
            self._employ()
            sources = [source for slot in self._slots if slot.child is not None for source in slot.child.sources]
            wait([self._woken, *sources])
            for slot in self._slots:
                self._hear(slot)

    def end(self) -> None:
        """As :meth:`.Pool.end`."""
        children = [slot.child for slot in self._slots if slot.child is not None]
        for child in children:
            child.ask_to_end()
        deadline = time.monotonic() + _GRACE
        for child in children:
            child.end(max(0.0, deadline - time.monotonic()))

    def hurry(self) -> None:
        """As :meth:`.Pool.hurry`; kills processes if it takes long, as the thread may wait for one that is stopped."""
        self._hurry_at = min(self._hurry_at, time.monotonic() + 2 * _GRACE)
        self._wake.send(b"\0")
        if time.monotonic() > self._hurry_at:
            for slot in self._slots:
                if slot.child is not None:
                    slot.child.kill()

    def _employ(self) -> None:
        """Gives units to workers that have none, and starts as many workers as there are units left."""
        for slot in self._slots:
            if slot.child is not None and slot.ready and slot.unit is None:
                slot.unit = self._waiting.take()
                if slot.unit is not None:
                    slot.child.send(slot.unit)
        starting = sum(slot.child is not None and not slot.ready for slot in self._slots)
        for slot in self._slots:
            if slot.child is None and slot.failures < ATTEMPTS and starting < len(self._waiting):
                slot.child = Child(slot.begin.threads)
                slot.child.send(slot.begin)
                starting += 1

    def _hear(self, slot: _Slot) -> None:
        if slot.child is None:
            return
        for message in slot.child.hear():
            match message:
                case Ready():
                    slot.ready, slot.failures = True, 0
                case Progress() | LogRecord():
                    self.tell(slot.name, message)
                case Outcome():
                    self._waiting.finished(message.unit)
                    slot.unit = None
                    self.tell(slot.name, message)
                case Raised():
                    raise message.error()
        if slot.child.ended is not None:
            self._lose(slot, slot.child.ended)

    def _lose(self, slot: _Slot, ending: str) -> None:
        """Makes room for another worker."""
        assert slot.child is not None
        slot.child.end(0)
        unit, was_ready = slot.unit, slot.ready
        slot.child, slot.ready, slot.unit = None, False, None
        if unit is not None:
            reason = f"ended {ending}"
            self.tell(slot.name, self._waiting.lost(unit, reason) or Lost(unit, reason))
        elif not was_ready:
            slot.failures += 1
            if all(each.child is None and each.failures >= ATTEMPTS for each in self._slots):
                raise LostWorkersError(f"no worker can be started: {ATTEMPTS} ended at their start, the last {ending}")


def _devices_like(device: str) -> tuple[str, ...]:
    """All devices of a kind: every CUDA device, or the CPU."""
    if torch.device(device).type != "cuda":
        return (device,)
    return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count())) or (device,)


def _default_workers(devices: Sequence[str], threads: int | None) -> int:
    if any(torch.device(device).type != "cpu" for device in devices):
        return len(devices)
    return max(1, default_threads(1) // (threads or _CORES_PER_WORKER))


class _Pickler(pickle.Pickler):
    """Refuses what only the main program has."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | FunctionType) and value.__module__ == "__main__":
            raise InputError(
                f"{value.__qualname__} is defined in the main program, which workers do not run: put it into a module, "
                "or collect with engine='serial'"
            )
        return NotImplemented


def _pickled(job: Job) -> bytes:
    """A job for processes that do not run the main program.

    Raises:
        InputError: it cannot be pickled.
    """
    file = BytesIO()
    try:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(job)
    except InputError:
        raise
    except (pickle.PicklingError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(
            f"these images or labels cannot be handed to other processes ({error}): collect with engine='serial'"
        ) from None
    return file.getvalue()
