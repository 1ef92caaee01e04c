"""``clipfast collection export --layout clip_text_span``: files with classes and texts of heads, and its refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commandline import HEADS, LAYERS, inside, messages, picture
from tolerances import GOLDEN, UNIT_NORM

import clipfast
from clipfast.compat.clip_text_span import read_folder, replace_with_iterative_removal
from clipfast.dataset.collection import Collection

POOL = ["a red star", "a blue circle", "two squares", "a forest", "snow", "a beach at night"]


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection of twelve labelled images, ``c``, and files of texts."""
    folder = tmp_path_factory.mktemp("text_span")
    for number in range(12):
        place = folder / "images" / ("sea", "a_land")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number:02}.png")
    (folder / "pool.txt").write_text("".join(f"{text}\n" for text in POOL))
    (folder / "classes.csv").write_text("label,text\nsea,the sea\na_land,land\na_land,a meadow\nsky,the sky\n")
    for name, more in (("c", ["--labels", "folder"]), ("plain", [])):
        arguments = ["images", "--model", model_folder, "--device", "cpu", "--store-dtype", "float32", "--out", name]
        done = inside("collect", *arguments, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def export(folder: Path, *arguments: object) -> object:
    return inside("collection", "export", "c", "--layout", "clip_text_span", *arguments, cwd=folder)


def test_everything(folder: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "--pool",
        "pool.txt",
        "--size",
        3,
        "--device",
        "cpu",
        "--dataset-name",
        "places",
        "--model-name",
        "tiny",
    ]
    done = export(folder, *arguments, "--out", tmp_path / "e")
    assert (done.returncode, done.stdout) == (0, f"12 images in {tmp_path / 'e'}\n"), done.stderr
    data = read_folder(tmp_path / "e", "places", "tiny")
    assert data.attn.shape == (12, LAYERS, HEADS, 24)
    assert data.cls_attn is not None
    assert data.classes == ("a_land", "sea")
    assert data.labels is not None
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    model = clipfast.load(str(model_folder), device="cpu")
    weights = torch.stack([model.encode_text([f"a photo of a {name}."])[0] for name in ("a land", "sea")], 1)
    np.testing.assert_allclose(data.classifier, weights.numpy(), atol=UNIT_NORM)
    pool = data.pools["pool"]
    assert pool.texts == tuple(POOL)
    np.testing.assert_allclose(pool.features, model.encode_text(POOL).numpy(), atol=UNIT_NORM)
    assert set(data.completeness) == {("pool", 3)}
    heads = data.completeness["pool", 3]
    assert list(heads) == [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    for (layer, head), texts in heads.items():  # a script finds the same in the arrays
        _, picked = replace_with_iterative_removal(data.attn[:, layer, head], pool.features, POOL, 3, 80, "cpu")
        assert tuple(picked) == texts


def test_classes_of_a_file(folder: Path, tmp_path: Path) -> None:
    done = export(
        folder, "--classes", "classes.csv", "--arrays", "attn, mlp", "--device", "cpu", "--out", tmp_path / "e"
    )
    assert done.returncode == 0, done.stderr
    [name] = [path.name.removeprefix("c_attn_").removesuffix(".npy") for path in (tmp_path / "e").glob("c_attn_*")]
    data = read_folder(tmp_path / "e", "c", name)  # the names of the collection and of the model's folder
    assert data.cls_attn is None
    assert data.classes == ("a_land", "sea", "sky")
    assert data.labels is not None
    assert set(data.labels.tolist()) == {0, 1}
    assert data.classifier is not None
    np.testing.assert_allclose(np.linalg.norm(data.classifier, axis=0), np.ones(3), atol=UNIT_NORM)


def test_without_the_model(folder: Path, tmp_path: Path) -> None:
    """Contributions and labels need no model; its weights may be gone."""
    done = export(folder, "--no-classifier", "--model-name", "m", "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert not any(line.startswith("model ") for line in done.stderr.splitlines())
    data = read_folder(tmp_path / "e", "c", "m")
    assert data.classifier is None
    assert data.labels is not None
    again = inside("collection", "export", "plain", "--layout", "clip_text_span", "--out", tmp_path / "p", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert sorted(path.name.split("_")[1] for path in (tmp_path / "p").iterdir()) == ["attn", "cls", "mlp"]
    expected = np.concatenate([made.heads().numpy() for _, made in Collection(folder / "plain").batches()])
    np.testing.assert_allclose(data.attn, expected, atol=GOLDEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool", "random"], "--pool random has no texts"),
        (["--heads", "L1"], "--heads are those that --pool names: give --pool"),
        (["--pool", "pool.txt", "--heads", "L9.H9"], "L9"),
        (["--pool", "gone.txt"], "neither a file nor one of"),
        (["--arrays", "attn,heads"], "there is no array 'heads'"),
        (["--dataset-name", "a/b"], "the name of the data set is 'a/b'"),
        (["--dtype", "float32"], "--dtype is for clip-retrieval: numbers of clip_text_span are float32"),
        (["--classes", "gone.csv"], "gone.csv"),
        (["--prompt", "a photo"], "--prompt"),
        (["--layout", "zarr", "--pool", "pool.txt"], "--pool is for --layout clip_text_span, not for zarr"),
        (["--layout", "zarr", "--no-classifier"], "--classifier is for --layout clip_text_span"),
        (["--layout", "zarr", "--classes", "classes.csv"], "--classes is for --layout clip_text_span"),
    ],
)
def test_refusals(folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    layout = [] if "--layout" in arguments else ["--layout", "clip_text_span"]
    done = inside(
        "collection", "export", "c", *layout, *arguments, "--device", "cpu", "--out", tmp_path / "e", cwd=folder
    )
    assert done.returncode == 2
    (line,) = messages(done.stderr)
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "e").exists()


def test_classes_of_images_without_labels(folder: Path, tmp_path: Path) -> None:
    arguments = ["--layout", "clip_text_span", "--classes", "classes.csv", "--device", "cpu", "--out", tmp_path / "e"]
    done = inside("collection", "export", "plain", *arguments, cwd=folder)
    assert done.returncode == 2
    assert "plain has no labels: collect the images again with --labels, or leave classes out" in done.stderr


def test_files_that_are_there_are_refused_before_anything_slow(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "c_attn_m.npy").touch()
    done = export(folder, "--model-name", "m", "--pool", "general", "--device", "cpu", "--out", tmp_path)
    assert done.returncode == 2
    assert "c_attn_m.npy exists: nothing is replaced" in done.stderr
    assert "model " not in done.stderr
