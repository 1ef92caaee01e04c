"""Processes as workers: the same bits as one process gives, and what becomes of those that end or raise."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import passing
import pytest
import torch
from passing import EndsItsWorker, Noted, Pictures, Troubled, results, run

from clipfast.dataset.collecting import collect
from clipfast.dataset.engines import local
from clipfast.dataset.engines.local import LocalEngine
from clipfast.dataset.engines.raised import Raised, WorkerError
from clipfast.dataset.engines.waiting import LostWorkersError
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.labelling import Labeller
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.plan import UnitError
from clipfast.dataset.worker import Outcome, Progress, StaleRunError
from clipfast.errors import InputError, MissingExtra, UnsupportedTower

COUNT = 24  # images, 6 units


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return passing.draw(tmp_path_factory.mktemp("local") / "images", COUNT)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process gives."""
    out = tmp_path_factory.mktemp("whole") / "c"
    run(Pictures(images), out)
    return results(out)


@pytest.fixture(autouse=True)
def _no_processes_stay() -> Iterator[None]:
    before = passing.children(os.getpid())
    yield
    assert passing.children(os.getpid()) - before == set()


@pytest.mark.parametrize("workers", [2, *(pytest.param(workers, marks=pytest.mark.slow) for workers in (1, 3))])
def test_the_same_bits_for_any_number_of_workers(
    workers: int, images: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    noted = Noted()
    summary = run(Pictures(images), tmp_path / "c", LocalEngine(workers), noted)
    assert results(tmp_path / "c") == whole
    assert summary.units == 6
    assert (summary.left, summary.lost, noted.losses) == (0, 0, [])
    assert sorted(outcome.unit for outcome in noted.outcomes) == list(range(6))
    assert sum(progress.done for _, progress in noted.progress) == COUNT
    assert sum(progress.failed for _, progress in noted.progress) == summary.failed == 3
    assert {worker for worker, _ in noted.progress} <= {str(number) for number in range(workers)}


@pytest.mark.slow
def test_inputs_of_users_with_labels(images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for path in sorted(images.iterdir())[:5]:
            shard.add(path, path.name)
    shutil.copytree(images, tmp_path / "photos" / "cats")
    held = []
    for engine in (None, LocalEngine(1)):
        out = tmp_path / type(engine).__name__
        inputs = open_inputs([tmp_path / "shard.tar", tmp_path / "photos"])
        labeller = Labeller("parent")
        summary = collect(
            inputs, out, passing.tiny_model(), passing.OPTIONS, labeller=labeller, engine=engine, threads=1
        )
        assert summary.statuses == {"ok": 5 + 21, "no_image": 3}
        held.append((results(out), summary.statuses, summary.notes, summary.labels))
    assert held[0] == held[1]


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(images: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    noted = Noted()
    troubled = Troubled(images, unit=2, trouble="kill", once=tmp_path / "done")
    summary = run(troubled, tmp_path / "c", LocalEngine(1), noted)
    assert noted.losses == [("0", 2, "ended by SIGKILL")]
    assert (summary.units, summary.lost) == (6, 1)
    with pytest.raises(AssertionError):  # the folder of the unit that was not finished is still there
        results(tmp_path / "c")
    run(troubled, tmp_path / "c", LocalEngine(1), noted)  # nothing to do
    assert results(tmp_path / "c") == whole


@pytest.mark.slow
@pytest.mark.parametrize(("trouble", "how"), [("fault", "by SIGSEGV"), ("exit", "with exit status 7")])
def test_a_unit_that_ends_three_workers_ends_the_pass_when_all_others_are_done(
    trouble: str, how: str, images: Path, tmp_path: Path
) -> None:
    noted = Noted()
    with pytest.raises(LostWorkersError) as caught:
        run(Troubled(images, unit=1, trouble=trouble), tmp_path / "c", LocalEngine(1), noted)
    assert f"unit 1 ({images}): 3 workers were lost at it, the last one ended " in str(caught.value)
    assert how in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [(unit, how in reason) for _, unit, reason in noted.losses] == [(1, True)] * 3
    assert Manifest(tmp_path / "c").finished() == {0, 2, 3, 4, 5}


@pytest.mark.slow
def test_workers_that_end_before_they_begin(images: Path, tmp_path: Path) -> None:
    with pytest.raises(LostWorkersError) as caught:
        run(EndsItsWorker(images), tmp_path / "c", LocalEngine(1))
    assert str(caught.value) == (
        "no worker can be started: 3 ended at their start, the last with exit status 9 (ModuleNotFoundError: no such "
        "module)"
    )


@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("full", OSError, "[Errno 28] No space left on device: '/data/array'"),
        pytest.param("input", InputError, "a label is missing", marks=pytest.mark.slow),
        ("bug", WorkerError, "ZeroDivisionError: division by zero"),
    ],
)
@pytest.mark.slow
def test_errors_of_a_worker_are_those_of_the_pass(
    trouble: str, kind: type[Exception], message: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        run(Troubled(images, unit=0, trouble=trouble), tmp_path / "c", LocalEngine(1))
    assert type(caught.value) is kind
    if kind is WorkerError:
        assert str(caught.value).startswith("a worker failed:\nTraceback (most recent call last):\n")
        assert "in _divide" in str(caught.value)
        assert str(caught.value).endswith(message)
    else:
        assert str(caught.value) == message
    if isinstance(caught.value, OSError):
        assert caught.value.filename == "/data/array"


@pytest.mark.parametrize(
    "error",
    [
        InputError("one line"),
        StaleRunError("taken over"),
        MissingExtra("ray", "ray", "this"),
        UnsupportedTower("name", ["a", "b"]),
        UnitError("damaged", "cut"),
        OSError("without a number"),
        FileNotFoundError(2, "No such file", "/x"),
        PermissionError(13, "Permission denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_the_user_can_mend_travel(error: Exception) -> None:
    again = Raised.of(error).error()
    assert str(again) == str(error)
    assert isinstance(again, OSError) == isinstance(error, OSError)
    assert type(again) is type(error)


@pytest.mark.slow
def test_what_a_worker_inherits_and_prints(
    images: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads and signals are its own; nothing is seen of it but warnings of clipfast."""
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    told = tmp_path / "told"
    with caplog.at_level(logging.WARNING):
        run(Troubled(images, unit=0, trouble="noise", once=told), tmp_path / "c", LocalEngine(1))
    assert [(record.name, record.levelno, record.getMessage()) for record in caplog.records] == [
        ("clipfast", logging.WARNING, "3 images are strange")
    ]
    assert capfd.readouterr() == ("", "")
    have = json.loads(told.read_text())
    assert Path(have.pop("main")).name == "process.py"
    assert have == {"torch": 1, "omp": "1", "sigint": True, "blocked": []}


class EndsThePass(Noted):
    """Raises at the first event of a kind."""

    def __init__(self, kind: str, error: BaseException) -> None:
        super().__init__()
        self.kind, self.error, self.workers = kind, error, set[int]()

    def _note(self, kind: str) -> None:
        if kind == self.kind:
            self.workers = passing.processes()
            raise self.error

    def progressed(self, worker: str, progress: Progress) -> None:
        self._note("progressed")

    def finished(self, outcome: Outcome) -> None:
        self._note("finished")


@pytest.mark.parametrize(
    ("kind", "error"),
    [("progressed", KeyboardInterrupt()), pytest.param("finished", InputError("enough"), marks=pytest.mark.slow)],
)
@pytest.mark.slow
def test_workers_end_with_the_pass(kind: str, error: BaseException, images: Path, tmp_path: Path) -> None:
    events = EndsThePass(kind, error)
    with pytest.raises(type(error)) as caught:
        run(Pictures(images, pause=0.2), tmp_path / "c", LocalEngine(2), events)
    assert caught.value is error
    assert events.workers
    assert not any(map(passing.alive, events.workers))


@pytest.mark.slow
def test_a_worker_that_does_not_listen_ends_too(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is stopped, and the pass interrupted by a signal, twice."""
    monkeypatch.setattr(local, "_GRACE", 0.2)
    once = tmp_path / "stopped"
    workers: set[int] = set()

    def interrupt() -> None:
        passing.wait_for(once.exists)
        workers.update(passing.processes())
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Troubled(images, unit=0, trouble="stop", once=once), tmp_path / "c", LocalEngine(1))
        thread.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(workers) == 1
    assert not any(map(passing.alive, workers))


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from passing import Pictures, run, Noted
from clipfast.dataset.engines.local import LocalEngine
print("main")
{more}
summary = run(images, Path({out!r}), LocalEngine(1))
print(summary.units)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stdin", "-c", "script"])
def test_a_program_without_a_main_guard(how: str, images: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """And in a folder with a file that has the name of a module that workers import."""
    (tmp_path / "ray.py").write_text("raise SystemExit(1)")
    (tmp_path / "pickle.py").write_text("raise SystemExit(1)")
    out = tmp_path / "c"
    path = [folder for folder in sys.path if folder]
    text = SCRIPT.format(path=path, out=str(out), more=f"images = Pictures(Path({str(images)!r}))")
    (tmp_path / "program.py").write_text(text)
    arguments = {"-c": ["-c", text], "stdin": ["-"], "script": ["program.py"]}[how]
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=tmp_path,
        input=text if how == "stdin" else "",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("main\n6\n", "")
    assert results(out) == whole


@pytest.mark.slow
def test_an_input_of_the_main_program_is_refused(images: Path, tmp_path: Path) -> None:
    more = f"class Mine(Pictures): pass\nimages = Mine(Path({str(images)!r}))"
    text = SCRIPT.format(path=[folder for folder in sys.path if folder], out=str(tmp_path / "c"), more=more)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "clipfast.errors.InputError: Mine is defined in the main program, which workers do not run: put it into a "
        "module, or collect with engine='serial'"
    )


def test_an_input_that_cannot_be_pickled_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"these images or labels cannot be handed to other processes \(.*lambda"):
        run(Pictures(images, log=lambda: None), tmp_path / "c", LocalEngine(1))  # type: ignore[arg-type]


def test_devices_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(local, "default_threads", lambda workers: 20 // workers)
    assert local._devices_like("cpu") == ("cpu",)
    assert local._devices_like("cuda:1") == ("cuda:0", "cuda:1", "cuda:2")
    assert local._default_workers(("cuda:0", "cuda:1"), None) == 2
    assert local._default_workers(("cpu",), None) == 2
    assert local._default_workers(("cpu",), 5) == 4
    assert local._default_workers(("cpu",), 50) == 1
    with pytest.raises(InputError, match=r"^0 workers cannot compute anything"):
        LocalEngine(0)
