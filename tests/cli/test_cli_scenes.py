"""``clipfast scenes``: files that agree with the records they were drawn from."""

import csv
from pathlib import Path

import numpy as np
from commandline import clipfast
from PIL import Image

from clipfast.scenes.captions import prompts
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.scene import sample_scene
from clipfast.scenes.vocabulary import ATTRIBUTES, LOOKALIKES, SHAPES


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_hold_the_truth(tmp_path: Path) -> None:
    done = clipfast("scenes", "--count", 12, "--split", "test", "--seed", 3, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read(tmp_path / "labels.csv")
    assert len(rows) == 12
    seen = set()
    for index, row in enumerate(rows):
        scene = sample_scene(3, "test", index)
        pixels, masks = render_with_masks(scene)
        assert np.array_equal(np.asarray(Image.open(tmp_path / row["file"])), pixels)
        mask = np.asarray(Image.open(tmp_path / row["file"].replace("images", "masks")))
        assert np.array_equal(mask > 0, np.asarray(masks).any(0))
        assert {SHAPES[value - 1] for value in np.unique(mask) if value} <= {item.shape for item in scene.objects}
        assert {name: row[name] or None for name in ATTRIBUTES} == {name: scene.value_of(name) for name in ATTRIBUTES}
        seen |= {name for name in ATTRIBUTES if not row[name]}
    assert seen  # some scene has no single value of something
    for name in ATTRIBUTES:
        texts = [(row["label"], row["text"]) for row in read(tmp_path / "classes" / f"{name}.csv")]
        assert texts == [(label, text) for label, some in prompts(name).items() for text in some]
    assert {row["label"] for row in read(tmp_path / "classes" / "lookalikes.csv")} == set(LOOKALIKES)
    numbers = {row["label"]: int(row["value"]) for row in read(tmp_path / "classes" / "masks.csv")}
    assert numbers == {shape: number for number, shape in enumerate(SHAPES, 1)}


def test_an_unknown_split(tmp_path: Path) -> None:
    done = clipfast("scenes", "--split", "validation", "--out", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --split is 'validation': choose one of train, test, test-unbiased, lookalike\n"
