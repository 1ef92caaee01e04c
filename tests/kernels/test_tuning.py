"""The fastest of several ways: real computations, timed; the choice outlives the process."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipfast.kernels import tuning

WAYS = {("slow", "loop"): lambda x: [x @ x for _ in range(60)], ("fast", ""): lambda x: x @ x}
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def known(tmp_path: Path) -> tuning.Choices:
    return tuning.Choices(tmp_path / "choices" / "here.json")


def test_the_fastest_is_found_and_kept(known: tuning.Choices) -> None:
    assert tuning.fastest("square", [X], WAYS, known=known) == (("fast", ""), True)
    kept = json.loads(known.path.read_text())
    assert kept["square(float32[64x64])"]["chosen"] == ["fast", ""]
    times = kept["square(float32[64x64])"]["milliseconds"]
    assert 0 < times["fast"] < times["slow/loop"]


def test_a_choice_is_not_timed_again(known: tuning.Choices) -> None:
    tuning.fastest("square", [X], WAYS, known=known)

    def untouched(x: Tensor) -> Tensor:
        raise AssertionError("timed again")

    again = tuning.Choices(known.path)  # as another process reads it
    ways = dict.fromkeys(WAYS, untouched)
    assert tuning.fastest("square", [X], ways, known=again) == (("fast", ""), True)


def test_another_shape_is_another_question_but_not_another_batch(known: tuning.Choices) -> None:
    """Images are counted in powers of two."""
    assert tuning.key("op", [torch.ones(5, 3)]) == tuning.key("op", [torch.ones(8, 3)])
    keys = {
        tuning.key("op", [x, "cls", None])
        for x in (torch.ones(8, 3), torch.ones(9, 3), torch.ones(8, 4), torch.ones(8, 3).bfloat16(), torch.ones(3, 8).T)
    }
    assert len(keys) == 5
    assert tuning.key("op", [torch.ones(8, 3), "cls"]) != tuning.key("op", [torch.ones(8, 3), "mean"])


def test_what_an_operation_changes_is_copied_before_it_is_timed(known: tuning.Choices) -> None:
    x, delta = torch.zeros(4, 8), torch.ones(4, 8)
    ways = {("one", ""): lambda x, d, *_: x.add_(d), ("two", ""): lambda x, d, *_: x.add_(d).add_(0)}
    tuning.fastest("add_layer_norm", [x, delta, delta[0], delta[0], 1e-5], ways, known=known)
    assert (x.count_nonzero(), delta.sum()) == (0, 32)


def test_a_way_that_fails_is_left_out(known: tuning.Choices) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("out of resources: shared memory")

    ways = {("broken", ""): broken, ("fast", ""): WAYS["fast", ""]}
    assert tuning.fastest("square", [X], ways, known=known) == (("fast", ""), True)
    with pytest.raises(RuntimeError, match="shared memory"):
        tuning.fastest("other", [X], {("broken", ""): broken, ("b", ""): broken}, known=known)


def test_timing_can_be_switched_off(known: tuning.Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_TUNE", "0")
    assert tuning.fastest("square", [X], WAYS, known=known) == (("slow", "loop"), False)
    assert not known.path.exists()


def test_a_choice_that_is_no_way_any_more_is_timed_again(known: tuning.Choices) -> None:
    known.put(tuning.key("square", [X]), ("gone", ""), {("gone", ""): 1.0})
    assert tuning.fastest("square", [X], WAYS, known=known) == (("fast", ""), True)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"square(float32[64x64])": 3}'])
def test_a_damaged_file_is_no_choice(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "here.json"
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "clipfast"):
        known = tuning.Choices(path)
    assert (str(path) in caplog.text) == (text in ("", "{"))
    assert tuning.fastest("square", [X], WAYS, known=known) == (("fast", ""), True)
    assert json.loads(path.read_text())["square(float32[64x64])"]["chosen"] == ["fast", ""]


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    known = tuning.Choices(tmp_path / "file" / "here.json")
    assert tuning.fastest("square", [X], WAYS, known=known) == (("fast", ""), True)
    assert known.get(tuning.key("square", [X])) == ("fast", "")


def test_two_that_write_keep_both(tmp_path: Path) -> None:
    one, two = (tuning.Choices(tmp_path / "here.json") for _ in range(2))
    for i in range(3):
        one.put(f"one{i}", ("one", ""), {("one", ""): 1.0})
        two.put(f"two{i}", ("two", ""), {("two", ""): 1.0})
    assert len(json.loads(one.path.read_text())) == 6


def test_the_file_names_device_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path))
    path = tuning.file_for(torch.device("cpu"))
    assert path.parent == tmp_path
    assert path.name.startswith("cpu_torch-")
    assert torch.__version__.split("+")[0] in path.name
    monkeypatch.delenv("CLIPFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert tuning.folder() == tmp_path / "x" / "clipfast"
