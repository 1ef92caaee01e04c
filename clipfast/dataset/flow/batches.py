"""Batches of decoded images: always the same images together, whatever the number of threads."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.dataset.flow.decoder import Decoder, failure_of
from clipfast.dataset.samples import Sample
from clipfast.reading import Read, read_ahead


@dataclass(frozen=True)
class Batch:
    """So many samples of a unit, one after the other.

    Attributes:
        samples: all of them, without their contents; those that could not be decoded have a failure.
        rows: the places of those that could be decoded.
        pixels: their input for the model, ``[rows, 3, height, width]``, on the CPU.
    """

    samples: list[Sample]
    rows: list[int]
    pixels: Tensor


class Batches:
    """Puts decoded samples together.

    Args:
        decoder: decodes them.
        size: samples in a batch, those that fail too.
        threads: that decode; default as many as torch computes with.
    """

    def __init__(self, decoder: Decoder, size: int, threads: int | None = None) -> None:
        self._decoder, self._size, self._threads = decoder, size, threads

    def gather(self, samples: Iterable[Sample]) -> Iterator[Batch]:
        """Batches in the order of the samples; the next one is decoded while one is used."""
        with closing(read_ahead(self._decoder.decode, samples, self._size, self._threads)) as batches:
            for batch in batches:
                yield _batch(batch)


def _batch(reads: Sequence[Read[Sample, Tensor]]) -> Batch:
    samples, rows, pixels = [], [], []
    for place, read in enumerate(reads):
        if read.error is not None:
            samples.append(read.item.failed(failure_of(read.error)).without_content())
            continue
        samples.append(read.item.without_content())
        rows.append(place)
        pixels.append(read.result())
    return Batch(samples, rows, torch.stack(pixels) if pixels else torch.empty(0))
