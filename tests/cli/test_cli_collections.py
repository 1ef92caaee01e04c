"""``clipfast collect`` and what it goes on with: the same images, weights and labels; names of every kind."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from commandline import inside, picture, save_model
from safetensors.torch import load_file, save_file

from clipfast.commands.collect.command import run
from clipfast.commands.collect.options import DataOptions, KeptOptions, Options
from clipfast.dataset.collection import Collection
from clipfast.errors import InputError

COUNT = 4
EXACT = KeptOptions(store_dtype="float32")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    for number in range(COUNT):
        picture(number).save(folder / f"{number}.png")
    return folder


def test_other_weights_at_the_same_path_are_refused(images: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path)
    options = Options(DataOptions([str(images)], model=str(model)), out=tmp_path / "c", kept=EXACT)
    assert run(options) == 0
    before = (tmp_path / "c" / "collection.json").read_bytes()
    weights = load_file(model / "open_clip_model.safetensors")
    weights["visual.transformer.resblocks.0.mlp.c_fc.weight"][0, 0] += 1e-3
    save_file(weights, model / "open_clip_model.safetensors")
    with pytest.raises(InputError, match="holds images collected with other weights of the model: give another"):
        run(options)
    other = DataOptions([str(images)], model=str(model), batch_size=4, dtype="bf16")
    with pytest.raises(InputError) as raised:
        run(Options(other, out=tmp_path / "c", kept=KeptOptions(moments_only=True)))
    reasons = ("dtype 'float32', not 'bfloat16'", "kept codes 'float32', not None", "batch size 8, not 4")
    assert all(reason in str(raised.value) for reason in reasons)
    done = inside("textspan", tmp_path / "c", "--pool", "random", "--out", tmp_path / "o")
    assert done.returncode == 2
    assert re.search(r"the weights of .* are not those that .* was collected with", done.stderr)
    assert (tmp_path / "c" / "collection.json").read_bytes() == before


def test_changed_images_are_refused(model_folder: Path, tmp_path: Path) -> None:
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    options = Options(DataOptions(list(map(str, paths)), model=str(model_folder)), out=tmp_path / "c")
    assert run(options) == 0
    picture(7).save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"images have changed since they were collected \(.*1\.png\)"):
        run(options)


def test_names_are_not_identities(model_folder: Path, tmp_path: Path) -> None:
    """The same relative names in two folders are other images; other names of the same files are the same images."""
    for kind in ("a", "b"):
        (tmp_path / kind / "images").mkdir(parents=True)
        picture(3).save(tmp_path / kind / "images" / "0.png")
    arguments = ("collect", "images", "--model", model_folder, "--out", tmp_path / "c")
    assert inside(*arguments, cwd=tmp_path / "a").returncode == 0
    other = inside(*arguments, cwd=tmp_path / "b")
    assert (other.returncode, "holds a pass over other images" in other.stderr) == (2, True)
    same = inside("collect", "a/images", "--model", model_folder, "--out", tmp_path / "c", cwd=tmp_path)
    assert same.returncode == 0, same.stderr
    assert "1 of 1 units (1 image) were collected before" in same.stderr


def test_other_labels_are_refused(images: Path, model_folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    for kind, code in (("cat", 0), ("cat", 0), ("dog", None)):
        labels.write_text("file,label\n" + "".join(f"{number}.png,{kind}\n" for number in range(COUNT)))
        options = Options(DataOptions([str(images)], model=str(model_folder), labels=str(labels)), out=tmp_path / "c")
        if code is not None:
            assert run(options) == code
    with pytest.raises(InputError, match="holds images with other labels"):
        run(options)


def test_images_that_failed_are_tried_again(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / "images" / f"{number}.png")
    whole = (tmp_path / "images" / "1.png").read_bytes()
    (tmp_path / "images" / "1.png").write_bytes(whole[:100])
    options = Options(DataOptions([str(tmp_path / "images")], model=str(model_folder)), out=tmp_path / "c")
    assert run(options) == 2
    options = replace(options, retry_failed=True)
    assert run(options) == 2
    assert Collection(tmp_path / "c").moments.count == 3
    (tmp_path / "images" / "1.png").write_bytes(whole)
    assert run(options) == 0
    assert Collection(tmp_path / "c").moments.count == 4
    assert Collection(tmp_path / "c").failed == 0


def test_decompose_does_not_write_into_a_collection(images: Path, model_folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "c"
    assert run(Options(DataOptions([str(images)], model=str(model_folder)), out=whole)) == 0
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    done = inside("decompose", images / "0.png", "--model", model_folder, "--out", whole, cwd=images)
    assert done.returncode == 2
    assert "holds a collection, and results here would overwrite it" in done.stderr
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_names_that_are_not_text(model_folder: Path, tmp_path: Path) -> None:
    """Bytes that are not UTF-8, and characters that other programs take for the end of a line."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture(0).save(folder / "plain.png")
    names = [b"\xff\xfe.png", "a\u2028b.png".encode(), "a\x85b.png".encode(), b"a\nb.png"]
    for name in names:
        shutil.copy(os.fsencode(folder / "plain.png"), os.path.join(os.fsencode(folder), name))
    for _ in range(2):  # the second time it goes on
        done = subprocess.run(
            [sys.executable, "-m", "clipfast", "collect", folder, "--model", model_folder, "--out", tmp_path / "c"],
            capture_output=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == 0, done.stderr
    entries = Collection(tmp_path / "c").entries
    assert {os.fsencode(os.path.basename(entry.path)) for entry in entries} == {b"plain.png", *names}
    assert [len(some) for some, _ in Collection(tmp_path / "c").batches()] == [5]
    done = inside("textspan", tmp_path / "c", "--pool", "random", "--size", 2, "--out", tmp_path / "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_device_is_named(images: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = ["collect", images / "0.png", images / "1.png", "--model", model_folder, "--device", "cpu", "--json"]
    done = inside(*arguments, "--out", tmp_path / "c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "on cpu" in done.stderr
    assert json.loads(done.stdout)["device"] == "cpu"
