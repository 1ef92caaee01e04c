"""Opening input files: regular files and links to them, nothing that can wait or has no end."""

import os
import socket
import sys
import threading
from pathlib import Path

import pytest

from clipfast.inputs import open_regular, printable, read_part

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs and devices as POSIX has them")
SECONDS = 20.0


def refused(path: Path) -> str:
    """The reason why a path is not opened, from a thread, so that waiting for ever fails the test."""
    reasons: list[str] = []

    def attempt() -> None:
        try:
            open_regular(path).close()
        except OSError as error:
            reasons.append(error.strerror or "")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive(), "opening waits"
    assert reasons, "it was opened"
    return reasons[0]


def test_regular_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"abc"


def test_a_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    assert refused(tmp_path / "a.jpg") == refused(tmp_path / "link.jpg") == "a FIFO, not a regular file"


def test_a_fifo_that_replaces_the_file_after_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    regular = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda path: regular)
    os.mkfifo(tmp_path / "a.jpg")
    assert refused(tmp_path / "a.jpg") == "a FIFO, not a regular file"


def test_devices_sockets_and_folders_are_refused(tmp_path: Path) -> None:
    assert refused(Path("/dev/zero")) == "a device, not a regular file"
    assert refused(tmp_path) == "a folder, not a file"
    here = os.getcwd()
    os.chdir(tmp_path)  # a socket's path has at most 108 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("s")
            assert refused(tmp_path / "s") == "a socket, not a regular file"
    finally:
        os.chdir(here)


def test_links_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "gone").symlink_to("nowhere")
    assert "symbolic links" in refused(tmp_path / "self")
    assert refused(tmp_path / "gone") == "No such file or directory"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_a_refused_file_leaves_no_descriptor_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    regular = os.stat(__file__)
    monkeypatch.setattr(os, "stat", lambda path: regular)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refused(tmp_path / "a.jpg")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a b.jpg", "a b.jpg"),
        ("größe 大.jpg", "größe 大.jpg"),
        ("a\nb", "a\\nb"),
        ("a\u2028b\u2029c\x85d", "a\\u2028b\\u2029c\\x85d"),
        ("\udcff\udcfe.jpg", "\\udcff\\udcfe.jpg"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\u3000b\xa0c", "a\u3000b\xa0c"),
    ],
)
def test_names_in_messages_are_one_printable_line(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(Path(name)) == shown


def test_a_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcdef")
    assert read_part(tmp_path / "a", 2, 3) == b"cde"
    assert read_part(tmp_path / "a", 6, 0) == b""
    assert read_part(tmp_path / "a", 2, 5) is None
    assert read_part(tmp_path / "a", 1 << 62, 1 << 62) is None
    with pytest.raises(OSError, match="a device, not a regular file"):
        read_part("/dev/zero", 0, 5)


def test_a_part_that_takes_several_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the system reads at most 2 GiB."""
    (tmp_path / "a").write_bytes(b"abcdefgh")
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 3)))
    assert read_part(tmp_path / "a", 1, 7) == b"bcdefgh"
