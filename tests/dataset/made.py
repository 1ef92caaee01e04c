"""A data set that is made in memory, and a small model: what passes are tested with."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from builders import randomise
from open_clip.model import CLIP
from PIL import Image

import clipfast
from clipfast.dataset.manifest import KEPT, Manifest
from clipfast.dataset.passes import PassOptions
from clipfast.dataset.plan import Unit, UnitError
from clipfast.dataset.samples import Failure, Sample, Status

EVERYTHING = PassOptions(kept=dict.fromkeys(KEPT, "float32"), unit_size=4, batch_size=3)


def small_model(seed: int = 3) -> clipfast.Model:
    config = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
    text = {"context_length": 12, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    module = CLIP(24, vision_cfg=config, text_cfg=text).eval()
    randomise(module, seed=seed)
    return clipfast.wrap(module)


def encoded(number: int) -> bytes:
    """A small PNG, different for every number."""
    pixels = np.random.default_rng(number).integers(0, 255, (40, 36, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@dataclass
class Made:
    """Images by number. Bad ones cannot be decoded, missing ones are not there; a broken unit ends after two images."""

    count: int = 18
    bad: frozenset[int] = frozenset({5, 6})
    missing: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    labels: Mapping[int, str] = field(default_factory=dict)
    name: str = "made"

    def units(self, size: int) -> Iterator[Unit]:
        for start in range(0, self.count, size):
            yield Unit("items", "", start, min(start + size, self.count))

    def read(self, unit: Unit) -> Iterator[Sample]:
        for number in range(unit.start, unit.stop):
            if unit.number in self.broken and number == unit.start + 2:
                raise UnitError("damaged", f"unit {unit.number} ends in the middle")
            sample = Sample(f"image {number}", "made", f"row {number}", label=self.labels.get(number))
            if number in self.missing:
                yield sample.failed(Failure(Status.MISSING, f"image {number}: no such file"))
                continue
            yield Sample(
                sample.id,
                "made",
                sample.member,
                content=b"damaged" if number in self.bad else encoded(number),
                label=sample.label,
            )


def contents(folder: Path) -> dict[int, object]:
    """Everything that the records of a collection name, but the names of folders."""
    manifest = Manifest(folder)
    return {record.unit: (record.statuses, record.files, record.problem) for record in manifest.records()}
