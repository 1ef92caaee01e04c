"""Small collections made by a real pass over drawn pictures, some of them bad."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from builders import clip_model
from PIL import Image

from clipfast import Contributions, Model, wrap
from clipfast.dataset.collecting import collect
from clipfast.dataset.passes import PassOptions
from clipfast.dataset.plan import Unit
from clipfast.dataset.samples import Failure, Sample, Status

EVERYTHING = {"codes": "float16", "class_codes": "float16", "terms": "float16", "embeddings": "float32"}
EXACT = dict.fromkeys(EVERYTHING, "float32")


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class Pictures:
    """An input: units of drawn pictures; every third one of a unit is bad where it is to have bad ones.

    Attributes:
        sizes: pictures of each unit.
        bad: units with bad pictures.
        lost: units whose pictures are all bad.
        shared: a name that a picture of every unit has.
    """

    sizes: tuple[int, ...]
    bad: tuple[int, ...] = ()
    lost: tuple[int, ...] = ()
    shared: str | None = None
    name: str = "pictures"

    def units(self, size: int) -> Iterator[Unit]:
        start = 0
        for count in self.sizes:
            yield Unit("items", "", start, start + count)
            start += count

    def read(self, unit: Unit) -> Iterator[Sample]:
        for number in range(unit.start, unit.stop):
            place = number - unit.start
            name = self.shared if self.shared is not None and place == 0 else f"picture {number}"
            label = ("cat", None, "dog")[number % 3]
            sample = Sample(name, f"/pictures/{number}.png", label=label, group=f"g{number % 2}", size=number or None)
            if unit.number in self.lost or (unit.number in self.bad and place % 3 == 1):
                yield sample.failed(Failure(Status.MISSING, "gone"))
            elif unit.number in self.bad and place % 3 == 2:
                yield Sample(name, sample.path, content=encoded(number)[:90])
            else:
                yield replace(sample, content=encoded(number))

    def names(self, unit: Unit) -> Iterator[Sample]:
        return (sample.without_content() for sample in self.read(unit))


def tiny_model() -> Model:
    return wrap(clip_model())


def run(folder: Path, model: Model, pictures: Pictures, kept: dict[str, str] = EXACT, batch_size: int = 16) -> None:
    """Collects pictures."""
    collect([pictures], folder, model, PassOptions(kept=kept, batch_size=batch_size))


def decomposed(model: Model, pictures: Pictures, batch_size: int = 16) -> Contributions:
    """The contributions of the pictures that are good, in the batches of the pass."""
    parts = []
    for number, unit in enumerate(pictures.units(0)):
        numbers = [n for n in range(unit.start, unit.stop) if number not in pictures.bad or (n - unit.start) % 3 == 0]
        numbers = [] if number in pictures.lost else numbers
        with torch.no_grad():
            parts += [
                model.decompose([picture(n) for n in numbers[first : first + batch_size]], class_token=True)
                for first in range(0, len(numbers), batch_size)
            ]
    return Contributions.cat(parts)
