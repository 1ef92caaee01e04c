"""``clipfast decompose`` as a process: what it writes, what it says, how it ends."""

import json
import signal
import tarfile
from pathlib import Path

import pytest
import torch
from builders import ROOT
from commandline import CONTEXT, HEADS, LAYERS, clipfast, messages, picture, start, write_bad, write_good
from PIL import Image

import clipfast as package
from clipfast.commands.decompose.command import Options, run
from clipfast.commands.options import ImageOptions
from clipfast.errors import ClipfastError
from clipfast.report.shares import rounded

PHOTOS = ROOT.parent / "shared" / "photos"
TEXTS = ("a dog", "a cat", "a photo of a house")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def text_options(texts: tuple[str, ...] = TEXTS) -> list[str]:
    return [part for text in texts for part in ("--texts", text)]


@pytest.mark.slow
def test_good_and_bad_images_together_twice(tmp_path: Path, model_folder: Path) -> None:
    good = write_good(tmp_path / "one")
    bad = write_bad(tmp_path / "two")
    picture(7).save(tmp_path / "two" / "a-rgb.jpg")  # the name of another image
    arguments = ("decompose", "one", "two", "gone.jpg", "--model", model_folder, "--batch-size", 4, *text_options())
    options = ("--per-head", "--tokens", "--layers", "-1")
    done = clipfast(*arguments, *options, "--out", "out", cwd=tmp_path)

    assert done.returncode == 2
    errors = messages(done.stderr)
    for name, word in {**bad, "gone.jpg": "no such file"}.items():
        (line,) = [line for line in errors if name in line]
        assert line.startswith("error: ")
        assert word in line
    assert "error: 5 of 12 images failed" in errors
    assert len(errors) == 5 + 1 + 1, errors  # one line per bad image, the count, and the closing note
    assert "Traceback" not in done.stderr

    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert [entry["file"] for entry in summary["images"]] == [*(f"one/{name}" for name in good), "two/a-rgb.jpg"]
    assert summary["complete"] is True
    assert summary["check"] < 1e-5
    names = [entry["name"] for entry in summary["images"]]
    assert "a-rgb" in names
    assert "a-rgb-2" in names
    assert {failure["file"] for failure in summary["failed"]} == {"gone.jpg", *(f"two/{name}" for name in bad)}

    model = package.load(str(model_folder))
    features = model.encode_text(TEXTS)
    for entry in summary["images"]:
        place = entry["contributions"]
        saved = package.Contributions.load(out / place["file"])
        assert saved.texts == TEXTS
        # the first batch was of four images: the same image alone may differ in the last bits
        direct = model.decompose([tmp_path / entry["file"]], texts=TEXTS, maps="per_head", tokens=True, layers=[-1])
        torch.testing.assert_close(saved.heads()[place["row"]], direct.heads()[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(saved.maps[place["row"]], direct.maps[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(saved.tokens(-1)[place["row"]], direct.tokens(-1)[0], rtol=1e-4, atol=1e-6)
        score = float(direct.embedding[0] / direct.norm[0] @ features[0])
        assert entry["scores"][TEXTS[0]] == pytest.approx(score, abs=1e-5)
        parts = entry["texts"][0]
        total = parts["start"] + sum(parts["attention"].values()) + sum(parts["mlps"]) + parts["rest"]
        assert total == pytest.approx(parts["score"], abs=1e-5)
        assert list(parts["attention"]) == [str(LAYERS - 1)]
        assert len(parts["top_heads"]) == HEADS
        for panel in (entry["panel"], entry["heads_panel"]):
            with Image.open(out / panel) as image:
                image.load()

    again = clipfast(*arguments, *options, "--out", "again", cwd=tmp_path)
    assert again.stdout == done.stdout
    assert contents(tmp_path / "again") == contents(out)
    assert not [name for name in contents(out) if name.endswith(".part")]


@pytest.mark.slow
def test_interrupted_run_keeps_what_is_done(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(400):
        picture(number).save(tmp_path / "images" / f"{number:03d}.png")
    process = start(
        "decompose", tmp_path / "images", "--model", model_folder, *text_options(), "--batch-size", 1,
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline()  # the first image is done
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    (line,) = messages(err)
    assert line.startswith("error: interrupted: ")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["complete"] is False
    assert 0 < len(summary["images"]) < 400
    assert f"{len(summary['images'])} of 400" in line
    for entry in summary["images"]:
        with Image.open(tmp_path / "out" / entry["panel"]) as image:
            image.load()
    saved = package.Contributions.load(tmp_path / "out" / summary["images"][-1]["contributions"]["file"])
    assert len(saved) == summary["images"][-1]["contributions"]["row"] + 1
    assert rounded(float(saved.norm[-1])) == summary["images"][-1]["norm"]
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
def test_unknown_model_is_one_line_with_near_names(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    done = clipfast("decompose", tmp_path / "a.png", "--model", "ViT-B-23", "--out", tmp_path / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no model is called 'ViT-B-23'")
    assert "ViT-B-32" in line
    assert done.stdout == ""


@pytest.mark.slow
def test_photographs(tmp_path: Path, model_folder: Path) -> None:
    shards = sorted(PHOTOS.glob("photos-*.tar"))
    if not shards:
        pytest.skip(f"no photographs at {PHOTOS}")
    with tarfile.open(shards[0]) as archive:
        chosen = [member for member in archive if member.name.endswith(".jpg")][:12]
        archive.extractall(tmp_path / "photos", members=chosen, filter="data")
    arguments = ("decompose", tmp_path / "photos", "--model", model_folder, "--out", tmp_path / "photos" / "out")
    done = clipfast(*arguments, *text_options(), "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    summary = json.loads((tmp_path / "photos" / "out" / "summary.json").read_text())
    assert len(summary["images"]) == 12
    assert summary["failed"] == []
    assert 0 < summary["check"] < 0.05  # bfloat16 has 8 bits


# ------------------------------------------------------------ the same code without a process of its own


def options(folder: Path, model: str, **changes: object) -> Options:
    picture().save(folder / "image.png")
    inputs = {
        name: changes.pop(name) for name in ("images", "pretrained", "device", "dtype", "batch_size") if name in changes
    }
    given = {"out": folder / "out", "texts": TEXTS, **changes}
    image_options = ImageOptions(**{"images": [folder / "image.png"], "model": model, **inputs})  # type: ignore[arg-type]
    return Options(image_options, **given)  # type: ignore[arg-type]


def refusal(asked: Options) -> str:
    with pytest.raises(ClipfastError) as caught:
        run(asked)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_all_images_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    asked = options(tmp_path, "no such model, and none is loaded", images=[tmp_path / "empty", tmp_path / "gone.png"])
    assert run(asked) == 2
    err = capsys.readouterr().err
    assert "no images in this folder" in err
    assert "2 of 2 images failed" in err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["images"] == []


def test_texts_that_do_not_fit(tmp_path: Path, model_folder: Path) -> None:
    long = "a dog " * CONTEXT
    assert f"the model reads {CONTEXT}" in refusal(options(tmp_path, str(model_folder), texts=[long]))
    assert "--texts" in refusal(options(tmp_path, str(model_folder), texts=[" "]))
    (tmp_path / "texts.txt").write_text("\n \n")
    assert "is empty" in refusal(options(tmp_path, str(model_folder), texts_file=tmp_path / "texts.txt"))
    assert "--per-head" in refusal(options(tmp_path, str(model_folder), texts=(), per_head=True))


def test_layers_and_devices_that_do_not_exist(tmp_path: Path, model_folder: Path) -> None:
    assert "whole numbers" in refusal(options(tmp_path, str(model_folder), layers="last"))
    assert "9 does not exist" in refusal(options(tmp_path, str(model_folder), layers="0,9"))
    assert "no device is called 'gpu'" in refusal(options(tmp_path, str(model_folder), device="gpu"))
    assert "cuda:99" in refusal(options(tmp_path, str(model_folder), device="cuda:99"))


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other.pt")
    fits = refusal(options(tmp_path, "ViT-S-32", pretrained=str(tmp_path / "other.pt")))
    assert "does not fit ViT-S-32" in fits
    torch.save({"code": print}, tmp_path / "code.pt")
    assert "more than weights" in refusal(options(tmp_path, "ViT-S-32", pretrained=str(tmp_path / "code.pt")))
    (tmp_path / "page.pt").write_text("<html>")
    assert "page.pt" in refusal(options(tmp_path, "ViT-S-32", pretrained=str(tmp_path / "page.pt")))


def test_without_texts_only_contributions(tmp_path: Path, model_folder: Path) -> None:
    assert run(options(tmp_path, str(model_folder), texts=())) == 0
    assert sorted(contents(tmp_path / "out")) == ["contributions-00000.safetensors", "summary.json"]


def test_no_panels(tmp_path: Path, model_folder: Path) -> None:
    assert run(options(tmp_path, str(model_folder), panels=False)) == 0
    assert not list((tmp_path / "out").rglob("*.png"))


def test_an_embedding_that_is_not_finite_is_a_failed_image(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(1).save(tmp_path / "second.png")
    prepare = package.Model.prepare

    def broken(self: package.Model, given: object) -> torch.Tensor:
        pixels = prepare(self, given)  # type: ignore[arg-type]
        pixels[0] = float("nan")
        return pixels

    monkeypatch.setattr(package.Model, "prepare", broken)
    asked = options(tmp_path, str(model_folder), images=[tmp_path / "image.png", tmp_path / "second.png"], dtype="fp64")
    assert run(asked) == 2
    assert "image.png: the embedding is not finite in fp64" in capsys.readouterr().err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [entry["name"] for entry in summary["images"]] == ["second"]
