"""``clipfast textspan`` as a process: the same texts as from Python, from images or from a collection."""

import json
from pathlib import Path

import pytest
from commandline import HEADS, clipfast, inside, picture

import clipfast as package
from clipfast.analyses.weights import weight_textspan

TEXTS = [
    f"a photo of a {word}"
    for word in ["cat", "dog", "house", "tree", "car", "boat", "face", "hand", "road", "sky", "lamp", "door"]
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    for number in range(12):
        picture(number).save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def texts(images: Path) -> Path:
    path = images.parent / "texts.txt"
    path.write_text("\n".join([*TEXTS, "", TEXTS[0].upper()]) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_texts_are_those_of_the_outputs(images: Path, texts: Path, model_folder: Path, tmp_path: Path) -> None:
    done = clipfast(
        "textspan", images, "--model", model_folder, "--pool", texts, "-m", 4, "--out", tmp_path / "o", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "1 blank line left out: line 13" in done.stderr
    assert "1 duplicate left out: line 14 (as 1)" in done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "o" / "textspan.json").read_text())
    model = package.load(str(model_folder))
    contributions = model.decompose(sorted(images.iterdir()))
    features = model.encode_text(TEXTS)
    for row in result["heads"]:
        expected = package.textspan(contributions.head(row["layer"], row["head"]), features, 4)
        assert row["picks"] == list(expected.picks)
        assert row["texts"] == [TEXTS[pick] for pick in expected.picks]


@pytest.mark.slow
def test_from_a_collection_and_some_heads(images: Path, texts: Path, model_folder: Path, tmp_path: Path) -> None:
    assert clipfast("collect", images, "--model", model_folder, "--out", tmp_path / "c").returncode == 0
    arguments = ("--pool", texts, "-m", 2, "--heads", "L-1", "--out", tmp_path / "o")
    done = clipfast("textspan", tmp_path / "c", *arguments)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "o" / "collection.json").exists()
    lines = done.stdout.splitlines()
    assert lines[0].startswith("# head")
    assert [line.split("\t")[0] for line in lines[1:]] == [f"L1.H{head}" for head in range(HEADS)]


@pytest.mark.slow
def test_from_weights_alone(texts: Path, model_folder: Path, tmp_path: Path) -> None:
    arguments = ("--weights", "--model", model_folder, "--pool", texts, "-m", 3, "--heads", "L1", "--out", tmp_path)
    done = clipfast("textspan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["images"] is None
    model = package.load(str(model_folder))
    expected = weight_textspan(model, model.encode_text(TEXTS), 3, [(1, head) for head in range(HEADS)])
    assert [row["picks"] for row in result["heads"]] == [list(span.picks) for span in expected.values()]
    neither = clipfast("textspan", "--model", model_folder, cwd=tmp_path)
    assert (neither.returncode, neither.stderr.count("error: no images were given")) == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pool", "nothing"], "--pool is 'nothing': neither a file nor one of general"),
        (["--weights"], "without images: leave the images out"),
        (["--heads", "mlps"], "--heads is 'mlps': name layers or heads"),
        (["--heads", "L9"], "'L9'"),
        (["--method", "best"], "method is 'best'"),
        (["--method", "somp"], "somp sums absolute projections"),
    ],
)
def test_bad_options_are_refused_with_one_line(
    images: Path, model_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    pool = [] if "--pool" in arguments else ["--pool", "random"]
    done = inside("textspan", images, "--model", model_folder, *pool, *arguments, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
