"""A model's shape without its weights, and its rate on images that are drawn here."""

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from clipfast.arguments import default_depth
from clipfast.commands import console
from clipfast.commands.loading import check_device, load_model
from clipfast.commands.plan.options import Options
from clipfast.dataset.collecting import collect
from clipfast.dataset.costs import Shape
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.passes import PassOptions
from clipfast.dataset.progress import Tracker
from clipfast.errors import UnsupportedTower
from clipfast.loading import BUNDLED
from clipfast.model import Model
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.scene import sample_scene
from clipfast.summary import code_shape
from clipfast.towers import catalogue
from clipfast.towers.tower import Tower

SIZE = (500, 375)
"""Width and height of the images that are drawn: those of a common photograph in a data set."""
_DRAWN = 32
_MOST = 4096


@dataclass(frozen=True)
class Measured:
    """A rate that was measured here.

    Attributes:
        rate: images per second of one worker.
        images: how many were taken for it.
        device: where.
    """

    rate: float
    images: int
    device: str


def shape_of(tower: Tower) -> Shape:
    """How many numbers a decomposition has, with the heads that it has by default."""
    layers, heads, code = code_shape(tower, default_depth(tower))
    return Shape(layers, heads, code, layers + 2, tower.embed_dim, tower.has_class_token)


def named_shape(name: str) -> Shape:
    """The same of a model by name, without its weights where a package knows the name.

    Raises:
        ModelError: no such model, or one that cannot be decomposed.
    """
    if name not in BUNDLED and not Path(name).is_dir():
        for package in catalogue.installed():
            if name in catalogue.source(package).names():
                _, tower = catalogue.read(package, name)
                if isinstance(tower, UnsupportedTower):
                    raise tower
                return shape_of(tower)
    return shape_of(load_model(name, None, check_device("cpu")).tower)


def measure(model: Model, options: Options) -> Measured:
    """The rate of a pass over drawn JPEGs, reading and writing included, by one worker in this process.

    Raises:
        ClipfastError: the images do not fit into memory.
        OSError: the temporary folder cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="clipfast-plan-") as folder, console.status("measuring"):
        pictures = [_picture(number) for number in range(_DRAWN)]
        size = options.batch_size
        batch = [pictures[number % _DRAWN] for number in range(size)]
        model.decompose(batch)  # kernels are chosen, memory is taken
        started = time.perf_counter()
        model.decompose(batch)
        each = (time.perf_counter() - started) / size
        batches = min(max(4, math.ceil(options.seconds / each / size)), max(4, _MOST // size))
        images = Path(folder, "images")
        images.mkdir()
        for number, picture in enumerate(pictures[: batches * size]):
            picture.save(images / f"{number:06}.jpg", quality=90)
        for number in range(len(pictures), batches * size):
            Path(images / f"{number:06}.jpg").hardlink_to(images / f"{number % _DRAWN:06}.jpg")
        inputs = open_inputs([images])
        kept = PassOptions(kept=options.kept.kept(), batch_size=size, unit_size=batches * size)
        out = Path(folder, "collection")
        started = time.perf_counter()
        units = (unit for each in inputs for unit in each.units(batches * size))
        tracker = Tracker(replace(unit, number=number) for number, unit in enumerate(units))
        collect(inputs, out, model, kept, events=tracker)
        seconds = time.perf_counter() - started
        count = Manifest(out).statuses()["ok"]
        return Measured(tracker.mean_rate() or count / seconds, count, str(model.device))


def _picture(number: int) -> Image.Image:
    pixels, _ = render_with_masks(sample_scene(0, "test", number))
    return Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC)
