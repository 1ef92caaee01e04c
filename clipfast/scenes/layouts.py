"""Drawn scenes in the layouts of public data sets, to try on them what is meant for those.

Shapes stand in for ImageNet's classes and for CUB's birds, flowers and gears for land birds and water birds, forest
and city for land and water. Everything is drawn from a seed: the same arguments always give the same files.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from itertools import count as counting
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipfast.errors import MissingExtra
from clipfast.files import write_text
from clipfast.scenes.drawing import render, render_with_masks
from clipfast.scenes.scene import Scene, sample_scene
from clipfast.scenes.vocabulary import COLOURS, LOOKALIKES, SHAPES

TEMPLATE: Final = "a picture of a {}"
WATERBIRD_NAMES: Final = {"landbird": "flower", "waterbird": "gear"}
"""What the bundled model calls the two classes of :func:`write_waterbirds`."""

Layout = Literal["folders", "solution", "devkit"]


def shape_scenes(count: int, seed: int = 0, split: str = "test-unbiased") -> Iterator[tuple[Scene, str]]:
    """The first scenes that have one kind of object, with its shape."""
    scenes = (sample_scene(seed, split, index) for index in counting())
    return islice(((scene, shape) for scene in scenes if (shape := scene.value_of("shape")) is not None), count)


def wnid(shape: str) -> str:
    """The id that stands for a shape, in the form of WordNet's."""
    return f"n{90000001 + SHAPES.index(shape)}"


def write_imagenet(folder: Path, count: int, *, layout: Layout = "folders", seed: int = 0) -> Path:
    """Scenes as ImageNet's validation images, one class per shape.

    Args:
        folder: gets ``val/`` and ``LOC_synset_mapping.txt``.
        count: images.
        layout: ``"folders"``: a folder per class; ``"solution"``: one folder and ``LOC_val_solution.csv``;
            ``"devkit"``: one folder and the development kit's two files.
        seed: which scenes.

    Returns:
        The folder.
    """
    shapes = []
    for number, (scene, shape) in enumerate(shape_scenes(count, seed), 1):
        shapes.append(shape)
        inside = f"val/{wnid(shape)}" if layout == "folders" else "val"
        _save(render(scene), folder / inside / f"ILSVRC2012_val_{number:08d}.JPEG")
    write_text(
        folder / "LOC_synset_mapping.txt", "".join(f"{wnid(shape)} {shape}, {shape} shape\n" for shape in SHAPES)
    )
    if layout == "solution":
        rows = [(f"ILSVRC2012_val_{number:08d}", f"{wnid(shape)} 1 2 30 40 ") for number, shape in enumerate(shapes, 1)]
        _table(folder / "LOC_val_solution.csv", ("ImageId", "PredictionString"), reversed(rows))
    elif layout == "devkit":
        data = folder / "ILSVRC2012_devkit_t12" / "data"
        data.mkdir(parents=True, exist_ok=True)
        numbers = {shape: len(SHAPES) - place for place, shape in enumerate(SHAPES)}  # not the order of the ids
        lines = [f"{numbers[shape]}\n" for shape in shapes]
        write_text(data / "ILSVRC2012_validation_ground_truth.txt", "".join(lines))
        write_text(data / "map_clsloc.txt", "".join(f"{wnid(shape)} {numbers[shape]} {shape}\n" for shape in SHAPES))
    return folder


def write_waterbirds(folder: Path, count: int, *, train: int = 0, seed: int = 0) -> Path:
    """Look-alikes as Waterbirds: in training nearly all on their usual background, in the test all groups even.

    Args:
        folder: gets ``metadata.csv`` and the images.
        count: images of the test split.
        train: images of the training split.
        seed: which scenes.

    Returns:
        The folder.
    """
    alike = ((sample_scene(seed, "lookalike", index), 2) for index in range(count))
    biased = ((scene, 0) for scene, shape in shape_scenes(100 * train + 1, seed, "train") if shape in LOOKALIKES)
    usual = ((scene, split) for scene, split in biased if scene.background in ("forest", "city"))
    rows = []
    for number, (scene, split) in enumerate([*islice(usual, train), *alike]):
        bird = LOOKALIKES.index(scene.objects[0].shape)
        place = ("forest", "city").index(scene.background)
        name = f"{bird + 1:03d}.{LOOKALIKES[bird]}/{number:06d}.jpg"
        _save(render(scene), folder / name)
        rows.append((number, name, bird, split, place, f"/{scene.background}.jpg"))
    columns = ("img_id", "img_filename", "y", "split", "place", "place_filename")
    _table(folder / "metadata.csv", columns, rows)
    return folder


