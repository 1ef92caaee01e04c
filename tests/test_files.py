"""clipfast.files: atomic writes, which follow no link and leave nothing behind."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clipfast.commands.files import prepare_folder, write_json
from clipfast.files import atomic_write, write_text


def test_the_new_file_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for text in ("first", "second \u2028 \udcff".encode("utf-8", "replace").decode()):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert os.listdir(tmp_path) == ["result.json"]


@pytest.mark.parametrize("durable", [True, False])
def test_mode_is_that_of_the_umask(tmp_path: Path, durable: bool) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a", durable=durable) as partial:
            partial.unlink()
            partial.touch(mode=0o600)  # as writers do that replace the file
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half of the n")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_planted_links_are_not_followed(tmp_path: Path) -> None:
    """Under the result's name, and under the temporary names that earlier versions used."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("stats.json", ".stats.json.part", f".clipfast-{os.getpid()}"):
        (out / name).symlink_to(victim)
    prepare_folder(out)
    write_json(out / "stats.json", {"a": 1})
    assert victim.read_text() == "precious"
    assert not (out / "stats.json").is_symlink()
    assert (out / "stats.json").read_text() == '{\n  "a": 1\n}\n'


def test_probing_a_folder_creates_nothing_behind_a_dangling_link(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    (out / f".clipfast-{os.getpid()}").symlink_to(elsewhere)
    prepare_folder(out)
    assert not elsewhere.exists()


def test_errors_name_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        write_text(tmp_path / "gone" / "a", "text")
    assert raised.value.filename == str(tmp_path / "gone" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as raised_too:
        write_text(tmp_path / "folder", "text")
    assert raised_too.value.filename == str(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_that_grows_over_the_limit_leaves_the_old_one(tmp_path: Path) -> None:
    """The limit on a file's size acts as a full disk does: the write fails in the middle."""
    path = tmp_path / "file"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            write_text(path, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    script = (
        "import sys; from clipfast.files import write_text\n"
        "for text in ('a', 'b') * 10**6: write_text(sys.argv[1], text * 10**6, durable=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "file")])
    while not (tmp_path / "file").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    text = (tmp_path / "file").read_text()
    assert text in ("a" * 10**6, "b" * 10**6)
