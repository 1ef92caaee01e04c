"""Ray actors as workers: the same bits as one process gives, and what becomes of those that end or raise."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clusters
import passing
import pytest
from passing import EndsItsWorker, Noted, Pictures, Troubled, results, run

from clipfast.dataset.engines import actor
from clipfast.dataset.engines.actor import check_sees
from clipfast.dataset.engines.raised import WorkerError
from clipfast.dataset.engines.ray import Places, RayEngine, _check_answers, _landmarks, places
from clipfast.dataset.engines.waiting import LostWorkersError
from clipfast.dataset.manifest import RUN, Manifest
from clipfast.errors import InputError, MissingExtra

COUNT = 24  # images, 6 units


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return passing.draw(tmp_path_factory.mktemp("ray") / "images", COUNT)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process gives."""
    out = tmp_path_factory.mktemp("whole") / "c"
    run(Pictures(images), out)
    return results(out)


_NODES: list[clusters.Node] = []
"""Of the cluster of :func:`address`."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a cluster with room for three workers."""
    with clusters.cluster(3) as (address, nodes):
        _NODES[:] = nodes
        yield address
        _NODES.clear()


def actors() -> list[int]:
    """Process ids of the actors of that cluster that have begun; other tests may have clusters of their own."""
    return [pid for node in _NODES for pid in node.processes() if "ray::Actor" in passing.title(pid)]


