"""``--image-size``: the bundled model on rectangular images through every command, and sizes that do not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import inside
from PIL import Image

import clipfast as package
from clipfast.contributions import Contributions
from clipfast.dataset.collection import Collection

SIZE, TEXT = (48, 96), "48x96"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("scenes") / "drawn"
    assert inside("scenes", "--count", 12, "--out", folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def collected(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("collected") / "c"
    ran = inside("collect", scenes / "images", *labels(scenes), "--image-size", TEXT, "--out", folder)
    assert ran.returncode == 0
    assert "images of 48x96" in ran.stderr
    return folder


def labels(scenes: Path) -> list[object]:
    return ["--labels", scenes / "labels.csv", "--label-column", "shape"]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_decompose_draws_maps_of_the_grid(scenes: Path, tmp_path: Path) -> None:
    image = scenes / "images" / "000000.png"
    options = ("--texts", "a star", "--texts", "the sea", "--per-head", "--image-size", TEXT, "--out", tmp_path)
    ran = inside("decompose", image, *options)
    assert ran.returncode == 0
    summary = read(tmp_path / "summary.json")
    assert summary["image_size"] == list(SIZE)
    assert summary["check"] <= 1e-5
    kept = Contributions.load(tmp_path / "contributions-00000.safetensors")
    assert kept.grid == (6, 12)
    expected = package.load("scenes", device="cpu", image_size=SIZE).decompose([image])
    assert torch.allclose(kept.embedding, expected.embedding, atol=1e-5)
    for name in ("000000.png", "heads/000000.png"):
        panel = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert panel.std() > 10


def test_one_side_is_a_square(scenes: Path, tmp_path: Path) -> None:
    image = scenes / "images" / "000000.png"
    assert inside("decompose", image, "--image-size", 96, "--out", tmp_path).returncode == 0
    assert read(tmp_path / "summary.json")["image_size"] == [96, 96]
    assert inside("decompose", image, "--out", tmp_path / "own").returncode == 0
    assert read(tmp_path / "own" / "summary.json")["image_size"] == [64, 64]


def test_a_collection_records_its_size_and_keeps_to_it(scenes: Path, collected: Path, tmp_path: Path) -> None:
    collection = Collection(collected)
    assert collection.header["image_size"] == list(SIZE)
    ((_, contributions),) = collection.batches()
    assert contributions.grid == (6, 12)
    for options in ([], ["--image-size", "96x48"]):
        ran = inside("collect", scenes / "images", *labels(scenes), *options, "--out", collected)
        assert ran.returncode != 0
        other = [96, 48] if options else [64, 64]
        assert f"holds images collected with image size [48, 96], not {other}" in ran.stderr
    ran = inside("textspan", collected, "--image-size", 64, "--out", tmp_path)
    assert ran.returncode != 0
    assert "was collected with image size 48x96, not 64x64: leave --image-size out" in ran.stderr
    small = tmp_path / "pool.txt"
    small.write_text("a star\na heart\nthe sea\n", encoding="utf-8")
    for options in ([], ["--image-size", TEXT]):
        ran = inside("textspan", collected, "--pool", small, "--size", 2, *options, "--out", tmp_path)
        assert ran.returncode == 0
        assert "images of 48x96" in ran.stderr


def test_analyses_of_a_collection(scenes: Path, collected: Path, tmp_path: Path) -> None:
    classes = ("--classes", scenes / "classes" / "shape.csv")
    query = scenes / "images" / "000001.png"
    assert inside("retrieve", collected, "--heads", "L5.H1", "--query", query, "--out", tmp_path / "r").returncode == 0
    assert inside("ablate", collected, *classes, "--out", tmp_path / "a").returncode == 0
    pool = ("--pool", "scenes", "--size", 2)
    ran = inside("report", collected, *classes, *pool, "--heads", "L5", "--out", tmp_path / "page.html")
    assert ran.returncode == 0
    assert "48 × 96 pixels" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_segment_moves_masks_like_the_images(scenes: Path, collected: Path, tmp_path: Path) -> None:
    classes = ("--classes", scenes / "classes" / "shape.csv")
    masks = ("--masks", scenes / "masks", "--panels", 1)
    ran = inside(
        "segment", scenes / "images", *masks, *labels(scenes), *classes, "--image-size", TEXT, "--out", tmp_path / "m"
    )
    assert ran.returncode == 0
    result = read(tmp_path / "m" / "segment.json")
    assert result["image_size"] == list(SIZE)
    ran = inside("segment", collected, *masks, *classes, "--out", tmp_path / "c")
    assert ran.returncode == 0
    again = read(tmp_path / "c" / "segment.json")
    assert again["image_size"] == list(SIZE)
    assert again["methods"] == result["methods"]


def test_demo_and_doctor(tmp_path: Path) -> None:
    assert inside("demo", "--scenes", 1, "--image-size", "96x64", "--out", tmp_path).returncode == 0
    ran = inside("doctor", "scenes", "--image-size", TEXT, "--json")
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["ok"] is True
    ran = inside("doctor", "--image-size", TEXT)
    assert ran.returncode != 0
    assert "--image-size is for testing a model" in ran.stderr


@pytest.mark.parametrize("command", ["decompose", "collect", "segment", "report", "textspan"])
@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("60", "images of 60 × 60 pixels are not whole patches of 8 × 8: try 64 × 64"),
        ("64x0", "--image-size is '64x0': give HEIGHTxWIDTH in pixels, such as 336x672, or one side"),
        ("64x64x3", "--image-size is '64x64x3': give"),
        ("big", "--image-size is 'big': give"),
        ("-64", "--image-size is '-64': give"),
        ("", "--image-size is '': give"),
    ],
)
def test_a_size_that_does_not_fit_is_one_line(
    scenes: Path, tmp_path: Path, command: str, size: str, message: str
) -> None:
    needed = ("--texts", "a star", "--texts", "a heart") if command == "segment" else ()
    ran = inside(command, scenes / "images", *needed, f"--image-size={size}", "--out", tmp_path / "out")
    assert ran.returncode == 2
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [line for line in ran.stderr.splitlines() if not line.startswith(("model ", "warning: "))]
    assert len(lines) == 1
    assert message in lines[0]
