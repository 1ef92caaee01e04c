"""What fast preprocessing changes, measured on the first images of a pass."""

import json
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.dataset.flow.decoder import MODES, Decoder
from clipfast.dataset.inputs.reading import Reading
from clipfast.dataset.plan import Input, Unit, UnitError
from clipfast.dataset.samples import Sample
from clipfast.errors import ImageError
from clipfast.files import write_text
from clipfast.model import Model
from clipfast.transfer import Levels

IMAGES = 32
FILE = "preprocessing.json"
"""Where a collection keeps its difference."""
_AT_ONCE = 8
_SECONDS = 30.0


@dataclass(frozen=True)
class Difference:
    """How far fast preprocessing is from the model's own.

    Attributes:
        images: that were compared.
        largest: difference between two pixels, in levels of 255.
        mean: of the differences of all pixels, in levels.
        least_cosine: of an image's two embeddings.
        mean_cosine: of all images.
    """

    images: int
    largest: int
    mean: float
    least_cosine: float
    mean_cosine: float

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """One line."""
        return (
            f"fast preprocessing: pixels of {self.images} images differ by {self.mean:.2g} of 255 levels on average, "
            f"{self.largest} at most; cosine of the embeddings {self.mean_cosine:.5f} on average, "
            f"{self.least_cosine:.5f} at least"
        )


def difference(model: Model, samples: Iterable[Sample], images: int = IMAGES) -> Difference | None:
    """Compares both preprocessings of the first images that can be read; None where there are none.

    Args:
        model: whose preprocessing it is.
        samples: of the pass; at most four times as many as ``images`` are tried.
        images: how many are compared; fewer, but not below eight, where that takes longer than half a minute.

    Raises:
        InputError: the model's preprocessing has no fast form.
    """
    decoders = [Decoder(model, mode, leaves_bytes=True) for mode in MODES]
    assert decoders[1].levels is not None  # as every preprocessing with a fast form
    numbers = Levels(decoders[1].levels, model.device, model.dtype)
    pairs = islice(_pixels(decoders, islice(samples, 4 * images)), images)
    pixels: list[Tensor] = []  # [mode, images, height, width, 3]
    cosines: list[Tensor] = []
    end = time.monotonic() + _SECONDS
    while (not pixels or time.monotonic() < end) and (batch := list(islice(pairs, _AT_ONCE))):
        pixels.append(torch.stack(batch, 1))
        embeddings = [model.decompose(numbers(each.to(model.device))).embedding.double() for each in pixels[-1]]
        cosines.append(torch.cosine_similarity(embeddings[0], embeddings[1]).cpu())
    if not pixels:
        return None
    exact, fast = torch.cat(pixels, 1).int()
    cosine, levels = torch.cat(cosines), (exact - fast).abs()
    return Difference(
        images=len(exact),
        largest=int(levels.max()),
        mean=float(levels.double().mean()),
        least_cosine=float(cosine.min()),
        mean_cosine=float(cosine.mean()),
    )


def _pixels(decoders: Sequence[Decoder], samples: Iterable[Sample]) -> Iterator[Tensor]:
    """The bytes of every image that can be read, by every decoder: ``[decoders, height, width, 3]``."""
    for sample in samples:
        both = torch.cat([decoder.empty(1) for decoder in decoders])
        try:
            for decoder, place in zip(decoders, both.numpy(), strict=True):
                decoder.decode(sample, place)
        except ImageError:
            continue
        yield both


def kept_difference(folder: Path, model: Model, inputs: Sequence[Input], units: Iterable[Unit]) -> Difference | None:
    """The difference that a collection keeps; measured and written where it has none.

    Args:
        folder: of the collection.
        model: of the pass.
        inputs: of the pass.
        units: of the pass.

    Raises:
        InputError: the model's preprocessing has no fast form.
        OSError: it cannot be written.
    """
    try:
        return Difference(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or damaged
        pass
    with closing(first_samples(inputs, units)) as samples:
        measured = difference(model, samples)
    if measured is not None:
        write_text(folder / FILE, json.dumps(measured.to_json()) + "\n")
    return measured


def first_samples(inputs: Sequence[Input], units: Iterable[Unit]) -> Generator[Sample, None, None]:
    """The samples of a pass in their order, as far as they are asked for; units that cannot be read are passed over.

    Args:
        inputs: of the pass.
        units: of the pass.
    """
    for unit in units:
        samples = inputs[unit.input].read(unit)
        try:
            yield from samples
        except UnitError:
            continue
        finally:
            if isinstance(samples, Reading):
                samples.close()
