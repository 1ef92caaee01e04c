"""Finding, naming and writing files; exit codes."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipfast.commands import console, outcome
from clipfast.commands.files import prepare_folder, read_texts, write_json
from clipfast.commands.outcome import OutOfMemory, exit_code_of, memory_for
from clipfast.dataset.files import distinct, find_images
from clipfast.errors import InputError


@given(st.lists(st.text("aAb-2.ß", min_size=0, max_size=4), max_size=12))
def test_names_are_different_without_case_too(labels: list[str]) -> None:
    names = distinct(labels)
    assert len(names) == len(labels)
    assert len({name.casefold() for name in names}) == len(names)
    assert all(name and not name.startswith(".") for name in names)


def test_a_given_name_is_not_taken_by_a_made_one() -> None:
    assert distinct(["cat", "cat", "cat-2"]) == ["cat", "cat-2", "cat-2-2"]
    assert len(distinct(["x" * 4000])[0].encode()) < 200


def test_folders_are_searched(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/1.jpg", "a.jpeg", ".hidden.jpg", ".cache/3.jpg", "note.txt", "out/old.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    result, missing, _ = find_images([tmp_path, tmp_path / "a.jpeg", tmp_path / "note.txt"], skip=tmp_path / "out")
    assert [str(source.path.relative_to(tmp_path)) for source in result] == ["a.jpeg", "b/1.jpg", "b/2.PNG", "note.txt"]
    assert [source.name for source in result] == ["a", "b__1", "b__2", "note"]
    assert missing == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder, word in ((file, "a file"), (file / "below", "Not a directory"), (Path("/proc/clipfast"), "cannot")):
        with pytest.raises(InputError, match=word):
            prepare_folder(folder)
    assert prepare_folder(tmp_path / "new" / "deep").is_dir()
    assert list((tmp_path / "new" / "deep").iterdir()) == []


def test_json_is_read_back(tmp_path: Path) -> None:
    content = {"a": [{"b": 1}, {"c": "ü\udcff"}], "d": [1, 2], "e": None, "f": []}
    write_json(tmp_path / "x.json", content)
    assert json.loads((tmp_path / "x.json").read_text()) == content


def test_texts(tmp_path: Path) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffein Hündchen\r\n\r\n a cat \na dog".encode())
    assert read_texts(["a dog"], file) == ["a dog", "ein Hündchen", "a cat"]
    file.write_bytes("one\u2028text\nanother\x85one\x0cof\x1cthem\n".encode())
    assert read_texts([], file) == ["one\u2028text", "another\x85one\x0cof\x1cthem"]
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_texts([], file)
    with pytest.raises(InputError, match="No such file"):
        read_texts([], tmp_path / "gone")


def test_out_of_memory_names_a_smaller_batch() -> None:
    with pytest.raises(OutOfMemory, match=r"--batch-size 4 \(it was 8\)"), memory_for(8, "cpu"):
        torch.empty(1 << 60)
    with pytest.raises(OutOfMemory, match="batch-size is 1"), memory_for(1, "cpu"):
        raise MemoryError
    with pytest.raises(OutOfMemory, match="on cuda"), memory_for(2, "cuda"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="something else"), memory_for(2, "cpu"):
        raise RuntimeError("something else")


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (InputError("a\nb"), 2, "error: a b"),
        (OSError(28, "No space left on device", "x.png"), 2, "error: x.png: No space left on device"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (KeyboardInterrupt("0 of 3 are done"), 130, "error: interrupted: 0 of 3 are done"),
        (MemoryError(), 2, "error: out of memory"),
    ],
)
def test_exit_codes(
    raised: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(console, "set_up", lambda: None)
    assert exit_code_of(raising(raised)) == code
    assert capsys.readouterr().err.splitlines() == [line]


def test_an_internal_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "set_up", lambda: None)
    with pytest.raises(KeyError):
        exit_code_of(raising(KeyError("x")))


def test_a_signal_at_any_moment_of_a_command_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SIGTERM at every call and every return, where Python runs handlers of signals, while one is installed."""
    monkeypatch.setattr(console, "set_up", lambda: None)
    monkeypatch.setattr(outcome, "_SIGNALS", (signal.SIGTERM,))

    def code_with_signal_at(target: int) -> tuple[int, bool]:
        passed = 0

        def profile(*_: Any) -> None:
            nonlocal passed
            if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
                passed += 1
                if passed == target:
                    signal.raise_signal(signal.SIGTERM)

        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.setprofile(profile)
        try:
            code = exit_code_of(lambda: 0)
        finally:
            sys.setprofile(None)
            signal.signal(signal.SIGTERM, before)
        return code, passed >= target

    codes, target = [], 1
    while (ended := code_with_signal_at(target))[1]:
        codes.append(ended[0])
        target += 1
    assert len(codes) > 10
    assert set(codes) == {143}
    assert set(capsys.readouterr().err.splitlines()) == {"error: interrupted"}