@pytest.mark.slow
def test_a_cluster_of_its_own(
    images: Path, whole: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is there for the pass alone; nothing is printed, no file is left in the home folder, no handler is changed."""
    clusters.import_ray()
    handler, environment, noted = signal.getsignal(signal.SIGTERM), dict(os.environ), Noted()
    home, before = Path.home() / ".ray", passing.descendants(os.getpid())
    was_there = home.exists()
    summary = run(Pictures(images, pause=0.1), tmp_path / "c", RayEngine(1), noted)
    assert results(tmp_path / "c") == whole
    assert (summary.units, summary.left, summary.lost) == (6, 0, 0)
    assert sum(progress.done for _, progress in noted.progress) == COUNT
    assert sum(progress.failed for _, progress in noted.progress) == summary.failed == 3
    assert sorted(outcome.unit for outcome in noted.outcomes) == list(range(6))
    assert capfd.readouterr() == ("", "")
    assert (signal.getsignal(signal.SIGTERM), dict(os.environ), home.exists()) == (handler, environment, was_there)
    passing.wait_for(lambda: not any(map(passing.alive, passing.descendants(os.getpid()) - before)))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_same_bits_for_any_number_of_actors(
    workers: int, address: str, images: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    noted = Noted()
    run(Pictures(images), tmp_path / "c", RayEngine(workers, address=address), noted)
    assert results(tmp_path / "c") == whole
    assert sum(progress.done for _, progress in noted.progress) == COUNT


class KillsAnActor(Noted):
    """Kills an actor when a unit is done."""

    def finished(self, outcome: Any) -> None:
        super().finished(outcome)
        if len(self.outcomes) == 1:
            os.kill(random.choice(actors()), signal.SIGKILL)


@pytest.mark.slow
def test_an_actor_that_is_killed_is_replaced(
    address: str, images: Path, whole: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    events = KillsAnActor()
    summary = run(Pictures(images, pause=0.2), tmp_path / "c", RayEngine(1, address=address), events)
    assert (summary.units, summary.lost) == (6, 1)
    [(worker, _, reason)] = events.losses
    assert (worker, reason) == ("0", "was lost (The actor is dead because its worker process has died)")
    assert capfd.readouterr() == ("", "")
    run(Pictures(images), tmp_path / "c")  # removes what the killed actor left
    assert results(tmp_path / "c") == whole


@pytest.mark.slow
def test_a_unit_that_ends_three_actors_ends_the_pass_when_all_others_are_done(
    address: str, images: Path, tmp_path: Path
) -> None:
    troubled = Troubled(images, unit=1, trouble="fault")
    with pytest.raises(
        LostWorkersError, match=r"unit 1 \(.*images\): 3 workers were lost at it, the last one was lost"
    ):
        run(troubled, tmp_path / "c", RayEngine(2, address=address))
    assert Manifest(tmp_path / "c").finished() == {0, 2, 3, 4, 5}


@pytest.mark.slow
def test_actors_that_end_before_they_begin(address: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(LostWorkersError, match=r"^no worker can be started on the Ray cluster: 3 ended at their start"):
        run(EndsItsWorker(images), tmp_path / "c", RayEngine(1, address=address))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "kind", "message"),
    [
        ("full", OSError, "[Errno 28] No space left on device: '/data/array'"),
        ("input", InputError, "a label is missing"),
        ("bug", WorkerError, "ZeroDivisionError: division by zero"),
    ],
)
def test_errors_of_an_actor_are_those_of_the_pass(
    trouble: str, kind: type[Exception], message: str, address: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind) as caught:
        run(Troubled(images, unit=0, trouble=trouble), tmp_path / "c", RayEngine(1, address=address))
    assert type(caught.value) is kind
    assert str(caught.value).endswith(message)
    assert (str(caught.value) == message) == (trouble != "bug")
    assert actors() == []


class Interrupts(Noted):
    """Ctrl-C, when a unit is done."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: list[int] = []

    def finished(self, outcome: Any) -> None:
        self.actors = actors()
        raise KeyboardInterrupt


@pytest.mark.slow
def test_actors_end_with_the_pass(address: str, images: Path, tmp_path: Path) -> None:
    events = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        run(Pictures(images, pause=0.2), tmp_path / "c", RayEngine(2, address=address), events)
    assert events.actors
    assert not any(map(passing.alive, events.actors))


@pytest.mark.slow
def test_in_a_program_that_uses_ray_itself(address: str, images: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """Its cluster is used, and there afterwards; and inputs of its main program are handed over."""
    path = [folder for folder in sys.path if folder]
    text = f"""
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import ray
from passing import Pictures, run
from clipfast.dataset.engines.ray import RayEngine
class Mine(Pictures): pass
ray.init(address={address!r}, log_to_driver=False, logging_level="CRITICAL")
print(run(Mine(Path({str(images)!r})), Path({str(tmp_path / "c")!r}), RayEngine(1)).units, ray.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.stdout == "6 True\n", done.stderr
    assert results(tmp_path / "c") == whole


@pytest.mark.slow
def test_a_node_that_ends(images: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    """A cluster of two nodes with one CPU each, of which one is killed in the middle: the other one does the rest."""
    log = tmp_path / "log"
    with clusters.cluster(1, 1) as (address, nodes):

        class KillsANode(Noted):
            def finished(self, outcome: Any) -> None:
                super().finished(outcome)
                busy = {worker for worker, _ in self.progress}
                if len(nodes[1].processes()) and len(busy) == 2:
                    nodes[1].kill()

        events = KillsANode()
        pictures = Pictures(passing.draw(tmp_path / "more", 64), pause=0.2, log=log)
        summary = run(pictures, tmp_path / "c", RayEngine(2, address=address), events)
        assert nodes[1].processes() == []
    assert (summary.units, summary.left) == (16, 0)
    [(_, _, reason)] = events.losses
    assert reason.startswith("was lost (The actor ")
    assert len(log.read_text().splitlines()) <= 16 + 1
    run(pictures, tmp_path / "c")  # removes what the node left
    run(Pictures(tmp_path / "more"), tmp_path / "serial")
    assert results(tmp_path / "c") == results(tmp_path / "serial")


# ---------------------------------------------------------------------------------------------- without a cluster


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"^the engine ray needs the package ray: pip install 'clipfast\[ray\]'$"):
        RayEngine()


@pytest.mark.parametrize("address", ["nonsense", "host:99999999", "ray://host"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InputError, match="is no address of a Ray cluster: give HOST:PORT"):
        _check_answers(address)


def test_a_cluster_that_is_not_there(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters.import_ray()
    address = f"127.0.0.1:{clusters.free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=rf"^no Ray cluster answers at {address} \(Connection refused\)"):
        run(Pictures(images), tmp_path / "c", RayEngine())


def test_places() -> None:
    small, large = {"CPU": 4.0}, {"CPU": 32.0}
    with_gpus = {"CPU": 64.0, "GPU": 8.0}
    cpu = {"num_gpus": 0}
    assert places([small, large], None, None, False) == Places(9, 4, "cpu", cpu | {"num_cpus": 4})
    assert places([large], None, None, False) == Places(4, 8, "cpu", cpu | {"num_cpus": 8})
    assert places([small, large, {}], 18, None, False) == Places(18, 2, "cpu", cpu | {"num_cpus": 2})
    assert places([small], 9, None, False) == Places(9, 1, "cpu", cpu | {"num_cpus": 1})
    assert places([small], None, 3, False) == Places(1, 3, "cpu", cpu | {"num_cpus": 3})
    gpu = {"num_gpus": 1, "num_cpus": 8}
    assert places([small, with_gpus], None, None, False) == Places(8, 8, "cuda", gpu)
    assert places([with_gpus, with_gpus], 3, 2, False) == Places(3, 2, "cuda", {"num_gpus": 1, "num_cpus": 2})
    assert places([with_gpus], None, None, True) == Places(8, 8, "cpu", cpu | {"num_cpus": 8})
    for nodes, threads in (([small], 5), ([{}], None), ([], 2)):
        with pytest.raises(InputError, match=r"^no node of the Ray cluster has \d CPUs"):
            places(nodes, None, threads, False)
    with pytest.raises(InputError, match=r"^0 workers cannot compute anything"):
        RayEngine(0)


def test_what_a_node_has_to_see(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor, "_PATIENCE", 0.0)
    run(Pictures(images), tmp_path / "c")
    name = (tmp_path / "c" / RUN).read_text()
    landmarks = _landmarks(Manifest(tmp_path / "c").plan, range(6))
    assert str(images) in landmarks
    assert str(images / "000.png") in landmarks
    check_sees(tmp_path / "c", name, landmarks)
    with pytest.raises(InputError, match=r"^node .* of the Ray cluster does not see .*/d: give an --out on a file"):
        check_sees(tmp_path / "d", name, [])
    with pytest.raises(InputError, match=r"^node .* of the Ray cluster sees another collection in .*/c: give an"):
        check_sees(tmp_path / "c", "other", [])
    with pytest.raises(InputError, match=r"^node .* of the Ray cluster does not see /no/such: put the images on a"):
        check_sees(tmp_path / "c", name, ["/no/such"])


def test_a_file_system_that_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the run before, for a while."""
    (tmp_path / RUN).write_text("before")
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / RUN).write_text("now"))
    check_sees(tmp_path, "now", [])
