"""Kills and signals at random times: no image is lost, none counts twice, and the bits are those of one whole run."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import passing
import pytest
import torch
from passing import Noted, Pictures, alive, results, run

from clipfast.commands.interrupts import saving_interrupts
from clipfast.dataset.engines.local import LocalEngine
from clipfast.dataset.engines.ray import RayEngine
from clipfast.dataset.engines.waiting import ATTEMPTS
from clipfast.dataset.manifest import Manifest, is_collection
from clipfast.dataset.pieces import files

COUNT = 64  # images, 16 units
UNITS = COUNT // passing.UNIT
PAUSE = 0.03  # before an image: a unit takes a while
RESTART = 600.0  # seconds in which a killed worker is replaced, on a machine that does other things as well


class Losses(Noted):
    """Writes the number of every unit that a worker is lost at to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def lost(self, worker: str, unit: int, reason: str) -> None:
        with self._path.open("a") as file:
            file.write(f"{unit}\n")


def _collect(images: Pictures, out: Path, engine: str, workers: int, started: Path, losses: Path) -> None:
    """In a process of its own."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    torch.set_num_threads(1)
    with saving_interrupts() as interrupts:
        try:
            started.touch()
            run(images, out, LocalEngine(workers) if engine == "local" else RayEngine(workers), Losses(losses))
        except KeyboardInterrupt:
            os._exit(128 + (interrupts.received or 0))
    os._exit(0)


@pytest.fixture(scope="module")
def server() -> Any:
    """Starts processes that have imported everything already, and have run nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return passing.draw(tmp_path_factory.mktemp("faults") / "images", COUNT)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process gives that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "c"
    run(Pictures(images), out)
    return results(out)


