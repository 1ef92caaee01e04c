"""What is seen of a pass while it runs: lines of JSON, a live line on a terminal, and what ``--log-to`` writes."""

import json
import os
import pty
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
from commandline import COMMAND, heed_signals, inside, picture

from clipfast.commands.progress import open_log, scalars, showing, words
from clipfast.commands.quantities import (
    bytes_text,
    count_text,
    duration,
    hours_text,
    parse_count,
    plural,
)
from clipfast.dataset.plan import Unit
from clipfast.dataset.progress import Snapshot, Tracker
from clipfast.dataset.worker import Outcome, Progress
from clipfast.errors import InputError, MissingExtra

NOW = Snapshot(
    seconds=61.5,
    images=12_345,
    failed=2,
    units=3,
    all_units=10,
    lost=0,
    rate=123.456,
    shares={"read": 0.05, "decode": 0.25, "compute": 0.6, "write": 0.1},
    left=3723,
    workers=2,
    devices=("cuda:0", "cuda:1"),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    for number in range(40):
        picture(number).save(folder / f"{number:02}.png")
    (folder / "99.png").write_bytes(b"damaged")
    return folder


def lines(stderr: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]


def test_a_short_run_has_a_final_line_alone(images: Path, model_folder: Path, tmp_path: Path) -> None:
    done = inside("collect", images, "--model", model_folder, "--device", "cpu", "--out", tmp_path / "c")
    (line,) = lines(done.stderr)
    assert (line["images"], line["failed"], line["units"], line["all_units"]) == (41, 1, 1, 1)
    assert (line["seconds_left"], line["workers"], line["devices"]) == (0, 1, ["cpu"])
    assert sum(line["shares"].values()) == pytest.approx(1, abs=0.01)  # type: ignore[attr-defined]


def test_a_line_per_interval(images: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--batch-size", 1, "--unit-size", 4, "--interval", 0.05, "--out", tmp_path / "c"]
    done = inside("collect", images, "--model", model_folder, *arguments)
    assert done.returncode == 2
    some = lines(done.stderr)
    assert len(some) > 1
    counts = [line["images"] for line in some]
    assert counts == sorted(counts)
    assert counts[-1] == 41
    assert [line["all_units"] for line in some] == [11] * len(some)


@pytest.mark.slow
def test_a_terminal_has_one_live_line_and_no_json(images: Path, model_folder: Path, tmp_path: Path) -> None:
    """stderr is a terminal, stdout is not: the table there is without escapes."""
    master, slave = pty.openpty()
    arguments = ["collect", images, "--model", model_folder, "--device", "cpu", "--batch-size", 1, "--out", "c"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"},
        preexec_fn=heed_signals,
    )
    os.close(slave)
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:
                return
            if not data:
                return
            seen.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    assert process.stdout is not None
    stdout = process.stdout.read().decode()
    assert process.wait(120) == 2
    reader.join()
    os.close(master)
    stderr = b"".join(seen).decode()
    assert " of 1 units" in stderr
    assert '"images_per_second"' not in stderr
    assert "\x1b" not in stdout
    assert stdout.startswith("# 40 images")


def test_tensorboard_gets_the_numbers(images: Path, model_folder: Path, tmp_path: Path) -> None:
    """Read back by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ["--device", "cpu", "--log-to", "tensorboard", "--out", tmp_path / "c"]
    done = inside("collect", images, "--model", model_folder, *arguments)
    assert done.returncode == 2
    events = accumulator.EventAccumulator(str(tmp_path / "c" / "logs"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"images", "failed", "units", "images_per_second", "share/decode", "hours_left"} <= tags
    (last,) = events.Scalars("images")
    assert (last.step, last.value) == (41, 41)
    assert events.Scalars("failed")[-1].value == 1
    assert inside("collection", "validate", tmp_path / "c").returncode == 0  # is no part of the collection


def test_wandb_offline_or_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    if find_spec("wandb") is None:
        with pytest.raises(
            MissingExtra, match=r"--log-to wandb needs the package wandb: pip install 'clipfast\[wandb\]'"
        ):
            open_log("wandb", tmp_path, {})
        return
    log = open_log("wandb", tmp_path, {"batch_size": 8})
    assert log is not None
    log.write(NOW)
    log.close()
    assert list((tmp_path / "logs").rglob("*.wandb"))


def test_no_log_without_being_asked(tmp_path: Path) -> None:
    assert open_log(None, tmp_path, {}) is None
    assert list(tmp_path.iterdir()) == []


def test_a_log_gets_every_interval_and_the_end() -> None:
    class Kept:
        def __init__(self) -> None:
            self.written: list[Snapshot] = []
            self.enough, self.closed = threading.Event(), False

        def write(self, snapshot: Snapshot) -> None:
            assert not self.closed
            self.written.append(snapshot)
            if len(self.written) == 3:
                self.enough.set()

        def close(self) -> None:
            self.closed = True

    log, tracker = Kept(), Tracker([Unit("files", "", 0, 10, number=0)])
    with showing(tracker, 0.01, log):
        assert log.enough.wait(30)
        tracker.progressed("0", Progress(0, 10, 0, {"read": 1.0}))
        tracker.finished(Outcome(0, {"ok": 10}))
    assert log.closed
    assert len(log.written) >= 4
    assert (log.written[-1].images, log.written[-1].left) == (10, 0)


def test_the_log_is_closed_when_the_pass_fails() -> None:
    class Kept:
        closed = False

        def write(self, snapshot: Snapshot) -> None:
            pass

        def close(self) -> None:
            self.closed = True

    log = Kept()
    with pytest.raises(KeyboardInterrupt), showing(Tracker([]), 10, log):
        raise KeyboardInterrupt
    assert log.closed


def test_words_of_the_live_line() -> None:
    assert " · ".join(words(NOW)) == (
        "3 of 10 units · 12,345 images, 2 failed · 123.5 images/s · read 5%, decode 25%, compute 60%, write 10% · "
        "1:02:03 left · cuda:0, cuda:1"
    )
    empty = Tracker([Unit("shard", "a.tar", size=9, number=0)]).snapshot()
    assert words(empty) == ["0 of 1 units", "0 images"]


def test_scalars_leave_out_what_is_not_known() -> None:
    assert scalars(NOW)["hours_left"] == pytest.approx(3723 / 3600)
    assert "hours_left" not in scalars(Tracker([Unit("shard", "a.tar", size=9, number=0)]).snapshot())


def test_help_needs_no_package_for_data() -> None:
    heavy = ("tensorboard", "wandb", "ray", "pyarrow", "zarr", "xarray", "pandas", "webdataset", "fsspec", "datasets")
    code = f"import sys, clipfast.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------- quantities


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), ("1000", 1000), ("1.5k", 1500), ("100M", 10**8), ("5B", 5 * 10**9), ("5 b", 5 * 10**9), ("1,024", 1024)],
)
def test_counts_are_read(text: str, count: int) -> None:
    assert parse_count(text, "--images") == count


@pytest.mark.parametrize("text", ["", "0", "-3", "5X", "many", "1e9", "0.1", "5BB"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--images is .*: give a number such as 1000, 100M or 5B"):
        parse_count(text, "--images")


def test_quantities_in_words() -> None:
    assert [bytes_text(size) for size in (0, 999, 49_152, 245.76e12, 999_900, 2e15)] == [
        "0 B",
        "999 B",
        "49.2 kB",
        "246 TB",
        "1 MB",
        "2 PB",
    ]
    assert [count_text(count) for count in (5, 1000, 1_500_000, 5 * 10**9)] == ["5", "1,000", "1.5 M", "5 B"]
    assert [hours_text(seconds) for seconds in (42, 119, 150, 5400, 86400 * 12, 86400 * 5120)] == [
        "42 s",
        "119 s",
        "2.5 min",
        "1.5 h",
        "12 days",
        "5,120 days",
    ]
    assert [duration(seconds) for seconds in (0, 9.6, 123, 3723)] == ["0:00", "0:10", "2:03", "1:02:03"]
    assert (plural(1, "worker"), plural(2000, "worker")) == ("1 worker", "2,000 workers")
