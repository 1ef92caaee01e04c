"""``clipfast report`` as a process: its numbers are those of the analyses, written out here, its refusals one line."""

import csv
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from time import sleep

import pytest
import torch
from commandline import HEADS, LAYERS, clipfast, picture, start
from pages import NASTY, Parsed

import clipfast as package
from clipfast.commands.collect import command as collect
from clipfast.commands.collect.options import DataOptions, KeptOptions
from clipfast.commands.options import ClassOptions, InputOptions, PoolOptions
from clipfast.commands.report import command as report
from clipfast.commands.report.images import in_turn
from clipfast.commands.report.options import PictureOptions
from clipfast.dataset.merging import MERGED

WORDS = ["cat", "dog", "house", "tree", "car", "boat", "face", "hand", "road", "sky"]
TEXTS = [f"a photo of a {word}" for word in WORDS]
LABELS = ("cats", "dogs")
FILES = [NASTY, *(f"{number}.png" for number in range(11))]
TOP, RANDOM = 2, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    folder.mkdir()
    with (folder.parent / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("file", "kind", "place"))
        for number, name in enumerate(FILES):
            picture(number).save(folder / name)
            if number != 5:  # one without a label
                rows.writerow((name, LABELS[number % 2], f"<{number % 3}>"))
    (folder.parent / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    return folder


@pytest.fixture(scope="module")
def written(images: Path, model_folder: Path) -> Path:
    """A page with everything, of images that were not collected before."""
    page = images.parent / "out" / "all.html"
    done = clipfast(
        *("report", images, "--model", model_folder, "--labels", images.parent / "labels.csv"),
        *(
            "--label-column",
            "kind",
            "--group-column",
            "place",
            "--batch-size",
            5,
            "--pool",
            images.parent / "texts.txt",
        ),
        *("-m", 4, "--top", TOP, "--random", RANDOM, "--examples", 2, "--maps", 3, "--title", NASTY, "--out", page),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{page}\n"
    assert "near chance" in done.stderr  # a random model
    return page


@pytest.fixture(scope="module")
def page(written: Path) -> Parsed:
    return Parsed(written.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(model_folder: Path) -> package.Model:
    return package.load(str(model_folder))


@pytest.fixture(scope="module")
def seen(images: Path, model: package.Model) -> tuple[list[str], package.Contributions]:
    names = sorted(FILES)
    return names, model.decompose([images / name for name in names], class_token=True)


def accuracy(model: package.Model, names: list[str], features: torch.Tensor) -> tuple[float, float]:
    """Of the labelled images, and of their worst group."""
    classifier = model.encode_text([f"a photo of a {label}." for label in LABELS])
    rows = [row for row, name in enumerate(names) if FILES.index(name) != 5]
    numbers = [FILES.index(names[row]) for row in rows]
    right = (features[rows] @ classifier.T).argmax(1) == torch.tensor([number % 2 for number in numbers])
    groups = torch.tensor([number % 3 for number in numbers])
    return float(right.double().mean()), min(float(right[groups == group].double().mean()) for group in range(3))


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def row(page: Parsed, table: str, name: str) -> list[str]:
    """The cells of a row of one of the tables of numbers: the columns after its name."""
    section = page.source[page.source.index(f"<h3>{table}</h3>") :]
    inside = section[section.index(f'<th scope="row">{name}</th>') :].split("</tr>")[0]
    return [cell.text for cell in Parsed(f"<table><tr>{inside}</tr></table>").all("td")]


@pytest.mark.slow
def test_one_file_and_a_collection_beside_it(written: Path) -> None:
    assert sorted(path.name for path in written.parent.iterdir()) == ["all-collection", "all.html"]
    assert (written.parent / "all-collection" / "collection.json").is_file()


def test_accuracies_are_those_of_the_embedding(
    page: Parsed, model: package.Model, seen: tuple[list[str], package.Contributions]
) -> None:
    names, result = seen
    base, worst = accuracy(model, names, result.embedding)
    facts = page.by_id("summary").text
    assert percent(base) in facts
    assert "of 11 images; chance 50.0 %" in facts
    assert row(page, "Attention ablated layer by layer", "nothing") == [percent(base), percent(worst)]
    whole = result.embedding / result.norm[:, None]
    mlps = result.mlps.sum(1)
    assert row(page, "MLPs and the class token", "all MLPs")[0] == percent(
        accuracy(model, names, whole - mlps + mlps.mean(0))[0]
    )
    own = result.class_token().sum(1)
    assert row(page, "MLPs and the class token", "CLS→CLS")[0] == percent(
        accuracy(model, names, whole - own + own.mean(0))[0]
    )
    heads = result.heads()
    attention = heads.sum((1, 2))
    assert row(page, "Attention ablated layer by layer", f"layers 0 to {LAYERS - 1}")[0] == percent(
        accuracy(model, names, whole - attention + attention.mean(0))[0]
    )
    assert row(page, "Heads replaced by their texts", "0")[0] == percent(
        accuracy(model, names, whole - attention + attention.mean(0))[0]
    )
    for layer in range(LAYERS):
        for head in range(HEADS):
            alone, of_group = accuracy(model, names, whole - heads[:, layer, head] + heads[:, layer, head].mean(0))
            said = page.by_id(f"L{layer}.H{head}").text
            assert f"accuracy {percent(alone)}, worst group {percent(of_group)}" in said


def test_shares_texts_and_best_images(
    page: Parsed, model: package.Model, seen: tuple[list[str], package.Contributions]
) -> None:
    names, result = seen
    features = model.encode_text(TEXTS)
    outputs = result.heads().double()
    variances = outputs.var(0).sum(-1)
    cells = {cell.text: cell for cell in page.all("th", class_="c-head")}
    shares = [float(cell.attributes["data-v"] or 0) for cell in page.all("td", class_="c-share")]
    assert shares == pytest.approx((variances / variances.sum()).flatten().sort(descending=True).values, rel=1e-4)
    whole = (result.embedding / result.norm[:, None]).double()
    for layer in range(LAYERS):
        attention = outputs[:, layer].sum(1)
        share = ((attention - attention.mean(0)) * (whole - whole.mean(0))).sum() / (len(names) - 1)
        assert row(page, "Where the variance comes from", str(layer))[0].replace("−", "-") == percent(
            float(share / whole.var(0).sum())
        )
        for head in range(HEADS):
            name = f"L{layer}.H{head}"
            assert name in cells
            span = package.textspan(result.head(layer, head), features, 4)
            at = page.source.index(f'id="{name}"')
            inside = Parsed(page.source[at - 18 : page.source.index("</details>", at)])
            assert [each.text for each in inside.all("span", class_="word")] == [TEXTS[pick] for pick in span.picks]
            shots = [each.attributes["title"] or "" for each in inside.all("span", class_="t")]
            assert len(shots) == 3 * (TOP + RANDOM)
            for text, pick in enumerate(span.picks[:3]):
                scores = result.head(layer, head) @ features[pick]
                best = scores.argsort(descending=True)[:TOP].tolist()
                at = text * (TOP + RANDOM)
                assert [shot.split(": ")[0] for shot in shots[at : at + TOP]] == [names[image] for image in best]
                values = [each.text for each in inside.all("span", class_="v")][at : at + TOP]
                assert values == [f"{float(scores[image]):+.3f}".replace("-", "−") for image in best]
    assert len(page.all("figure", class_="map")) == 3
    assert "maps of 1 of 4 heads: --maps is 3" in page.by_id("summary").text


def test_names_are_escaped(page: Parsed) -> None:
    assert page.all("h1")[0].text == NASTY
    assert any((shot.attributes["title"] or "").startswith(NASTY) for shot in page.all("span", class_="t"))
    assert not any(name.startswith("on") for element in page.elements for name in element.attributes)
    made = page.by_id("summary").text
    assert re.search(r"<[012]>, [34] images", made)  # the worst group
    assert "clipfast report" in made
    assert f"torch {metadata.version('torch')}" in made
    assert "accuracy on 1 of 12 images: they have no label" in made
    assert len(page.by_id("examples").text.split("label: ")) == 3


def test_moments_alone_are_enough_for_texts(
    images: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moments = DataOptions([str(images)], model=str(model_folder))
    assert collect.run(collect.Options(moments, out=tmp_path / "c", kept=KeptOptions(moments_only=True))) == 0
    options = report.Options(
        InputOptions([tmp_path / "c"]), out=tmp_path / "folder", naming=PoolOptions(pool="random"), size=2, heads="L1"
    )
    assert report.run(options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "folder" / "report.html")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["report.html"]
    page = Parsed((tmp_path / "folder" / "report.html").read_text(encoding="utf-8"))
    summary = page.by_id("summary").text
    assert "the collection holds moments only" in summary
    assert "the images have no labels" in summary
    assert f"texts of {HEADS} heads: --heads names others" in summary
    assert page.by_id("L1.H0").text.count("random vector") == 2
    assert "random vector" not in page.by_id("L0.H0").text


def test_images_that_are_gone_have_no_pictures(images: Path, model_folder: Path, tmp_path: Path) -> None:
    """All but three were deleted after they were collected; and of those three two thumbnails were wanted."""
    copied = shutil.copytree(images, tmp_path / "images")
    options = DataOptions([str(copied)], model=str(model_folder), batch_size=5)
    assert collect.run(collect.Options(options, out=tmp_path / "c")) == 0
    for path in sorted(copied.iterdir())[3:]:
        path.unlink()
    given = InputOptions([tmp_path / "c"])
    pictures = PictureOptions(top=12, random=0, thumbnails=12, maps=0, examples=0)
    texts = str(images.parent / "texts.txt")
    assert (
        report.run(report.Options(given, out=tmp_path / "all.html", naming=PoolOptions(pool=texts), pictures=pictures))
        == 0
    )
    page = Parsed((tmp_path / "all.html").read_text(encoding="utf-8"))
    assert "pictures of 9 images: their files could not be opened again" in page.by_id("summary").text
    assert page.all("style")[0].text.count("data:image/webp") == 3
    few = report.Options(
        given, out=tmp_path / "few.html", naming=PoolOptions(pool=texts), pictures=replace(pictures, thumbnails=2)
    )
    assert report.run(few) == 0
    page = Parsed((tmp_path / "few.html").read_text(encoding="utf-8"))
    assert "thumbnails of 10 of 12 images: --thumbnails is 2" in page.by_id("summary").text


@pytest.mark.slow
def test_ctrl_c_leaves_the_page_as_it_was(images: Path, model_folder: Path, tmp_path: Path) -> None:
    """After the pass over the images, while texts are encoded."""
    out, collection = tmp_path / "report.html", tmp_path / "report-collection"
    out.write_text("before")
    process = start("report", images, "--model", model_folder, "--pool", "common_words", "--out", out)
    while process.poll() is None and not (collection / MERGED).is_file():
        sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("this machine was done before it could be interrupted")
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report-collection", "report.html"]
    assert out.read_text() == "before"


@pytest.mark.slow
def test_bad_options_are_refused_with_one_line(written: Path, images: Path, model_folder: Path, tmp_path: Path) -> None:
    done = clipfast("report", images, "--model", model_folder, "--prompt", "a {}", "--out", tmp_path / "o")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == "error: --classes, --prompt and --templates say what labels mean: give --labels, too"
    collection = InputOptions([written.parent / "all-collection"])
    for options, message in (
        (report.Options(collection, out=tmp_path / "o", heads="mlps"), "--heads is 'mlps'"),
        (
            report.Options(collection, out=tmp_path / "o", naming=PoolOptions(pool="nothing.txt")),
            "--pool is 'nothing.txt'",
        ),
        (report.Options(collection, out=images.parent / "labels.csv" / "x.html"), "it is a file, not a folder"),
        (report.Options(collection, out=tmp_path / "o", zeroshot=ClassOptions(prompt=["no place"])), "it needs one {}"),
    ):
        with pytest.raises(package.InputError, match=re.escape(message)):
            report.run(options)
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.slow
def test_without_jinja2_nothing_begins(images: Path, tmp_path: Path) -> None:
    arguments = ["clipfast", "report", str(images), "--out", str(tmp_path / "o")]
    script = (
        f"import sys; sys.modules['jinja2'] = None; sys.argv = {arguments!r}; from clipfast.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: clipfast report needs the package jinja2: pip install 'clipfast[report]'\n"
    assert not (tmp_path / "o").exists()


def test_order_of_thumbnails() -> None:
    """Best images of every head's first text, then of its second; then the second bests."""
    rows = {(1, 0): [[7, 1], [2, 3]], (0, 0): [[4, 7], [5]]}
    assert in_turn(rows) == [7, 4, 2, 5, 1, 3]
    assert in_turn({}) == []
