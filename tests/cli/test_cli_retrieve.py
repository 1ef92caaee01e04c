"""``clipfast retrieve``: neighbours and shares, against sums of outputs compared image by image."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import HEADS, LAYERS, clipfast, picture
from measures import error
from PIL import Image
from tolerances import FLOAT32
from torch import Tensor

import clipfast as package
from clipfast.commands.options import InputOptions
from clipfast.commands.retrieve.command import Options, find_query, run
from clipfast.dataset.collection import Collection, Entry

COUNT = 10
LABELS = ["warm", "cold", "warm", "", "cold", "warm", "cold", "warm", "cold", "warm"]
SMALL = {"batch_size": 4, "dtype": "fp64"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    for number in range(COUNT):
        picture(number).save(folder / f"{number}.png")
    rows = [f"{number}.png,{label}" for number, label in enumerate(LABELS)]
    (folder.parent / "labels.csv").write_text("\n".join(["file,feeling", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def collection(images: Path, model_folder: Path) -> Path:
    """As the command itself leaves it."""
    given = collecting(images, model_folder, labels=str(images.parent / "labels.csv"), label_column="feeling")
    assert run(Options(given, out=images.parent / "c", top=3)) == 0
    return images.parent / "c"


def collecting(images: Path, model: Path | None = None, **given: Any) -> InputOptions:
    return InputOptions([images], model=None if model is None else str(model), **(SMALL if model else {}), **given)


def result(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "retrieve.json").read_text())
    assert isinstance(results, dict)
    return results


def outputs(images: Path, model_folder: Path) -> tuple[package.Model, package.Contributions]:
    model = package.load(str(model_folder), dtype=torch.float64)
    return model, model.decompose([images / f"{number}.png" for number in range(COUNT)])


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b) / a.norm() / b.norm())


@pytest.mark.slow
def test_the_nearest_by_the_sum_of_heads(images: Path, collection: Path, model_folder: Path, tmp_path: Path) -> None:
    """An image of the collection does not find itself; a copy from elsewhere finds it first; a text by its product."""
    shutil.copy(images / "6.png", tmp_path / "copy.png")
    queries = ("--query", "4.png", "--query", tmp_path / "copy.png", "--text", "a warm light")
    done = clipfast("retrieve", collection, "--heads", "L0.H1,L1.H0", *queries, "--top", 4, "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    results = result(tmp_path / "o")
    assert results["heads"] == ["L0.H1", "L1.H0"]
    model, whole = outputs(images, model_folder)
    rows = whole.head(0, 1) + whole.head(1, 0)
    rows = rows - rows.mean(0)
    text = model.encode_text(["a warm light"])[0]
    wanted = [
        {other: cosine(rows[4], rows[other]) for other in range(COUNT) if other != 4},
        {other: cosine(rows[6], rows[other]) for other in range(COUNT)},
        {other: cosine(text, rows[other]) for other in range(COUNT)},
    ]
    for query, scores in zip(results["queries"], wanted, strict=True):
        best = sorted(scores, key=lambda image: -scores[image])[:4]
        assert [each["name"] for each in query["neighbours"]] == [str(image) for image in best]
        assert [each["label"] for each in query["neighbours"]] == [LABELS[image] or None for image in best]
        got = torch.tensor([each["score"] for each in query["neighbours"]])
        assert error(got, torch.tensor([scores[image] for image in best])) <= FLOAT32
        assert Image.open(tmp_path / "o" / query["sheet"]).format == "PNG"
    assert results["queries"][1]["neighbours"][0]["name"] == "6"
    assert [line.split("\t")[0] for line in done.stdout.splitlines()[1:5]] == ["4.png"] * 4
    assert not (tmp_path / "o" / "collection.json").exists()


@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("centred", [True, False])
def test_heads_are_judged_by_labels(
    images: Path, collection: Path, model_folder: Path, tmp_path: Path, measure: Any, centred: bool
) -> None:
    """The share of the three nearest with the same label, image by image; the one without a label takes no part."""
    assert run(Options(collecting(collection), out=tmp_path, top=3, measure=measure, centred=centred)) == 0
    results = result(tmp_path)
    _, whole = outputs(images, model_folder)
    kept = [image for image in range(COUNT) if LABELS[image]]

    def share(rows: Tensor) -> float:
        rows = rows[kept]
        rows = rows - rows.mean(0) if centred else rows
        rows = rows / rows.norm(dim=1, keepdim=True) if measure == "cosine" else rows
        hits = 0
        for mine, image in enumerate(kept):
            others = [other for other in range(len(kept)) if other != mine]
            best = sorted(others, key=lambda other: -float(rows[mine] @ rows[other]))[:3]
            hits += sum(LABELS[kept[other]] == LABELS[image] for other in best)
        return hits / (3 * len(kept))

    pairs = {(row["layer"], row["head"]): row["share"] for row in results["heads"]}
    assert len(pairs) == LAYERS * HEADS
    assert list(pairs.values()) == sorted(pairs.values(), reverse=True)
    for (layer, head), got in pairs.items():
        assert got == pytest.approx(share(whole.head(layer, head)), abs=FLOAT32)
    assert results["embedding"] == pytest.approx(
        share(whole.embedding / whole.embedding.norm(dim=1, keepdim=True)), abs=FLOAT32
    )
    # 5 warm and 4 cold: a warm image has 4 others of its kind among 8, a cold one 3
    assert results["chance"] == pytest.approx((5 * 4 + 4 * 3) / (9 * 8), abs=FLOAT32)
    assert (results["labelled"], results["queried"]) == (9, 9)


def test_some_heads_and_a_sample(
    collection: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other labels than those collected, three queries of ten: 0, 3 and 6."""
    other = tmp_path / "other.csv"
    other.write_text("file,kind\n" + "".join(f"{number}.png,{'ab'[number > 6]}\n" for number in range(COUNT)))
    given = collecting(collection, labels=str(other), label_column="kind")
    assert run(Options(given, out=tmp_path, heads="L1.H1", sample=3)) == 0
    results = result(tmp_path)
    assert [(row["layer"], row["head"]) for row in results["heads"]] == [(1, 1)]
    assert (results["labelled"], results["queried"], results["neighbours"]) == (10, 3, 5)
    assert results["chance"] == pytest.approx(6 / 9, abs=FLOAT32)  # the three are all "a", as 7 of the 10
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines[2:]] == ["L1.H1", "whole embedding", "chance"]
    assert len(Collection(collection).entries) == COUNT


