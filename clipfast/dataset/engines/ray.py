"""Workers that are actors of a Ray cluster, one of this machine alone or one that runs already."""

import logging
import os
import platform
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from clipfast.dataset.engines.actor import Actor, Begin, Report, Started
from clipfast.dataset.engines.engine import Events
from clipfast.dataset.engines.pool import Lost, Pool
from clipfast.dataset.engines.raised import Raised, WorkerError
from clipfast.dataset.engines.waiting import ATTEMPTS, LostWorkersError, Waiting
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.plan import Plan
from clipfast.dataset.worker import Job, default_threads
from clipfast.errors import InputError, MissingExtra

_BETWEEN_REPORTS = 0.5  # seconds
_GRACE = 10.0  # seconds, for an actor's process to end
_UNTIL_WARNING = 60.0  # seconds without any worker
_THREADS_PER_WORKER = 8
_OBJECT_STORE = 100 << 20  # bytes; a job and the outcomes of units are all that goes through it
_LANDMARKS = 16

_COMPUTING = "computing"
"""Calls of this group have a thread of the actor for themselves."""

logger = logging.getLogger("clipfast")


class RayEngine:
    """Computes units in actors of a Ray cluster.

    Each actor gets the next unit when it has finished one. One that ends, or whose node ends, is replaced as soon as
    the cluster has room, and its unit computed again. The collection, and images in files, have to be on a file system
    that all nodes see; ``clipfast`` has to be installed on each of them.

    Args:
        workers: how many; default one per GPU, or as many as the CPUs of the cluster have room for.
        devices: ``["cpu"]`` computes on CPUs though the cluster has GPUs.
        address: of a cluster that runs already, as :func:`ray.init` takes it; default that of ``RAY_ADDRESS`` where
            this is set. Without one, a cluster of this machine alone is started, and stopped at the end. In a program
            that has called :func:`ray.init` itself, that cluster is used.

    Raises:
        MissingExtra: Ray is not installed.
        InputError: fewer than one worker.
    """

    def __init__(
        self, workers: int | None = None, devices: Sequence[str] | None = None, address: str | None = None
    ) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"{workers} workers cannot compute anything: give 1 or more")
        self._ray = _imported()
        self._workers, self._devices, self._address = workers, tuple(devices or ()), address

    def run(self, job: Job, units: Sequence[int], events: Events) -> None:
        """As :meth:`.Engine.run`.

        Raises:
            InputError: there is no such cluster, or it has no room for a worker.
            LostWorkersError: workers end again and again, at one unit or before they begin.
            WorkerError: a fault in a worker.
        """
        if not units:
            return
        manifest = Manifest(job.folder)
        waiting, landmarks = Waiting(units, manifest), _landmarks(manifest.plan, units)
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        _Actors(self._ray, address, self._workers, self._devices, job, waiting, landmarks).run(events)
        waiting.raise_given_up()


def _imported() -> Any:
    # Ray prints what happens to its processes on the driver's stdout, and reads what not to print when it is imported.
    with _environment(RAY_DEDUP_LOGS_SKIP_REGEX="."):
        try:
            import ray
        except ImportError:
            raise MissingExtra("ray", "ray", "the engine ray") from None
    return ray


@contextmanager
def _settings(own: bool) -> Iterator[None]:
    """Ray's settings for a cluster of this machine alone, or those of the user; afterwards those of the user."""
    try:
        with _environment(**_own_settings() if own else {}):
            _read_again()
            yield
    finally:
        _read_again()


def _read_again() -> None:
    """Lets Ray read its settings again: it keeps how and with which token the first cluster of a process is used."""
    raylet: Any = import_module("ray._raylet")
    if hasattr(raylet, "AuthenticationTokenLoader"):  # else a version that has no tokens
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets variables of the environment for a while; afterwards those that Ray sets itself are as before, too."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_") or name == "PYTHONBREAKPOINT"]:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


_TOKEN = secrets.token_hex(32)


def _own_settings() -> dict[str, str]:
    """Variables of the environment for a cluster of this machine alone: others cannot use it, and nothing is reported.

    Without a token from here Ray would write one to the home folder, which changes how clusters behave that the user
    starts later.
    """
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    return settings if "RAY_AUTH_MODE" in os.environ else settings | {"RAY_AUTH_TOKEN": _TOKEN}


