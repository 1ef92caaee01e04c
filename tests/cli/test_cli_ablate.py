"""``clipfast ablate`` as a process, against encoders with the removal built in; and labels given afterwards."""

import csv
import json
import tarfile
from pathlib import Path

import pytest
import torch
from commandline import LAYERS, clipfast, inside, messages, picture

import clipfast as package
from clipfast.analyses import selection
from clipfast.dataset.collection import Collection

CLASSES = {"cats": ["a cat", "cats"], "dogs": ["a dog"], "owls": ["an owl"]}
ROWS = [
    (f"{name}.png", label, group)
    for name, label, group in zip(
        "abcdefghijkl", ["cats", "dogs", "owls"] * 4, ["in", "in", "in", "out", "out", "out"] * 2, strict=True
    )
]


def write(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Images, labels.csv, classes.csv, and two collections: ``all`` of the twelve, ``other`` with labels of others."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("images", "others"):
        (folder / name).mkdir()
    for seed, (name, _, _) in enumerate(ROWS):
        picture(seed).save(folder / "images" / name)
        picture(seed + 40).save(folder / "others" / name)
    write(folder / "labels.csv", ("file", "kind", "place"), ROWS)
    write(folder / "classes.csv", ("label", "text"), [(name, text) for name, some in CLASSES.items() for text in some])
    (folder / "pool.txt").write_text("a red thing\na blue thing\n")
    assert clipfast("collect", folder / "images", "--model", model_folder, "--out", folder / "all").returncode == 0
    labels = ("--labels", folder / "labels.csv", "--label-column", "kind", "--group-column", "place")
    done = clipfast("collect", folder / "others", "--model", model_folder, "--out", folder / "other", *labels)
    assert done.returncode == 0, done.stderr
    return folder


def options(data: Path) -> list[object]:
    labels = ["--labels", data / "labels.csv", "--label-column", "kind", "--group-column", "place"]
    return [data / "all", *labels, "--classes", data / "classes.csv"]


def ablated(*arguments: object, out: Path) -> dict[str, object]:
    done = clipfast("ablate", *arguments, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def accuracies(model: package.Model, encode: object, data: Path) -> tuple[float, float]:
    """Accuracy of all images and of the worst group, of an encoder, by hand."""
    rows = [model.encode_text(texts).mean(0) for texts in CLASSES.values()]
    classifier = torch.stack([row / row.norm() for row in rows])
    features = encode([data / "images" / name for name, _, _ in ROWS])  # type: ignore[operator]
    guesses = [list(CLASSES)[at] for at in (features @ classifier.T).argmax(1).tolist()]
    hits = [(group, guess == label) for guess, (_, label, group) in zip(guesses, ROWS, strict=True)]
    groups = [[hit for result, hit in hits if result == group] for group in ("in", "out")]
    return sum(hit for _, hit in hits) / len(hits), min(sum(group) / len(group) for group in groups)


@pytest.mark.slow
def test_every_row_is_what_an_ablated_encoder_gets(data: Path, model_folder: Path, tmp_path: Path) -> None:
    named = ["mlps", "L1", "L0.H1, cls 1", "mlp 0"]
    result = ablated(*options(data), *(part for text in named for part in ("--terms", text)), out=tmp_path)
    model = package.load(str(model_folder))
    moments = Collection(data / "all").moments
    rows = result["ablations"]
    assert [row["name"] for row in rows] == ["nothing", *named]
    encoders = [model.encode_image, *(package.Ablated(model, text, moments).encode_image for text in named)]
    for row, encode in zip(rows, encoders, strict=True):
        average, worst = accuracies(model, encode, data)
        assert row["accuracy"] == pytest.approx(average, abs=1e-5)
        assert row["worst_group"] == pytest.approx(worst, abs=1e-5)
    assert len({row["accuracy"] for row in rows}) > 1  # or the comparison says nothing


@pytest.mark.slow
def test_default_ablations_are_those_of_the_paper(data: Path, tmp_path: Path) -> None:
    done = clipfast("ablate", *options(data), "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    names = [line.split("\t")[0] for line in done.stdout.splitlines()[2:]]
    layers = [f"attention of layers 0 to {layer}" for layer in range(LAYERS)]
    assert names == ["nothing", "all MLPs", "class token to itself", "both", *layers]
    assert "near chance" in done.stderr  # a random model


@pytest.mark.slow
def test_heads_are_chosen_by_words_and_by_other_images(data: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.txt"
    pool.write_text("a red thing\na blue thing\na red house\nthe sea\n")
    chosen = ["--words", "red", "--pool", pool, "--top", 2, "--at-least", 1]
    others = ["--contrast", 2, "--greedy", 1, "--validation", data / "other"]
    rows = ablated(*options(data), *chosen, *others, out=tmp_path / "o")["ablations"]
    by_words, by_contrast, greedily = rows[1:]
    spans = Collection(data / "all").moments.textspan(
        package.load(Collection(data / "all").header["model"]).encode_text(pool.read_text().splitlines()), 2
    )
    wanted = {head for head, span in spans.items() if {0, 2} & set(span.picks)}
    assert {(head["layer"], head["head"]) for head in by_words["chosen"]} == wanted
    assert wanted
    model, other = package.load(Collection(data / "all").header["model"]), Collection(data / "other")
    ((entries, seen),) = other.batches()
    labels = torch.tensor([list(CLASSES).index(str(entry.label)) for entry in entries])
    groups = torch.tensor([["in", "out"].index(str(entry.group)) for entry in entries])
    rows = [model.encode_text(texts).mean(0) for texts in CLASSES.values()]
    classifier = torch.stack([row / row.norm() for row in rows])
    moments = Collection(data / "all").moments
    contrast = selection.by_contrast(seen, labels, groups, classifier)[:2]
    assert [(head["layer"], head["head"]) for head in by_contrast["chosen"]] == [each[:2] for each in contrast]
    first = selection.greedy(seen, labels, groups, classifier, moments, 1)
    assert [(head["layer"], head["head"]) for head in greedily.get("chosen", ())] == [each[:2] for each in first]


@pytest.mark.slow
def test_heads_replaced_by_texts(data: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.txt"
    pool.write_text(
        "\n".join(f"a {a} {b}" for a in ("red", "blue", "big", "old") for b in ("cat", "sea", "car", "day"))
    )
    arguments = [*options(data), "--pool", pool, "--heads", "L1", "--rest-ablated"]
    result = ablated(*arguments, "--reconstruct", 64, out=tmp_path)
    curve = result["reconstruction"]
    assert len(result["ablations"]) == 1
    assert len(curve["accuracies"]) == 13  # outputs of twelve images have eleven dimensions and a mean
    every = ablated(*arguments, "--terms", "mlps, L0", out=tmp_path)["ablations"][1]["accuracy"]
    assert curve["accuracies"][-1] == every  # as many texts as a head has dimensions: nothing of it is lost
    none = ablated(*arguments, "--terms", "mlps, L0, L1", out=tmp_path)["ablations"][1]["accuracy"]
    assert curve["accuracies"][0] == none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all"], "the images have no labels"),
        (["other", "--classes", "none.csv"], "cannot read the classes in none.csv"),
        (["other", "--classes", "labels.csv"], "needs the columns label and text"),
        (["other", "--prompt", "a photo"], "needs one {} where the class goes"),
        (["other", "--templates", "none"], "--templates is 'none': neither a file nor one of plain, simple, imagenet"),
        (["other", "--terms", "L9"], "layer 9 does not exist"),
        (["other", "--greedy", "2"], "give --validation"),
        (["other", "--contrast", "2", "--validation", "other"], "12 images of the test"),
        (["other", "--contrast", "2", "--validation", "all"], "all has no labels"),
        (["other", "--words", "zebra", "--pool", "pool.txt"], "no text of the pool pool.txt contains any of zebra"),
        (["other", "--model", "ViT-B-32"], "leave --model out"),
        (["other", "--group-column", "place"], "--group-column names a column of --labels"),
        (["other", "--labels", "labels.csv", "--label-column", "colour"], "has no column 'colour'"),
        (["other", "--means", "images"], "is no collection"),
        (["other", "--pool", "nowhere.txt"], "neither a file nor one of"),
    ],
)
def test_bad_options_are_refused_with_one_line(data: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = inside("ablate", *arguments, "--out", tmp_path / "o", cwd=data)
    assert done.returncode == 2
    (line,) = messages(done.stderr)
    assert line.startswith("error: ")
    assert message in line
    assert not list((tmp_path / "o").glob("ablate.json"))


@pytest.mark.slow
def test_labels_of_tar_shards_are_found_again(data: Path, model_folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, label, _ in ROWS:
            tar.add(data / "images" / name, name)
            (tmp_path / "label").write_text(label)
            tar.add(tmp_path / "label", name.replace(".png", ".cls"))
    done = clipfast("collect", tmp_path / "shard.tar", "--model", model_folder, "--out", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    classes = ("--classes", data / "classes.csv")
    again = ablated(tmp_path / "c", "--labels", "shard", *classes, out=tmp_path / "o")["ablations"]
    assert again[0]["accuracy"] == ablated(*options(data), out=tmp_path / "p")["ablations"][0]["accuracy"]
    (tmp_path / "shard.tar").unlink()
    assert clipfast("ablate", tmp_path / "c", "--labels", "shard", *classes, cwd=tmp_path).returncode == 2
