"""``clipfast scenes``: drawn scenes as plain files with their truth, for whatever takes image folders.

``--out`` gets

* ``images/000000.png`` and so on, and ``masks/`` with the same names: 0 for the background, else the shape's number;
* ``labels.csv``: a row per image with every attribute that has a single value in it, and ``group``, the shape with the
  background, where there is one shape;
* ``classes/``: for each attribute a CSV file with texts of its classes, ``lookalikes.csv`` with those of the two shapes
  that differ little, ``masks.csv`` with the shapes' numbers and texts.
"""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipfast.commands import console
from clipfast.commands.files import prepare_folder
from clipfast.commands.results import prepare_results
from clipfast.commands.scenes.options import Options
from clipfast.errors import InputError
from clipfast.files import atomic_write
from clipfast.scenes.captions import prompts
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.scene import SPLITS, Scene, sample_scene
from clipfast.scenes.vocabulary import ATTRIBUTES, LOOKALIKES, SHAPES

GROUP = "group"


def run(options: Options) -> int:
    """Draws and writes; returns the exit code.

    Raises:
        ClipfastError: no such split, or a folder that cannot be written.
        OSError: a file that cannot be written.
    """
    if options.split not in SPLITS:
        raise InputError(f"--split is {options.split!r}: choose one of {', '.join(SPLITS)}")
    prepare_results(options.out)
    for name in ("images", "masks", "classes"):
        prepare_folder(options.out / name)
    rows = []
    with console.progress("drawing", options.count) as advance:
        for index in range(options.count):
            scene = sample_scene(options.seed, options.split, index)
            rows.append([write_scene(scene, options.out, f"{index:06d}.png"), *truth(scene)])
            advance(1)
    write_csv(options.out / "labels.csv", ("file", *ATTRIBUTES, GROUP), rows)
    for attribute in ATTRIBUTES:
        write_classes(options.out / "classes" / f"{attribute}.csv", prompts(attribute))
    shapes = prompts("shape")
    write_classes(options.out / "classes" / "lookalikes.csv", {shape: shapes[shape] for shape in LOOKALIKES})
    numbered = [(number, shape, text) for number, shape in enumerate(SHAPES, 1) for text in shapes[shape]]
    write_csv(options.out / "classes" / "masks.csv", ("value", "label", "text"), numbered)
    console.say(f"{options.count} scenes of {options.split} in {options.out}: images, masks, labels.csv, classes")
    return 0


def write_scene(scene: Scene, folder: Path, name: str) -> str:
    """Draws a scene and its mask; returns the image's path from the folder."""
    pixels, masks = render_with_masks(scene)
    mask = np.zeros(pixels.shape[:2], dtype=np.uint8)
    for item, covered in zip(scene.objects, masks, strict=True):
        mask[covered] = 1 + SHAPES.index(item.shape)
    for kind, content in (("images", pixels), ("masks", mask)):
        with atomic_write(folder / kind / name, durable=False) as partial:
            Image.fromarray(content).save(partial, format="png")
    return f"images/{name}"


def truth(scene: Scene) -> list[str]:
    """The value of every attribute, empty where the scene has none or several; then the group."""
    values = [scene.value_of(attribute) or "" for attribute in ATTRIBUTES]
    shape = scene.value_of("shape")
    return [*values, f"{shape} in {scene.background}" if shape else ""]


def write_classes(path: Path, texts: dict[str, list[str]]) -> None:
    """Texts of classes as ``--classes`` reads them."""
    write_csv(path, ("label", "text"), [(label, text) for label, some in texts.items() for text in some])


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A CSV file in UTF-8, all at once."""
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