def _check_answers(address: str) -> None:
    """Ray itself waits for minutes where nobody listens.

    Raises:
        InputError: nobody listens.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None:
        if address not in ("local", "auto"):
            raise InputError(f"{address!r} is no address of a Ray cluster: give HOST:PORT, ray://HOST:PORT or auto")
        return
    try:
        socket.create_connection((host, port), timeout=_GRACE).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"no Ray cluster answers at {address} ({reason}): see `ray start --head`") from None


def _landmarks(plan: Plan, units: Sequence[int]) -> list[str]:
    """Some of the files and folders that units are read from and that are there: every node has to see them."""
    some = units[:: max(1, len(units) // _LANDMARKS)]
    paths = [path for unit in plan.units(some) for path in (unit.path, *unit.files[:1])]
    return [path for path in dict.fromkeys(paths) if path and os.path.exists(path)]


@dataclass(frozen=True)
class Places:
    """What a cluster has room for.

    Attributes:
        workers: how many.
        threads: of each.
        device: where each computes.
        resources: that each takes, as options of an actor.
    """

    workers: int
    threads: int
    device: str
    resources: Mapping[str, float]


def places(nodes: Sequence[Mapping[str, float]], workers: int | None, threads: int | None, cpu: bool) -> Places:
    """Divides a cluster among workers: one per GPU, or the CPUs where there are none.

    Args:
        nodes: ``CPU`` and ``GPU`` of every node.
        workers: how many are wanted; None for as many as there is room for.
        threads: of each; None to choose.
        cpu: whether GPUs stay idle.

    Raises:
        InputError: no node has room for one.
    """
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpu and not cpu:
        threads = threads or max(1, int(min(node.get("CPU", 0) // node["GPU"] for node in with_gpu)))
        count = workers or int(sum(node["GPU"] for node in with_gpu))
        return Places(count, threads, "cuda", {"num_gpus": 1, "num_cpus": threads})
    cpus = [int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1]
    if threads is None and cpus:
        threads = min(cpus) if workers is None else max(1, sum(cpus) // workers)
        threads = min(threads, *cpus, _THREADS_PER_WORKER)
    room = sum(each // threads for each in cpus) if threads else 0
    if not room or threads is None:
        raise InputError(f"no node of the Ray cluster has {threads or 1} CPUs: give fewer --threads, or add nodes")
    return Places(workers or room, threads, "cpu", {"num_gpus": 0, "num_cpus": threads})


@dataclass
class _Slot:
    """A place for one worker after another.

    Attributes:
        name: of the worker in it.
        actor: its handle, None where there is none.
        started: where it runs, None before it has its model.
        answer: to ``start`` or ``run``, None while it is idle.
        reports: the answer to ``reports``.
        unit: that it computes.
        failures: how many ended before they were ready, one after the other.
    """

    name: str
    actor: Any = None
    started: Started | None = None
    answer: Any = None
    reports: Any = None
    unit: int | None = None
    failures: int = 0


class _Actors(Pool):
    """The actors of a pass."""

    def __init__(
        self,
        ray: Any,
        address: str,
        workers: int | None,
        devices: Sequence[str],
        job: Job,
        waiting: Waiting,
        landmarks: Sequence[str],
    ) -> None:
        super().__init__()
        self._ray, self._address, self._job, self._waiting = ray, address, job, waiting
        self._wanted, self._cpu = workers, any(torch.device(device).type == "cpu" for device in devices)
        self._landmarks = landmarks
        self._slots: list[_Slot] = []
        self._is_theirs, self._connected = ray.is_initialized(), False

    def watch(self) -> bool:
        """Sets the handler of SIGTERM again until there is a connection: Ray replaces it by one that ends the process.

        It does so below Python, which knows its own handler still.
        """
        if self._is_theirs:
            return False
        connected, handler = self._connected, signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)
        return not connected

    def work(self) -> None:
        """As :meth:`.Pool.work`."""
        with self._cluster():
            try:
                self._work()
            finally:
                self._kill()

    def end(self) -> None:
        """As :meth:`.Pool.end`: they have ended already."""

    def hurry(self) -> None:
        """As :meth:`.Pool.hurry`: the thread looks by itself."""

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        """A connection to a cluster: what was there before is there afterwards."""
        if self._is_theirs:
            yield
            return
        own = self._address == "local"
        _check_answers(self._address)
        with _settings(own):
            try:
                self._ray.init(
                    address=self._address,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    **(self._own_size() if own else {}),
                )
            except Exception as error:  # Ray raises nothing narrower where a node does not start in time
                self._ray.shutdown()
                what = "a Ray cluster cannot be started" if own else f"no Ray cluster can be used at {self._address}"
                raise InputError(f"{what}: {_line(error.__cause__ or error)}") from error
            try:
                self._connected = True
                yield
            finally:
                self._ray.shutdown()

    def _own_size(self) -> dict[str, Any]:
        """Options of a cluster of this machine alone."""
        cores = default_threads(1)
        return {
            "num_cpus": max(cores, (self._wanted or 1) * (self._job.threads or 1)),
            "object_store_memory": _OBJECT_STORE,
            "include_dashboard": False,
        }

    def _work(self) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        plan = places(nodes, self._wanted, self._job.threads, self._cpu)
        self._slots = [_Slot(str(number)) for number in range(min(plan.workers, len(self._waiting)))]
        begin = self._ray.put(
            Begin(
                job=self._pickled(),
                path=[*map(str, sys.path)],
                device=plan.device,
                threads=plan.threads,
                level=logger.getEffectiveLevel(),
                landmarks=self._landmarks,
            )
        )
        as_actor = self._ray.remote(**plan.resources, concurrency_groups={_COMPUTING: 1}, scheduling_strategy="SPREAD")
        kind = as_actor(Actor)
        asked, alone = time.monotonic(), time.monotonic()
        while not self.stopping and not self._waiting.done:
            self._employ(kind, begin)
            if time.monotonic() - asked > _BETWEEN_REPORTS:
                self._ask()
                asked = time.monotonic()
            answers = [each for slot in self._slots for each in (slot.answer, slot.reports) if each is not None]
            self._ray.wait(answers, timeout=_BETWEEN_REPORTS)
            for slot in self._slots:
                self._hear(slot)
            if any(slot.started is not None for slot in self._slots):
                alone = time.monotonic()
            elif time.monotonic() - alone > _UNTIL_WARNING:
                logger.warning(
                    "no worker has run on the Ray cluster for %.0f seconds: it has no room for one or is slow",
                    _UNTIL_WARNING,
                )
                alone = float("inf")

    def _pickled(self) -> bytes:
        """The job, with what only the main program has."""
        try:
            return bytes(self._ray.cloudpickle.dumps(self._job))
        except Exception as error:  # whatever an object raises that does not want to be pickled
            raise InputError(
                f"these images or labels cannot be handed to other processes ({_line(error)}): collect with "
                "engine='serial'"
            ) from None

    def _employ(self, kind: Any, begin: Any) -> None:
        """Gives units to workers that have none, and asks for as many workers as there are units left."""
        for slot in self._slots:
            if slot.started is not None and slot.unit is None:
                slot.unit = self._waiting.take()
                if slot.unit is not None:
                    slot.answer = slot.actor.run.options(concurrency_group=_COMPUTING).remote(slot.unit)
        starting = sum(slot.actor is not None and slot.started is None for slot in self._slots)
        for slot in self._slots:
            if slot.actor is None and slot.failures < ATTEMPTS and starting < len(self._waiting):
                slot.actor = kind.remote()
                slot.answer = slot.actor.start.options(concurrency_group=_COMPUTING).remote(begin)
                starting += 1

    def _ask(self) -> None:
        """Asks those that compute how far they are."""
        for slot in self._slots:
            if slot.unit is not None and slot.reports is None:
                slot.reports = slot.actor.reports.remote()

    def _hear(self, slot: _Slot) -> None:
        """Takes the answers that have come."""
        try:
            if slot.reports is not None and self._has_come(slot.reports):
                self._report(slot, self._ray.get(slot.reports))
                slot.reports = None
            if slot.answer is None or not self._has_come(slot.answer):
                return
            answer = self._ray.get(slot.answer)
            if slot.reports is not None:  # what it says was before this answer
                self._report(slot, self._ray.get(slot.reports, timeout=_GRACE))
        except self._ray.exceptions.RayTaskError as error:
            raise WorkerError(f"a worker failed:\n{error}") from None
        except self._ray.exceptions.RayError as error:
            self._lose(slot, _ending(error))
            return
        slot.answer = slot.reports = None
        if isinstance(answer, Started):
            slot.started, slot.failures = answer, 0
            return
        outcome, reports = answer if isinstance(answer, tuple) else (answer, [])
        self._report(slot, reports)
        if isinstance(outcome, Raised):
            raise outcome.error()
        self._waiting.finished(outcome.unit)
        slot.unit = None
        self.tell(slot.name, outcome)

    def _has_come(self, answer: Any) -> bool:
        return bool(self._ray.wait([answer], timeout=0)[0])

    def _report(self, slot: _Slot, reports: Sequence[Report]) -> None:
        for report in reports:
            self.tell(slot.name, report)

    def _lose(self, slot: _Slot, reason: str) -> None:
        """Makes room for another worker."""
        with suppress(Exception):
            self._ray.kill(slot.actor)  # it may only be out of reach
        unit, was_ready = slot.unit, slot.started is not None
        slot.actor = slot.started = slot.answer = slot.reports = slot.unit = None
        if unit is not None:
            self.tell(slot.name, self._waiting.lost(unit, reason) or Lost(unit, reason))
        elif not was_ready:
            slot.failures += 1
            if all(each.actor is None and each.failures >= ATTEMPTS for each in self._slots):
                raise LostWorkersError(
                    f"no worker can be started on the Ray cluster: {ATTEMPTS} ended at their start, the last {reason}"
                )

    def _kill(self) -> None:
        """Ends all actors, and waits for those of this machine."""
        for slot in self._slots:
            if slot.actor is not None:
                with suppress(Exception):
                    self._ray.kill(slot.actor)
        here = [slot.started.pid for slot in self._slots if slot.started and slot.started.host == platform.node()]
        deadline = time.monotonic() + _GRACE
        while any(map(_runs, here)) and time.monotonic() < deadline:
            time.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether a process has not ended; a zombie, which its parent has not noticed, has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _line(error: BaseException) -> str:
    """The last thing that an error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ending(error: BaseException) -> str:
    """How an actor ended. Ray goes on with what may be the reason, and with numbers of its own."""
    return f"was lost ({_line(error).partition('. ')[0].rstrip('.')})"