def write_cub(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Scenes as CUB-200-2011, a species per shape, with their colours as the attribute ``has_primary_color``.

    Args:
        folder: gets the data set's text files, ``images/`` and ``attributes/``.
        count: images; every fourth is for training.
        seed: which scenes.

    Returns:
        The folder.
    """
    classes = {shape: f"{place:03d}.{shape.capitalize()}" for place, shape in enumerate(SHAPES, 1)}
    files, labels, split, marks = [], [], [], []
    for number, (scene, shape) in enumerate(shape_scenes(count, seed), 1):
        name = f"{classes[shape]}/{number:06d}.jpg"
        _save(render(scene), folder / "images" / name)
        files.append(f"{number} {name}\n")
        labels.append(f"{number} {SHAPES.index(shape) + 1}\n")
        split.append(f"{number} {int(number % 4 == 0)}\n")
        colour = scene.value_of("colour")
        marks += [f"{number} {place} {int(each == colour)} 4 1.0\n" for place, each in enumerate(COLOURS, 1)]
    (folder / "attributes").mkdir(parents=True, exist_ok=True)
    write_text(folder / "images.txt", "".join(files))
    write_text(folder / "image_class_labels.txt", "".join(labels))
    write_text(folder / "train_test_split.txt", "".join(split))
    write_text(folder / "classes.txt", "".join(f"{place} {name}\n" for place, name in enumerate(classes.values(), 1)))
    named = [f"{place} has_primary_color::{colour}\n" for place, colour in enumerate(COLOURS, 1)]
    write_text(folder / "attributes" / "attributes.txt", "".join(named))
    write_text(folder / "attributes" / "image_attribute_labels.txt", "".join(marks))
    return folder


def masked_scenes(count: int, seed: int = 0) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Images ``[64, 64, 3]`` with masks ``[64, 64]``, 1 where an object is."""
    for scene, _ in shape_scenes(count, seed):
        pixels, masks = render_with_masks(scene)
        yield pixels, np.asarray(masks.any(0), dtype=np.uint8)


def write_segmentation(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Scenes with masks as plain files: ``images/`` and ``masks/``.

    Returns:
        The folder.
    """
    for number, (pixels, mask) in enumerate(masked_scenes(count, seed)):
        _save(pixels, folder / "images" / f"{number:06d}.png")
        _save(mask, folder / "masks" / f"{number:06d}.png")
    return folder


def write_segmentation_mat(file: Path, count: int, *, seed: int = 0) -> Path:
    """Scenes with masks in the form of ``gtsegs_ijcv.mat``.

    Returns:
        The file.

    Raises:
        MissingExtra: h5py is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise MissingExtra("h5py", "benchmarks", "writing a MATLAB 7.3 file") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w", userblock_size=512) as opened:
        pointer = h5py.ref_dtype
        images = opened.create_dataset("value/img", (count, 1), pointer)
        truths = opened.create_dataset("value/gt", (count, 1), pointer)
        for number, (pixels, mask) in enumerate(masked_scenes(count, seed)):
            image = opened.create_dataset(f"#refs#/image{number}", data=pixels.transpose(2, 1, 0))
            truth = opened.create_dataset(f"#refs#/mask{number}", data=mask.T)
            cell = opened.create_dataset(f"#refs#/cell{number}", (1, 1), pointer)
            cell[0, 0] = truth.ref
            images[number, 0], truths[number, 0] = image.ref, cell.ref
    with file.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM")
    return file


def _save(pixels: NDArray[Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix.lower() in (".jpg", ".jpeg") else {}
    Image.fromarray(pixels).save(path, **options)


def _table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])
