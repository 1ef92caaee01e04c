"""``clipfast segment`` with what does not fit, and interrupted."""

import shutil
import signal
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from time import sleep
from typing import Any

import pytest
from commandline import clipfast, picture, start
from masked import BACKGROUND, CLASSES, IGNORED, KINDS, asked, mask, texts_of, write_data, written

import clipfast as package
from clipfast.commands.options import ClassOptions, InputOptions
from clipfast.commands.segment.command import Options, run
from clipfast.commands.segment.targets import read_background


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_masks_that_do_not_fit_are_one_line_each(data: Path, model_folder: Path, tmp_path: Path) -> None:
    """A missing one, one of another size, one in colour, a damaged one, two of one image: left out."""
    shutil.copytree(data / "masks", tmp_path / "masks")
    masks = tmp_path / "masks"
    (masks / "cat" / "0.png").unlink()
    mask(0, 30, 30).save(masks / "cat" / "1.tif")
    picture(0).save(masks / "dog" / "0.png")
    (masks / "dog" / "1.tif").write_bytes(b"II*\0 nothing more")
    mask(0).save(masks / "owl" / "0.bmp")
    done = clipfast(
        *("segment", data / "images", "--model", model_folder, "--labels", "folder", "--masks", masks),
        *("--methods", "ours", "--out", tmp_path / "o"),
    )
    assert done.returncode == 2
    for words in (
        "images/cat/0.png: no mask (looked for ",
        "cat/1.png: its mask and the image differ in size, 30x30 and 48x40",
        "dog/0.png: the mask has mode RGB",
        "dog/1.tif: ",
        "owl/0.png: two masks, ",
        "5 images or paths were left out",
        "the baseline gets",  # one image is near chance
    ):
        assert sum(words in line for line in done.stderr.splitlines()) == 1, words
    assert "Traceback" not in done.stderr
    result = written(tmp_path / "o")
    assert (result["images"], len(result["failed"]), result["complete"]) == (1, 5, True)
    first, second, header, row = done.stdout.splitlines()
    assert first.startswith("# zero-shot accuracy")
    assert second.startswith("# 1 image, aligned protocol, against the mean over all classes")
    assert header.split("\t") == ["# method", "accuracy", "mIoU", "mAP", "mAP both"]
    assert row.startswith("ours\t")


def test_values_that_are_no_class(
    data: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"masks": str(data / "masks"), "mask_values": data / "values.csv", "zeroshot": texts_of(data)}
    with pytest.raises(package.InputError, match="none of the 6 images could be used"):
        run(Options(asked(data / "images", model_folder), out=tmp_path, multiclass=True, **options))  # type: ignore[arg-type]
    lines = capsys.readouterr().err.splitlines()
    assert sum("its mask has the values [255], which are no class" in line for line in lines) == 6
    assert len(written(tmp_path)["failed"]) == 6


def test_background_texts(data: Path) -> None:
    assert list(read_background(str(data / "background.txt"))) == BACKGROUND
    assert read_background(str(data / "classes.csv")) == CLASSES
    assert len(read_background("scenes")) > 100
    with pytest.raises(package.InputError, match="--background-texts is 'none': neither a file nor one of general"):
        read_background("none")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "ours,best"}, "--methods is 'ours,best': choose from ours, attention"),
        ({"threshold": "2"}, "--threshold is '2'"),
        ({"masks": "nowhere"}, "--masks is 'nowhere': give a folder"),
        ({"masks": None}, "--ignore says how to read masks"),
        ({"multiclass": True}, "give --masks and --mask-values"),
        ({"background": 0.5}, "--background is a threshold for --multiclass"),
        ({"texts": ["a cat"]}, "leave out --classes, --prompt and --templates"),
        ({"texts": ["a cat"], "zeroshot": ClassOptions()}, "'a cat' has nothing to stand out from"),
        ({"texts": ["a", "b"], "zeroshot": ClassOptions(), "target": "label"}, "--target label needs labels"),
        (
            {"mask_values": "values.csv", "zeroshot": ClassOptions(), "labels": "labels.csv"},
            "no mask value for the label 'fox'",
        ),
        ({"mask_values": "twice.csv"}, "the value 1 is 'dog', and 'cat' before"),
        ({"mask_values": "classes.csv"}, "needs the columns value and label: it has label, text"),
        ({"labels": None, "zeroshot": ClassOptions()}, "nothing to find: give --texts"),
        ({"group_column": "group"}, "--group-column is not supported"),
    ],
)
def test_bad_options_are_refused_with_one_line(data: Path, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    """Said before a model is loaded: there is none of that name."""
    (data / "labels.csv").write_text(
        "file,label\n" + "".join(f"images/{kind}/0.png,fox\n" for kind in KINDS[:1]) + "images/dog/0.png,cat\n"
    )
    (data / "twice.csv").write_text("value,label\n1,cat\n1,dog\n")
    given = {name: data / value if name == "mask_values" else value for name, value in given.items()}
    labels = given.pop("labels", "folder")
    labels = str(data / labels) if labels == "labels.csv" else labels
    collecting = InputOptions(
        [data / "images"], model="no-such-model", labels=labels, group_column=given.pop("group_column", None)
    )
    options = {"masks": str(data / "masks"), "zeroshot": texts_of(data), "ignore": IGNORED, **given}
    with pytest.raises(package.InputError, match=message):
        run(Options(collecting, out=tmp_path, **options))


@pytest.mark.slow
def test_an_interrupted_pass_keeps_what_it_has(model_folder: Path, tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(300):
        picture(number).save(tmp_path / "images" / f"{number:03}.png")
        mask(number).save(tmp_path / "masks" / f"{number:03}.png")
    process = start(
        *("segment", tmp_path / "images", "--masks", tmp_path / "masks", "--texts", "a cat", "--texts", "a dog"),
        *("--model", model_folder, "--batch-size", 1, "--out", tmp_path / "o", "--panels", 300),
    )
    while not (tmp_path / "o" / "panels").is_dir() and process.poll() is None:
        sleep(0.05)
    with suppress(TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.skip("this machine was done before it could be interrupted")
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "of 300 images are done" in err
    result = written(tmp_path / "o")
    assert result["complete"] is False
    assert 0 < result["images"] < 300
    assert abs(len(result["panels"]) - result["images"]) <= 1
