"""``clipfast collect`` interrupted by signals, kills, full disks and short memory: every image counts once."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import heed_signals, inside, picture

import clipfast as package
from clipfast.commands.collect import command as collecting
from clipfast.commands.collect.command import run
from clipfast.commands.collect.options import DataOptions, KeptOptions, Options
from clipfast.commands.interrupts import saving_interrupts
from clipfast.contributions import Contributions
from clipfast.dataset.collection import Collection
from clipfast.dataset.manifest import Manifest, is_collection
from clipfast.errors import InputError
from clipfast.model import Model

COUNT = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, among them some that cannot be read."""
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    for number in range(COUNT):
        picture(number).save(folder / f"{number:02}.png")
    for name in ("05b.png", "06b.png", "17b.png", "99.png"):
        (folder / name).write_bytes(b"damaged")
    return folder


def _run(arguments: list[str], limit: int | None, ready: Any) -> None:
    """In a process of its own: the command, ended by Ctrl-C before it begins as a Python program is."""
    from clipfast.cli import main

    heed_signals()
    ready.set()
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["clipfast", *arguments]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except KeyboardInterrupt:  # multiprocessing would end with 1
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def server() -> Any:
    """Starts processes that have imported everything already, and have run nothing yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clipfast.commands.collect.command", "clipfast.cli", __name__])
    return context


def start(server: Any, arguments: list[object], limit: int | None = None) -> BaseProcess:
    ready = server.Event()  # before it, multiprocessing would end the process with 1
    process: BaseProcess = server.Process(target=_run, args=([str(each) for each in arguments], limit, ready))
    process.start()
    assert ready.wait(300)
    return process


def ended(process: BaseProcess) -> int | None:
    process.join(300)
    return process.exitcode


def contents(folder: Path) -> dict[int, object]:
    return {record.unit: (record.statuses, record.files) for record in Manifest(folder).records()}


def assert_same(have: Path, expected: Path) -> None:
    """Every byte that the records name, and the merged moments; and nothing else is left."""
    assert contents(have) == contents(expected)
    assert (have / "moments.safetensors").read_bytes() == (expected / "moments.safetensors").read_bytes()
    assert len(list((have / "data").iterdir())) == len(Manifest(have).finished())
    assert not list(have.glob(".plan-*"))


@pytest.fixture(scope="module")
def whole(server: Any, images: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The collection of a pass that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "c"
    assert ended(start(server, command(images, model_folder, folder))) == 2  # some cannot be read
    return folder


def command(images: Path, model: Path, out: Path) -> list[object]:
    return ["collect", images, "--model", model, "--batch-size", 3, "--unit-size", 4, "--device", "cpu", "--out", out]


def taken(folder: Path) -> int:
    """How many units a pass has finished, -1 before it begins to write."""
    return len(Manifest(folder).finished()) if is_collection(folder) else -1


def interrupt(process: BaseProcess, folder: Path, number: int, seconds: float, units: int = 0) -> None:
    """Sends a signal some time after the pass has finished so many more units."""
    target = max(taken(folder), 0) + units
    while taken(folder) < target and process.is_alive():
        time.sleep(0.002)
    time.sleep(seconds)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda each: each.name)
@pytest.mark.slow
def test_signals_save_what_is_done(
    number: int, server: Any, images: Path, model_folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    process = start(server, command(images, model_folder, out))
    interrupt(process, out, number, 0.0, units=2)
    code = ended(process)
    assert code == 128 + number or Manifest(out).complete  # it may have been done before
    assert len(Manifest(out).finished()) >= 2
    assert Collection(out, unfinished=True).moments.count > 0
    assert ended(start(server, command(images, model_folder, out))) == 2
    assert_same(out, whole)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1,))])
def test_interrupts_and_kills_at_random(
    seed: int, server: Any, images: Path, model_folder: Path, whole: Path, tmp_path: Path
) -> None:
    """Until a run comes to its end that another was interrupted before. After each, what is on disk can be read."""
    out, rng, interrupted = tmp_path / "c", random.Random(seed), 0
    for _ in range(200):
        process = start(server, command(images, model_folder, out))
        number = rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
        interrupt(process, out, number, rng.uniform(0, 0.05), rng.randrange(3))
        code = ended(process)
        if code == 2 and interrupted:
            break
        if code == 2:  # the pass was done before its signal came
            shutil.rmtree(out)
            continue
        assert code in (128 + number, -number)  # before anything is done, a signal just ends the process
        interrupted += 1
        if is_collection(out):
            try:
                state = Collection(out, unfinished=True)
            except InputError as error:
                assert "holds no image yet" in str(error)  # noqa: PT017
            else:
                assert sum(len(some) for some, _ in state.batches()) == state.moments.count
    assert interrupted
    assert_same(out, whole)


def test_full_disks(server: Any, images: Path, model_folder: Path, whole: Path, tmp_path: Path) -> None:
    """Runs whose files may grow to a limit that is four times as large each time."""
    out, limit, code = tmp_path / "c", 3000, 0
    codes = []
    while limit < 10**6:
        code = ended(start(server, command(images, model_folder, out), limit)) or 0
        codes.append(code)
        if is_collection(out) and Manifest(out).complete:
            break
        limit *= 4
    assert codes == [2] * len(codes)
    assert len(codes) > 2
    assert_same(out, whole)


def test_a_second_pass_is_refused_while_the_first_runs(
    server: Any, images: Path, model_folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "c"
    first = start(server, command(images, model_folder, out))
    while not (out / ".lock").exists() and first.is_alive():
        time.sleep(0.005)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)  # in the middle of its pass
    try:
        second = inside(*command(images, model_folder, out), cwd=tmp_path)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2
    assert f"error: {out} is being written by another process" in second.stderr
    assert ended(first) == 2
    assert_same(out, whole)


def test_ignored_signals_stay_ignored() -> None:
    """As under nohup; and handlers are as before afterwards."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with saving_interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_for_the_end_of_a_deferred_block() -> None:
    with pytest.raises(KeyboardInterrupt), saving_interrupts() as interrupts:  # noqa: PT012
        with interrupts.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            reached = True
        assert reached
        os.kill(os.getpid(), signal.SIGINT)  # the second signal does nothing
        interrupts.check()
    assert interrupts.received == signal.SIGTERM


