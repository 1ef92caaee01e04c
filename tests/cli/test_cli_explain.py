"""``clipfast explain``: its tables, its files, and every refusal in one line."""

import json
from pathlib import Path

import pytest
from commandline import HEADS, LAYERS, inside, messages, picture, write_bad
from PIL import Image

import clipfast
from clipfast.analyses.explaining import Explanation, explain
from clipfast.analyses.knowledge import Knowledge

CLASSES = ("cat", "dog", "house")
TEXTS = ("red fur", "green wood", "blue stone", "a small thing", "grass", "sky")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them in a folder, and a pool of texts."""
    (tmp_path / "images").mkdir()
    picture(1).save(tmp_path / "images" / "one.png")
    picture(2).save(tmp_path / "images" / "two.png")
    (tmp_path / "pool.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path


def test_tables_json_and_pictures(folder: Path, model_folder: Path) -> None:
    arguments = ("explain", "images", "--classes", ",".join(CLASSES), "--texts", "pool.txt", "--model", model_folder)
    done = inside(*arguments, "--groups", 3, "--curves", "--out", "o", cwd=folder)
    assert done.returncode == 0, done.stderr
    whole = json.loads((folder / "o" / "explain.json").read_text())
    assert whole["complete"] is True
    assert whole["pool"] == "pool.txt"
    assert whole["classes"] == {name: [f"a photo of a {name}."] for name in CLASSES}
    assert [entry["name"] for entry in whole["images"]] == ["one", "two"]
    model = clipfast.load(str(model_folder))
    prompts = [f"a photo of a {name}." for name in CLASSES]
    for entry in whole["images"]:
        direct: Explanation = explain(model, folder / entry["file"], prompts, TEXTS, groups=3)
        same = direct.to_json()
        assert entry["target"] == CLASSES[direct.decision.target]
        assert list(entry["scores"].values()) == pytest.approx(list(same["scores"].values()), abs=1e-6)
        assert entry["margin"] == pytest.approx(same["margin"], abs=1e-6)
        for kind in ("groups", "texts"):
            assert len(entry[kind]) == len(same[kind])
        groups = sum(group["score"] for group in entry["groups"])
        assert groups + entry["class_token"] + entry["other"] == pytest.approx(entry["margin"], abs=1e-5)
        assert len(entry["groups"][0]["heads"]) == LAYERS * HEADS
        for curve in entry["curves"].values():
            assert 0 <= curve["area"] <= 1
            assert (curve["fractions"][0], curve["fractions"][-1]) == (0, 1)
        deletion, insertion = entry["curves"]["deletion"], entry["curves"]["insertion"]
        shares = entry["probabilities"]
        assert deletion["probabilities"][0] == pytest.approx(shares[entry["target"]], abs=1e-5)
        assert insertion["probabilities"][-1] == pytest.approx(shares[entry["target"]], abs=1e-5)
        with Image.open(folder / "o" / entry["panel"]) as panel:
            panel.load()
        headline = f"# images/{entry['name']}.png: {entry['target']} rather than {entry['rival']}: margin "
        assert headline in done.stdout
    printed = inside(*arguments, "--groups", 3, "--curves", "--out", "o", "--json", cwd=folder)
    assert json.loads(printed.stdout) == whole


def test_over_a_collection(folder: Path, model_folder: Path) -> None:
    """Bits are those of the images' own embeddings."""
    for seed in range(3, 15):
        picture(seed).save(folder / "images" / f"{seed}.png")
    model = clipfast.load(str(model_folder))
    for name, kept in (("c", {"embeddings": "float32"}), ("without", None)):
        clipfast.dataset.collect([folder / "images"], folder / name, model, keep=kept)
    common = ("explain", "images/one.png", "--classes", ",".join(CLASSES), "--pool", "pool.txt")
    done = inside(*common, "--model", model_folder, "--over", "c", "--out", "o", cwd=folder)
    assert done.returncode == 0, done.stderr
    over = json.loads((folder / "o" / "explain.json").read_text())["over"]
    features = model.encode_image(sorted((folder / "images").glob("*.png")))
    pool, classifier = model.encode_text(TEXTS), model.encode_text([f"a photo of a {name}." for name in CLASSES])
    knowledge = Knowledge(pool, classifier, mean=features.mean(0))
    knowledge.update(features)
    assert over["images"] == 14
    assert over["share"] == pytest.approx(knowledge.share(), abs=1e-4)
    assert [entry["text"] for entry in over["texts"]] == list(TEXTS)
    assert [entry["bits"] for entry in over["texts"]] == pytest.approx(knowledge.shared().tolist(), abs=1e-4)
    assert "bits that images and classes share, over 14 images of c" in " ".join(done.stdout.split())
    for options, message in (
        (("--model", model_folder, "--over", "without"), "without holds no embeddings: collect the images without"),
        (("--model", model_folder, "--over", "images"), "images is no collection"),
        (("--over", "c"), "c is of another model"),
    ):
        refused = inside(*common, *options, "--out", "p", cwd=folder)
        assert refused.returncode == 2
        (line,) = messages(refused.stderr)
        assert message in line