def test_queries_are_found_by_path_or_name(tmp_path: Path) -> None:
    entries = [
        Entry("data/a/1.png", "a__1", str(tmp_path / "data/a/1.png")),
        Entry("data/b/1.png", "b__1", str(tmp_path / "data/b/1.png")),
        Entry("data/s.tar:x/2.jpg", "s__x__2", str(tmp_path / "data/s.tar"), key="x/2"),
    ]
    for query, place in (("data/b/1.png", 1), ("b__1", 1), ("2.jpg", 2), (str(tmp_path / "data" / "a" / "1.png"), 0)):
        assert find_query(entries, query) == place
    with pytest.raises(package.InputError, match=r"'1.png' names 2 images \(data/a/1.png"):
        find_query(entries, "1.png")
    with pytest.raises(package.InputError, match="neither an image of the collection nor a file"):
        find_query(entries, "3.png")
    (tmp_path / "new.png").touch()
    assert find_query(entries, str(tmp_path / "new.png")) is None


def test_deleted_images_do_not_change_the_neighbours(
    images: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    given = collecting(tmp_path / "images", model_folder)
    assert run(Options(given, out=tmp_path / "c", heads="L1", query=["0.png"], top=9)) == 0
    before = result(tmp_path / "c")["queries"][0]["neighbours"]
    (tmp_path / "images" / "3.png").unlink()
    assert run(Options(collecting(tmp_path / "c"), out=tmp_path / "o", heads="L1", query=["0.png"], top=9)) == 0
    assert result(tmp_path / "o")["queries"][0]["neighbours"] == before
    assert "3.png: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"query": ["0.png"]}, "--heads is missing"),
        ({"text": ["a cat"]}, "--heads is missing"),
        ({"heads": "L1", "text": [" "]}, "one of --text is empty"),
        ({"heads": "mlps", "text": ["a cat"]}, "--heads is 'mlps': name layers or heads"),
        ({"heads": "L1.H9", "text": ["a cat"]}, "head 9 does not exist"),
        ({"heads": "L1", "query": ["none.png"]}, "--query is 'none.png': neither"),
        ({"faiss": True}, "--faiss searches for queries"),
    ],
)
def test_bad_options_are_refused_with_one_line(
    collection: Path, tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(package.InputError, match=message):
        run(Options(collecting(collection), out=tmp_path, **given))
    assert not (tmp_path / "retrieve.json").exists()


def test_faiss(images: Path, model_folder: Path, collection: Path, tmp_path: Path) -> None:
    """The same neighbours by faiss; where it is not installed that is said before anything is collected."""
    asked: dict[str, Any] = {"heads": "L1", "query": ["0.png"], "text": ["a cat"], "top": 4}
    if importlib.util.find_spec("faiss") is None:
        with pytest.raises(package.MissingExtra, match=r"pip install 'clipfast\[faiss\]'"):
            run(Options(collecting(images, model_folder), out=tmp_path / "c", faiss=True, **asked))
        assert not (tmp_path / "c").exists()
        return
    results = []
    for faiss in (False, True):
        assert run(Options(collecting(collection), out=tmp_path / "o", faiss=faiss, **asked)) == 0
        results.append([[near["file"] for near in query["neighbours"]] for query in result(tmp_path / "o")["queries"]])
    assert results[0] == results[1]
    assert [len(near) for near in results[0]] == [4, 4]


def test_a_single_label_is_refused(collection: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("file,label\n" + "".join(f"{number}.png,same\n" for number in range(COUNT)))
    with pytest.raises(package.InputError, match="all labelled images have the label 'same'"):
        run(Options(collecting(collection, labels=str(tmp_path / "one.csv")), out=tmp_path))
    with pytest.raises(package.InputError, match="--label-column names a column of --labels, which is not given"):
        run(Options(collecting(collection, label_column="colour"), out=tmp_path))
