"""Every refusal that the documentation lists is one that the command line gives, in one line."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import ROOT
from commandline import inside, messages, picture

from clipfast.dataset.manifest import Manifest, locked

Refusal = Callable[[Path], str]


def _collect(folder: Path, *arguments: object) -> str:
    """What ``collect`` says, given images beside a collection of them."""
    given = arguments or ("images", "--out", "c")
    return inside("collect", *given, "--model", "model", "--device", "cpu", cwd=folder).stderr


def other_settings(folder: Path) -> str:
    return _collect(folder, "images", "--out", "c", "--batch-size", 2)


def changed(folder: Path) -> str:
    picture(9, 50, 50).save(folder / "images" / "0.png")
    return _collect(folder)


def written(folder: Path) -> str:
    with locked(folder / "c"):
        return _collect(folder)


def other_results(folder: Path) -> str:
    (folder / "o").mkdir()
    (folder / "o" / "moments.safetensors").write_bytes(b"")
    return _collect(folder, "images", "--out", "o")


def earlier(folder: Path) -> str:
    shutil.copytree(ROOT / "tests" / "saved" / "collections" / "moments-4", folder / "old")
    return inside("collect", folder / "old").stderr


def settled(folder: Path) -> str:
    return _collect(folder, "c")


def none(folder: Path) -> str:
    return (
        inside("textspan", "--means", "images", cwd=folder).stderr
        + inside("collection", "info", "images", cwd=folder).stderr
    )


def edited(folder: Path) -> str:
    path = Manifest(folder / "c").record_path(0)
    path.write_text(path.read_text().replace('"ok": 3', '"ok": 4'))
    return inside("collection", "info", "c", cwd=folder).stderr


def nothing(folder: Path) -> str:
    (folder / "bad").mkdir()
    (folder / "bad" / "0.png").write_bytes(b"damaged")
    return _collect(folder, "bad", "--out", "b")


def too_many(folder: Path) -> str:
    (folder / "bad").mkdir()
    for number in range(101):
        (folder / "bad" / f"{number}.png").write_bytes(b"damaged")
    return _collect(folder, "bad", "--out", "b", "--max-error-rate", 0.01)


def missing_units(folder: Path) -> str:
    _collect(folder, "images", "--out", "p", "--num-shards", 2, "--shard-index", 0, "--unit-size", 1)
    Manifest(folder / "p" / "parts" / "0000-of-0002").record_path(2).unlink()
    _collect(folder, "images", "--out", "p", "--num-shards", 2, "--shard-index", 1, "--unit-size", 1)
    return inside("collection", "merge", "--out", "p", cwd=folder).stderr


REFUSALS: dict[str, Refusal] = {
    "give another folder, or the options it was made with": other_settings,
    "images have changed since they were collected": changed,
    "is being written by another process": written,
    "holds results of another command, which would be overwritten": other_results,
    "is a collection of an earlier version": earlier,
    "is a collection, whose images are collected already": settled,
    "is no collection": none,
    "is damaged or was edited": edited,
    "holds no image yet, or none that could be read": nothing,
    "of --max-error-rate": too_many,
    "not finished": missing_units,
}


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """Three images, a model, and a collection of the images."""
    (tmp_path / "images").mkdir()
    for number in range(3):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    shutil.copytree(model_folder, tmp_path / "model")
    assert _collect(tmp_path, "images", "--out", "c")
    return tmp_path


def test_the_page_lists_them_all() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    section = page.partition("## Why a pass or a collection is refused")[2]
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE)[1:]
    assert rows == [f"`{refusal}`" for refusal in REFUSALS]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_one_line(refusal: str, folder: Path) -> None:
    lines = [line for line in messages(REFUSALS[refusal](folder)) if refusal in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