class Rounds:
    """Runs on one folder after another, interrupted until there were enough.

    Args:
        server: starts processes.
        folder: for everything.
        images: that are collected.
        engine: that collects them.
        workers: of the engine.
        whole: what every collection must hold in the end.
    """

    def __init__(
        self, server: Any, folder: Path, images: Path, engine: str, workers: int, whole: dict[str, Any]
    ) -> None:
        self._server, self._engine, self._workers, self._whole = server, engine, workers, whole
        self.log, self.out, self.started = folder / "log", folder / "c", folder / "started"
        self.losses = folder / "losses"
        self._images = Pictures(images, pause=PAUSE, log=self.log)
        self.interruptions = self.total = 0
        self.process: BaseProcess | None = None

    @property
    def begun(self) -> int:
        """How often a worker has begun with a unit."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    @property
    def left(self) -> int:
        """Units that have no record."""
        return len(Manifest(self.out).unfinished()) if is_collection(self.out) else UNITS

    @property
    def in_danger(self) -> bool:
        """Whether there is a unit that would be given up if one more worker were lost at it."""
        lost = Counter(map(int, self.losses.read_text().split()))
        return any(lost[unit] + 1 >= ATTEMPTS for unit in Manifest(self.out).unfinished())

    @property
    def pid(self) -> int:
        assert self.process is not None
        assert self.process.pid is not None
        return self.process.pid

    def start(self) -> None:
        """Goes on with the folder; returns when signals are heeded."""
        self.started.unlink(missing_ok=True)
        self.losses.write_text("")
        arguments = (self._images, self.out, self._engine, self._workers, self.started, self.losses)
        self.process = self._server.Process(target=_collect, args=arguments)
        self.process.start()
        passing.wait_for(self.started.exists)

    def ended(self, seconds: float = 300.0) -> int | None:
        """Waits for the end; the exit code."""
        assert self.process is not None
        self.process.join(seconds)
        return self.process.exitcode

    def workers(self) -> list[int]:
        """Process ids of the workers that compute, or start."""
        name = "process.py" if self._engine == "local" else "ray::Actor"
        return sorted(pid for pid in passing.descendants(self.pid) if name in passing.title(pid))

    def count(self) -> None:
        """Notes an interruption."""
        self.interruptions += 1
        self.total += 1

    def check_state(self) -> None:
        """Whatever has been interrupted: what has a record is whole."""
        if is_collection(self.out):
            manifest = Manifest(self.out)
            for record in manifest.records():
                assert files(manifest.data / record.folder) == record.files

    def finish(self) -> None:
        """Runs to the end, checks everything, and begins a new folder."""
        self.start()
        assert self.ended() == 0
        assert results(self.out) == self._whole
        assert UNITS <= self.begun <= UNITS + self._workers * self.interruptions
        shutil.rmtree(self.out)
        self.log.unlink()
        self.interruptions = 0


@pytest.fixture
def rounds(
    request: pytest.FixtureRequest, server: Any, images: Path, whole: dict[str, Any], tmp_path: Path
) -> Iterator[Rounds]:
    engine, workers = request.param
    made = Rounds(server, tmp_path, images, engine, workers, whole)
    yield made
    if made.process is not None and made.process.is_alive():
        made.process.kill()
        made.process.join()


def on(*, quick: bool = False) -> Any:
    """Twenty rounds: few with one worker, most with two, and few with Ray, which takes long to start.

    ``CLIPFAST_FAULT_ROUNDS=20`` takes twenty with two workers and twenty with Ray.

    Args:
        quick: whether the first of these counts as quick.
    """
    slow, many = pytest.mark.slow, os.environ.get("CLIPFAST_FAULT_ROUNDS")
    local, ray = (int(many), int(many)) if many else (14, 4)
    cases = [
        pytest.param(("local", 1), 2, 0, id="local-2", marks=() if quick else slow),
        pytest.param(("local", 2), local, 1, id=f"local-{local}", marks=slow),
        pytest.param(("ray", 2), ray, 3, id=f"ray-{ray}", marks=slow),
    ]
    return pytest.mark.parametrize(("rounds", "count", "seed"), cases, indirect=["rounds"])


def interrupt(rounds: Rounds, count: int, rng: random.Random, send: Callable[[], int | None]) -> None:
    """Starts and interrupts until there were so many interruptions, and after each one looks at what is on disk.

    Args:
        rounds: the runs.
        count: how many.
        rng: for the times.
        send: sends a signal to the run; gives the exit code it must have, None where the run was done before.
    """
    while rounds.total < count:
        target = rounds.begun + rng.choice([0, 1, 1, 2, 3])
        rounds.start()
        deadline = time.monotonic() + 120
        while rounds.begun < target and rounds.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 4 * PAUSE * passing.UNIT if target else 3.0))
        workers = rounds.workers()
        expected = send()
        code = rounds.ended()
        passing.wait_for(lambda own=workers: not any(map(alive, own)), 20)
        if code != 0:
            assert code == expected
            rounds.count()
        rounds.check_state()
        if code == 0 or rounds.left < 4:
            rounds.finish()
    rounds.finish()


@on(quick=True)
@pytest.mark.slow
def test_killed_drivers(count: int, seed: int, rounds: Rounds) -> None:
    def kill() -> int:
        os.kill(rounds.pid, signal.SIGKILL)
        return -signal.SIGKILL

    interrupt(rounds, count, random.Random(seed), kill)


@on()
def test_signals_to_drivers_and_their_groups(count: int, seed: int, rounds: Rounds) -> None:
    """Ctrl-C goes to every process of the terminal; a job's end to all of them, or to the first alone."""
    rng = random.Random(seed)

    def send() -> int:
        number = rng.choice([signal.SIGINT, signal.SIGTERM])
        (os.kill if rng.random() < 0.3 else os.killpg)(rounds.pid, number)
        return 128 + number

    interrupt(rounds, count, rng, send)


@on()
def test_killed_workers(count: int, seed: int, rounds: Rounds) -> None:
    """Also those that start; the run goes on. It would not if a unit lost three."""
    rng = random.Random(seed)
    while rounds.total < count:
        rounds.start()
        while rounds.left > 4 and rounds.total < count:
            target = rounds.begun + rng.choice([1, 1, 2])
            passing.wait_for(lambda target=target: rounds.begun >= target or rounds.left <= 4, RESTART)
            time.sleep(rng.uniform(0, 4 * PAUSE * passing.UNIT))
            passing.wait_for(lambda: not rounds.in_danger, RESTART)
            if workers := rounds.workers():
                os.kill(rng.choice(workers), signal.SIGKILL)
                rounds.count()
        assert rounds.ended() == 0
        rounds.finish()
