"""Disks that are full or read-only, limits of file sizes, and two runs on one folder: one clear line, and resumable."""

import multiprocessing
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import passing
import pytest
import torch
from passing import Pictures, results, run

from clipfast.dataset.engines.local import LocalEngine
from clipfast.dataset.manifest import Manifest, is_collection
from clipfast.errors import ClipfastError, InputError

COUNT = 32  # images, 8 units


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return passing.draw(tmp_path_factory.mktemp("disks") / "images", COUNT)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("whole") / "c"
    run(Pictures(images), out)
    return results(out)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "clipfast", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"this user cannot mount a file system: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def check_error(error: OSError, reason: str, folder: Path) -> None:
    """One line that says why, and names a file of the folder."""
    assert reason in str(error)
    assert str(folder) in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("workers", [None, pytest.param(1, marks=pytest.mark.slow)], ids=["serial", "local"])
def test_a_full_disk(workers: int | None, disk: Path, images: Path, whole: dict[str, Any]) -> None:
    """It grows after every run that fails, from before the first file to the end."""
    out, size, errors = disk / "c", 64, []
    while True:
        try:
            run(Pictures(images), out, workers and LocalEngine(workers))
            break
        except OSError as error:
            errors.append(error)
            check_error(error, "No space left on device", disk)
        size = size * 3 // 2
        remount(disk, f"size={size}k")
    assert len(errors) > 2
    assert workers is None or any("/c/data/" in str(error) for error in errors)  # in a worker
    run(Pictures(images), out)
    assert results(out) == whole


@pytest.fixture
def quota(tmp_path: Path) -> Iterator[Path]:
    """A file system with a quota of 256 kB, which holds for every user."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    image.touch()
    os.truncate(image, 256 << 20)
    commands: list[list[Any]] = [
        ["mkfs.btrfs", "--quiet", image],
        ["mount", "-o", "loop", image, folder],
        ["btrfs", "quota", "enable", folder],
        ["btrfs", "qgroup", "limit", "256k", folder],
    ]
    try:
        for command in commands:
            subprocess.run(command, capture_output=True, check=True)
        yield folder
    except FileNotFoundError as error:
        pytest.skip(f"no {error.filename} here")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system with a quota can be made here: {error.stderr.decode().strip()}")
    finally:
        if folder.is_mount():
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("workers", [None, pytest.param(1, marks=pytest.mark.slow)], ids=["serial", "local"])
def test_a_quota(workers: int | None, quota: Path, images: Path, whole: dict[str, Any]) -> None:
    """It grows after every run that fails."""
    out, size, errors = quota / "c", 256, 0
    while True:
        try:
            run(Pictures(images), out, workers and LocalEngine(workers))
            break
        except OSError as error:
            check_error(error, "Disk quota exceeded", quota)
        errors += 1
        size = size * 3 // 2
        subprocess.run(["btrfs", "qgroup", "limit", f"{size}k", quota], check=True)
    assert errors > 2
    run(Pictures(images), out)
    assert results(out) == whole


@pytest.mark.parametrize("workers", [None, 1], ids=["serial", "local"])
@pytest.mark.slow
def test_a_read_only_disk(workers: int | None, disk: Path, images: Path, whole: dict[str, Any]) -> None:
    remount(disk, "size=10m")
    with pytest.raises(KeyboardInterrupt):
        run(Pictures(images), disk / "c", events=StopsAt(3))
    remount(disk, "ro")
    for name in ("c", "new"):
        with pytest.raises(OSError, match="Read-only") as caught:
            run(Pictures(images), disk / name, workers and LocalEngine(workers))
        check_error(caught.value, "Read-only file system", disk)
    remount(disk, "rw")
    run(Pictures(images), disk / "c", workers and LocalEngine(workers))
    assert results(disk / "c") == whole


class StopsAt(passing.Noted):
    """Ends the pass after some units."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self._units = units

    def finished(self, outcome: Any) -> None:
        super().finished(outcome)
        if len(self.outcomes) == self._units:
            raise KeyboardInterrupt


# --------------------------------------------------------------------------------------- in a process of its own


def _collect(images: Pictures, out: Path, workers: int | None, limit: int | None, answer: Any) -> None:
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(images, out, workers and LocalEngine(workers))
        answer.send(None)
    except (ClipfastError, OSError) as error:
        answer.send((type(error), str(error), getattr(error, "errno", None)))


@pytest.fixture(scope="module")
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def start(server: Any, *arguments: Any) -> tuple[Any, Any]:
    """A process, and where its answer comes."""
    ours, theirs = server.Pipe(duplex=False)
    process = server.Process(target=_collect, args=(*arguments, theirs))
    process.start()
    theirs.close()
    return process, ours


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "factor"), [(None, 2.5), (1, 8)], ids=["serial", "local"])
def test_limits_of_file_sizes(
    workers: int | None, factor: float, server: Any, images: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """As a quota does: writing fails in the middle of a file."""
    out, limit, failures = tmp_path / "c", 500.0, 0
    while True:
        process, answer = start(server, Pictures(images), out, workers, int(limit))
        said = answer.recv()
        process.join()
        if said is None:
            break
        kind, text, _ = said
        failures += 1
        assert issubclass(kind, OSError), text
        assert "\n" not in text
        assert str(tmp_path) in text
        limit *= factor
        assert limit < 1e8
    assert failures > 2
    run(Pictures(images), out)
    assert results(out) == whole


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_one_ends(
    server: Any, images: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    """Also where that is stopped; and a kill releases the folder."""
    out, log = tmp_path / "c", tmp_path / "log"
    process, _ = start(server, Pictures(images, pause=0.1, log=log), out, 1, None)
    passing.wait_for(log.exists)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(InputError, match=rf"^{out} is being written by another process"):
        run(Pictures(images), out)
    process.kill()
    process.join()
    assert is_collection(out)
    run(Pictures(images), out)
    assert results(out) == whole
    assert Manifest(out).complete
