"""Samples and models for the tests of the flow."""

import io
import threading
from collections.abc import Iterable, Iterator

import numpy as np
from builders import clip_model
from PIL import Image

from clipfast import Model, wrap
from clipfast.dataset.plan import Unit
from clipfast.dataset.samples import Sample

WAIT = 20
"""Seconds after which a test that waits has failed."""


def model() -> Model:
    """Images of 24 × 24, with the preprocessing of open_clip."""
    return wrap(clip_model())


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Blocks of colour with noise: edges as well as grain."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3))
    pixels = blocks.repeat(16, 0).repeat(16, 1)[:height, :width] + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def encoded(width: int, height: int, seed: int, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    picture(width, height, seed).save(file, form, **options)
    return file.getvalue()


def sample(number: int, content: bytes | Image.Image | None) -> Sample:
    return Sample(f"{number:04}.jpg", "/shard.tar", f"{number:04}.jpg", f"{number:04}", content=content)


def samples(count: int) -> list[Sample]:
    """JPEGs of many sizes."""
    return [sample(number, encoded(40 + 7 * number % 50, 30 + 11 * number % 60, number)) for number in range(count)]


class Held:
    """An input of one unit, whose samples are handed out when a test says so.

    Attributes:
        given: how many samples were taken from it so far.
    """

    name = "held"

    def __init__(self, contents: Iterable[Sample], error: Exception | None = None) -> None:
        self._contents, self._error = contents, error
        self.given = 0
        self.go = threading.Event()
        self.go.set()
        self.closed = False

    def units(self, size: int) -> Iterator[Unit]:
        yield Unit("shard", "/shard.tar", number=0)

    def pause(self) -> None:
        assert self.go.wait(WAIT)

    def read(self, unit: Unit) -> Iterator[Sample]:
        try:
            for each in self._contents:
                self.pause()
                self.given += 1
                yield each
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


UNIT = Unit("shard", "/shard.tar", number=0)


def threads() -> list[str]:
    """Threads of the flow that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clipfast-")]