def test_a_signal_that_a_library_turns_into_an_error() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt), saving_interrupts():  # noqa: PT012
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except KeyboardInterrupt:
                raise RuntimeError("Error while serializing: KeyboardInterrupt") from None
    finally:
        signal.signal(signal.SIGINT, before)


class ShortOfMemory(Model):
    """Decomposes at most ``limit`` images at once, and none of one colour: else torch itself runs out of memory."""

    limit = 4

    def decompose(self, images: Any, **options: Any) -> Contributions:
        if len(images) > self.limit or bool((images.flatten(2).amax(2) == images.flatten(2).amin(2)).all(1).any()):
            torch.empty(1 << 60)
        return super().decompose(images, **options)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    load = collecting.load_model

    def loaded(*arguments: Any) -> Model:
        model = load(*arguments)
        model.__class__ = ShortOfMemory
        return model

    monkeypatch.setattr(ShortOfMemory, "limit", limit)
    monkeypatch.setattr(collecting, "load_model", loaded)


def test_short_memory_divides_batches_and_names_images(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(20):
        picture(number).save(tmp_path / "images" / f"{number:02}.png")
    white = picture(0).point(lambda _: 255)
    white.save(tmp_path / "images" / "10-white.png")
    short_of_memory(monkeypatch, 4)
    data = DataOptions([str(tmp_path / "images")], model=str(model_folder), device="cpu", batch_size=10)
    options = Options(data, out=tmp_path / "c", kept=KeptOptions(store_dtype="float32"))
    assert run(options) == 2
    assert "out of memory with 10 images at once: going on with 5" in caplog.text
    assert "out of memory with 5 images at once: going on with 2" in caplog.text
    assert "10-white.png: out of memory on cpu" in capsys.readouterr().err
    collection = Collection(tmp_path / "c")
    assert [Path(failed["file"]).name for failed in collection.failures()] == ["10-white.png"]
    assert [Path(entry.file).name for entry in collection.entries] == [f"{number:02}.png" for number in range(20)]
    model = package.load(str(model_folder), device="cpu")
    for entries, contributions in collection.batches():
        expected = model.decompose([entry.file for entry in entries])
        assert torch.allclose(contributions.heads(), expected.heads(), atol=1e-5)
    assert sum(len(some) for some, _ in collection.batches()) == collection.moments.count == 20


def test_no_memory_for_a_single_image_ends_the_pass(
    images: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory(monkeypatch, 0)
    options = Options(DataOptions([str(images)], model=str(model_folder), device="cpu"), out=tmp_path / "c")
    with pytest.raises(package.ClipfastError, match="out of memory on cpu"):
        run(options)


def test_unfinished_collections(server: Any, images: Path, model_folder: Path, tmp_path: Path) -> None:
    """Other commands refuse one; ``collect`` warns, says that it is not complete, and ends with 2."""
    out = tmp_path / "c"
    process = start(server, command(images, model_folder, out))
    interrupt(process, out, signal.SIGKILL, 0, units=1)
    ended(process)
    before = contents(out)
    if Manifest(out).complete:
        pytest.skip("this machine was done before it could be interrupted")
    refused = inside("textspan", out, "--pool", "random", "--out", tmp_path / "o", cwd=tmp_path)
    assert refused.returncode == 2
    count = Collection(out, unfinished=True).count
    assert f"holds an unfinished pass ({len(before)} of 7 units)" in refused.stderr
    done = inside("collect", out, "--json", cwd=tmp_path)
    assert done.returncode == 2
    assert f"warning: {out} holds an unfinished pass: {len(before)} of 7 units, {count} images" in done.stderr
    result = json.loads(done.stdout)
    assert (result["complete"], result["images"]) == (False, count)
    assert contents(out) == before
