"""``clipfast plan``: what it says follows from the rate and the sizes that it is given."""

import json
from pathlib import Path
from typing import Any

import pytest
from commandline import HEADS, LAYERS, inside, picture

import clipfast as package
from clipfast.commands.plan.measuring import named_shape, shape_of
from clipfast.dataset.costs import RECORD_BYTES, TABLE_BYTES
from clipfast.dataset.manifest import Manifest

EMBED, CODE = 24, 16


def plan(*arguments: object) -> dict[str, Any]:
    done = inside("plan", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def test_a_plan_by_hand(model_folder: Path) -> None:
    """2 · 2 · 16 numbers of codes in 2 bytes; 1,000,000 images in 100 units for 2 · 5 workers: 10 rounds of 100 s."""
    arguments = ["--rate", 100, "--machines", 2, "--workers", 5, "--start", 20, "--disk", 1, "--image-bytes", 50_000]
    content = plan("--model", model_folder, "--images", "1M", *arguments, "--no-terms", "--no-class-codes")
    codes = LAYERS * HEADS * CODE * 2
    assert content["bytes_per_image"] == {"codes": codes, "embeddings": EMBED * 4, "table": TABLE_BYTES}
    columns = CODE + 3
    moments = 8 * (LAYERS * HEADS * columns * (columns + 3) + (LAYERS + 2) * EMBED)
    assert content["bytes_per_unit"] == {"moments": moments, "records": RECORD_BYTES}
    (made,) = content["estimates"]
    assert (made["units"], made["seconds"]) == (100, 20 + 10 * 100)
    assert made["merge_seconds"] == 100 * moments / 1e6
    assert made["hours"] == pytest.approx((1020 + 100 * moments / 1e6) / 3600)
    assert made["read"] == 50e9
    assert made["written"]["codes"] == codes * 1e6
    assert made["disk"] == pytest.approx(
        1e6 * (codes + EMBED * 4 + TABLE_BYTES) + 100 * (moments + RECORD_BYTES) + made["written"]["once"]
    )
    assert made["reading"] == 5 * 100 * 50_000


def test_the_table(model_folder: Path) -> None:
    done = inside("plan", "--model", model_folder, "--rate", 250, "--workers", 8, "--moments-only")
    assert done.returncode == 0, done.stderr
    title, headers, *rows = done.stdout.splitlines()
    assert title == f"# {model_folder}, 1 machine with 8 workers of 250 images/s, units of 10,000 images"
    assert headers == "# what\t1 M images\t100 M images\t5 B images"
    table = {row.split("\t")[0]: row.split("\t")[1:] for row in rows}
    assert table["units of work"] == ["100", "10,000", "500,000"]
    assert table["images read"] == ["100 GB", "10 TB", "500 TB"]
    assert table["time"][2] == "28.9 days"  # 62,500 rounds of 40 s
    assert table["a machine reads"] == ["200 MB/s"] * 3
    assert "on disk, codes" not in table
    assert "bytes of images: 100 kB assumed, see --image-bytes" in done.stderr


@pytest.mark.parametrize("name", ["ViT-L-14", "timm:vit_small_patch16_224", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
def test_shapes_of_models_without_their_weights(name: str) -> None:
    shape = named_shape(name)
    expected = {
        "ViT-L-14": (24, 16, 64, 26, 768, True),
        "timm:vit_small_patch16_224": (12, 6, 64, 14, 1000, True),
        "ViT-B-16-SigLIP": (1, 12, 64, 3, 768, False),
        "coca_ViT-B-32": (1, 8, 64, 3, 512, True),
    }[name]
    assert (shape.layers, shape.heads, shape.code, shape.terms, shape.embed, shape.class_token) == expected


def test_a_shape_is_that_of_the_contributions(model_folder: Path) -> None:
    model = package.load(str(model_folder), device="cpu")
    made = model.decompose([picture()], class_token=True)
    shape = shape_of(model.tower)
    assert (shape.layers, shape.heads, shape.code) == made.codes.shape[1:]
    assert (shape.terms, shape.embed) == (made.mlps.shape[1] + 2, made.mlps.shape[2])
    assert named_shape(str(model_folder)) == shape


def test_a_rate_that_is_measured(model_folder: Path) -> None:
    arguments = ["--model", model_folder, "--device", "cpu", "--seconds", 0.2, "--batch-size", 4, "--images", 1000]
    content = plan(*arguments)
    assert content["machines"]["rate"] > 0
    assert content["notes"][0].startswith("rate: measured on ")
    assert content["notes"][0].endswith("drawn images of 500 x 375 pixels, one worker on cpu")
    (made,) = content["estimates"]
    assert made["seconds"] == pytest.approx(30 + 1000 / content["machines"]["rate"])


def test_a_plan_like_a_collection(model_folder: Path, tmp_path: Path) -> None:
    """Bytes are those of its files, the rate that of its last run."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        picture(number).save(tmp_path / "images" / f"{number:02}.png")
    out = tmp_path / "c"
    arguments = ["--model", model_folder, "--device", "cpu", "--unit-size", 6, "--batch-size", 1, "--out", out]
    assert inside("collect", tmp_path / "images", *arguments).returncode == 0
    (out / "last_run.json").unlink()
    refused = inside("plan", "--like", out)
    assert refused.returncode == 2
    assert "does not say how fast its last run was: give --rate" in refused.stderr
    speed = {"images_per_second": 30.0, "workers": 3, "devices": ["cpu"]}
    (out / "last_run.json").write_text(json.dumps(speed))
    content = plan("--like", out, "--images", 12_000)
    assert content["machines"]["rate"] == 10
    assert content["unit_images"] == 6
    (made,) = content["estimates"]
    manifest = Manifest(out)
    sizes = {name: size for record in manifest.records() for name, (size, _) in record.files.items()}
    codes = sum(
        size for record in manifest.records() for name, (size, _) in record.files.items() if name.startswith("codes/")
    )
    assert made["written"]["codes"] == pytest.approx(1000 * codes)
    assert made["written"]["moments"] == pytest.approx(2000 * sizes["moments.safetensors"])
    assert plan("--like", out, "--rate", 7, "--images", 10)["machines"]["rate"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "many"], "--images is 'many': give a number such as 1000, 100M or 5B"),
        (["--rate", "0"], "Must be > 0"),
        (["--machines", "0"], "Must be >= 1"),
        (["--rate", "1", "--model", "no-such-model"], "no-such-model"),
        (["--rate", "1", "--model", "ViT-B-32-quickgelu-x"], "ViT-B-32-quickgelu-x"),
        (["--like", "gone"], "gone is no collection"),
        (["--like", "gone", "--model", "scenes"], "--like gone has a model already: leave --model out"),
        (["--like", "gone", "--no-codes"], "--like gone says what is kept"),
        (["--device", "gpu"], "no device is called 'gpu'"),
    ],
)
def test_errors_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = inside("plan", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