def test_classes_of_a_file_and_another_rival(folder: Path, model_folder: Path) -> None:
    rows = ["label,text", "b,a cat", "a,a dog", "a,a hound", "c,a house"]
    (folder / "classes.csv").write_text("\n".join(rows) + "\n")
    common = ("explain", "images/one.png", "--classes", "classes.csv", "--pool", "pool.txt", "--model", model_folder)
    done = inside(*common, "--target", "a", "--against", "mean", "--layers", "-1", "--out", "o", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)
    assert whole["classes"] == {"a": ["a dog", "a hound"], "b": ["a cat"], "c": ["a house"]}
    (entry,) = whole["images"]
    assert (entry["target"], entry["rival"]) == ("a", None)
    scores = entry["scores"]
    assert entry["margin"] == pytest.approx(scores["a"] - (scores["b"] + scores["c"]) / 2, abs=1e-6)
    assert {head["layer"] for group in entry["groups"] for head in group["heads"]} == {LAYERS - 1}


def test_bad_images_are_a_line_each(folder: Path, model_folder: Path) -> None:
    bad = write_bad(folder / "bad")
    arguments = ("explain", "bad", "gone.png", "images/one.png", "--classes", "cat,dog", "--pool", "pool.txt")
    done = inside(*arguments, "--model", model_folder, "--out", "o", cwd=folder)
    assert done.returncode == 2
    errors = [line for line in messages(done.stderr) if line.startswith("error: ")]
    for name, word in {**bad, "gone.png": "no such file"}.items():
        (line,) = [line for line in errors if name in line]
        assert word in line
    assert errors[-1] == "error: 5 of 6 images failed"
    assert len(errors) == 6
    whole = json.loads((folder / "o" / "explain.json").read_text())
    assert [entry["name"] for entry in whole["images"]] == ["one"]
    assert len(whole["failed"]) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no images were given: name image files, folders or tar shards"),
        (("images",), 'no classes were given: name two or more, such as --classes "cat,dog"'),
        (("images", "--classes", "cat"), "--classes names one class, 'cat': a choice needs two or more"),
        (("images", "--classes", "cat,"), "--classes is 'cat,': a class is empty"),
        (("images", "--classes", "cat,cat"), "--classes names 'cat' twice"),
        (("images", "--classes", "gone.csv"), "cannot read the classes in gone.csv: No such file or directory"),
        (
            ("images", "--classes", "cat,dog", "--target", "cow"),
            "--target is 'cow', which is no class: choose from cat, dog",
        ),
        (
            ("images", "--classes", "cat,dog", "--against", "cow"),
            "--against is 'cow': choose runner-up, mean, or a class: cat, dog",
        ),
        (
            ("images", "--classes", "cat,dog", "--target", "cat", "--against", "cat"),
            "--target and --against are both 'cat': name two classes",
        ),
        (
            ("images", "--classes", "cat,dog", "--pool", "random"),
            "--pool is random: random vectors name no concepts, choose a pool of texts",
        ),
        (
            ("images", "--classes", "cat,dog", "--pool", "gone.txt"),
            "--pool is 'gone.txt': neither a file nor one of general, classes, common_words, scenes, random",
        ),
        (
            ("images", "--classes", "cat,dog", "--layers", "last"),
            "--layers is 'last': give whole numbers with commas, ",
        ),
        (("images", "--classes", "cat,dog", "--prompt", "a photo"), "--prompt"),
        (
            ("images", "--classes", "cat,dog", "--out", "pool.txt"),
            "cannot write to pool.txt: it is a file, not a folder",
        ),
        (("images", "--classes", "cat,dog", "--groups", "0"), "--groups"),
        (("images", "--classes", "cat,dog", "--no-such-option"), "--no-such-option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_are_one_line(arguments: tuple[str, ...], message: str, folder: Path) -> None:
    done = inside("explain", *arguments, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (folder / "out").exists()


def test_a_layer_that_does_not_exist_and_a_pool_of_one(folder: Path, model_folder: Path) -> None:
    common = ("explain", "images/one.png", "--classes", "cat,dog", "--model", model_folder, "--out", "o")
    (folder / "single.txt").write_text("one text\n")
    for more, message in (
        (("--pool", "pool.txt", "--layers", 9), "layer 9 does not exist: choose from 0 to 1"),
        (("--pool", "single.txt"), "single.txt has one text only"),
    ):
        done = inside(*common, *more, cwd=folder)
        assert done.returncode == 2
        (line,) = [line for line in messages(done.stderr) if line.startswith("error: ")]
        assert message in line
