"""``clipfast stats`` as a process: a collection, its resumption, its refusals."""

import json
from pathlib import Path

import pytest
from commandline import HEADS, LAYERS, clipfast, inside, messages, picture, write_bad
from measures import error
from tolerances import FLOAT32

import clipfast as package
from clipfast.analyses.moments import Moments
from clipfast.dataset.collection import Collection
from clipfast.dataset.worker import Worker


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        for number in range(4):
            picture(number + 10 * (kind == "dogs")).save(folder / kind / f"{number}.png")
    return folder


def options(model: Path) -> list[object]:
    return ["--model", model, "--labels", "folder", "--batch-size", 3]


def test_a_collection_has_the_contributions_of_the_model(images: Path, model_folder: Path, tmp_path: Path) -> None:
    done = clipfast("stats", images, *options(model_folder), "--out", tmp_path / "c", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images"] == 8
    assert len(result["heads"]) == LAYERS * HEADS
    assert sum(row["share"] for row in result["heads"]) == pytest.approx(1, abs=1e-4)

    collection = Collection(tmp_path / "c")
    assert [entry.label for entry in collection.entries] == ["cats"] * 4 + ["dogs"] * 4
    assert collection.header["complete"] is True
    model = package.load(str(model_folder))
    expected = model.decompose([entry.file for entry in collection.entries], class_token=True)
    kept = package.Contributions.cat([contributions for _, contributions in collection.batches()])
    assert error(kept.heads(), expected.heads()) <= FLOAT32
    assert error(kept.class_token(), expected.class_token()) <= FLOAT32
    moments = Moments(model)
    moments.update(expected)
    assert error(collection.moments.means(), moments.means()) <= FLOAT32


def test_a_collection_in_place_of_images(images: Path, model_folder: Path, tmp_path: Path) -> None:
    assert clipfast("stats", images, *options(model_folder), "--out", tmp_path / "c").returncode == 0
    again = clipfast("stats", tmp_path / "c", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["images"] == 8


def test_moments_alone(images: Path, model_folder: Path, tmp_path: Path) -> None:
    done = clipfast("stats", images, *options(model_folder), "--moments-only", "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "c").rglob("codes"))
    collection = Collection(tmp_path / "c")
    assert collection.moments.count == 8
    with pytest.raises(package.InputError, match="holds moments only"):
        list(collection.batches())


def test_images_that_cannot_be_read_are_left_out(images: Path, model_folder: Path, tmp_path: Path) -> None:
    bad = write_bad(tmp_path / "bad")
    done = clipfast("stats", images, tmp_path / "bad", "--model", model_folder, "--out", tmp_path / "c", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["failed"] == len(bad)
    assert all(any(name in line and word in line for line in done.stderr.splitlines()) for name, word in bad.items())
    collection = Collection(tmp_path / "c")
    assert {Path(failure["file"]).name for failure in collection.failures()} == set(bad)
    assert collection.count == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone: no such file"),
        (["images", "--labels", "gone.csv"], "cannot read the labels in gone.csv"),
        (["images/cats", "--labels", "shard"], "no image has a label from shard"),
    ],
)
def test_errors_in_one_line(images: Path, model_folder: Path, arguments: list[str], message: str) -> None:
    done = inside("stats", *arguments, "--model", model_folder, "--out", images.parent / "o", cwd=images.parent)
    assert done.returncode == 2
    (line,) = messages(done.stderr)
    assert line.startswith("error: ")
    assert message in line


def test_interrupted_before_the_first_image_is_one_line(
    images: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "run", interrupt)
    done = inside("stats", images, "--model", model_folder, "--out", tmp_path / "c")
    assert done.returncode == 130
    assert messages(done.stderr) == ["error: interrupted: 0 of 1 units are collected; run it again to go on"]


def test_another_model_in_the_same_folder_is_refused(images: Path, model_folder: Path, tmp_path: Path) -> None:
    assert clipfast("stats", images, *options(model_folder), "--out", tmp_path / "c").returncode == 0
    other = clipfast("stats", images, "--model", "scenes", "--out", tmp_path / "c")
    assert other.returncode == 2
    assert "holds images collected with model" in other.stderr
    assert Collection(tmp_path / "c").moments.count == 8


def test_other_images_in_the_same_folder_are_refused(images: Path, model_folder: Path, tmp_path: Path) -> None:
    assert clipfast("stats", images / "cats", "--model", model_folder, "--out", tmp_path / "c").returncode == 0
    done = inside("stats", images / "dogs", "--model", model_folder, "--out", tmp_path / "c", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'c'} holds a pass over other images: give another folder, or the options it was made with"
    )
