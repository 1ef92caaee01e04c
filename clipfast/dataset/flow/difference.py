"""What fast preprocessing changes, measured on the first images of a pass."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from clipfast.dataset.flow.decoder import MODES, Decoder
from clipfast.dataset.inputs.reading import Reading
from clipfast.dataset.plan import Input, Unit, UnitError
from clipfast.dataset.samples import Sample
from clipfast.errors import ImageError
from clipfast.model import Model
from clipfast.transfer import Levels

IMAGES = 32
_AT_ONCE = 8


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
        images: how many are compared.

    Raises:
        InputError: the model's preprocessing has no fast form.
    """
    decoders = [Decoder(model, mode, leaves_bytes=True) for mode in MODES]
    assert decoders[1].levels is not None  # as every preprocessing with a fast form
    numbers = Levels(decoders[1].levels, model.device, model.dtype)
    pairs = islice(_pixels(decoders, islice(samples, 4 * images)), images)
    pixels: list[Tensor] = []  # [mode, images, height, width, 3]
    cosines: list[Tensor] = []
    while batch := list(islice(pairs, _AT_ONCE)):
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


def first_samples(inputs: Sequence[Input], units: Iterable[Unit]) -> Iterator[Sample]:
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
