"""Decomposing batches: in smaller parts where memory is short, and without images that are not finite."""

import logging
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clipfast.contributions import Contributions
from clipfast.dataset.flow.batches import Batch
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.errors import InputError, is_out_of_memory
from clipfast.model import Model

logger = logging.getLogger("clipfast")

Part = tuple[list[Sample], Contributions | None]


class Decomposer:
    """Decomposes batches.

    Args:
        model: on the device that computes.

    Attributes:
        seconds: time spent so far.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._at_once: int | None = None
        self._computed = False
        self.seconds = 0.0

    def decompose(self, batch: Batch) -> Iterator[Part]:
        """The samples of a batch in parts, each with the contributions of those that have no failure.

        Raises:
            InputError: there is not enough memory for a single image.
        """
        started = time.perf_counter()
        try:
            parts = list(self._parts(batch))
        finally:
            self.seconds += time.perf_counter() - started
        yield from parts

    def _parts(self, batch: Batch) -> Iterator[Part]:
        samples = list(batch.samples)
        if not batch.rows:
            yield samples, None
            return
        contributions = []
        start = 0
        while start < len(batch.rows):
            count = min(self._at_once or len(batch.rows), len(batch.rows) - start)
            rows = batch.rows[start : start + count]
            made = self._fits(batch.pixels[start : start + count])
            if made is not None:
                contributions.append(self._finite(samples, rows, made))
                start += count
            elif count > 1:
                self._at_once = count // 2
                logger.warning("out of memory with %d images at once: going on with %d", count, self._at_once)
            elif not self._computed:
                raise InputError(f"out of memory on {self._model.device} with a single image: take a smaller model")
            else:
                sample = samples[rows[0]]
                reason = f"{sample.id}: out of memory on {self._model.device}"
                samples[rows[0]] = sample.failed(Failure(Status.OUT_OF_MEMORY, reason))
                start += count
        kept = [part for part in contributions if len(part)]
        yield samples, Contributions.cat(kept) if len(kept) > 1 else kept[0] if kept else None

    def _fits(self, pixels: Tensor) -> Contributions | None:
        """Contributions; None where memory ran out."""
        try:
            made = self._model.decompose(pixels, class_token=self._model.tower.has_class_token)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self._computed = True
            return made
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _finite(self, samples: list[Sample], rows: Sequence[int], made: Contributions) -> Contributions:
        finite = made.is_finite().tolist()
        if all(finite):
            return made
        for row, is_finite in zip(rows, finite, strict=True):
            if not is_finite:
                reason = f"{samples[row].id}: the embedding is not finite in {self._model.dtype}".replace("torch.", "")
                samples[row] = samples[row].failed(Failure(Status.NOT_FINITE, reason))
        return made.select([place for place, is_finite in enumerate(finite) if is_finite])
