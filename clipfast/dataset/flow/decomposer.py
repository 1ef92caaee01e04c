"""Decomposing batches: in smaller parts where memory is short, and without images that are not finite."""

import logging
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipfast.contributions import Contributions
from clipfast.dataset.flow.batches import Batch
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.errors import InputError, is_out_of_memory
from clipfast.model import Model
from clipfast.transfer import Levels, Upload

logger = logging.getLogger("clipfast")

Part = tuple[list[Sample], Contributions | None]


class Decomposer:
    """Decomposes batches.

    On a GPU the next batch is queued before the results of one are looked at, so that the GPU has work meanwhile. How
    much of its time that fills has not been measured.

    Args:
        model: on the device that computes.
        levels: the number of every byte, ``[3, 256]``, for batches of bytes.

    Attributes:
        seconds: time spent so far.
    """

    def __init__(self, model: Model, levels: NDArray[np.float32] | None = None) -> None:
        self._model = model
        self._levels = None if levels is None else Levels(levels, model.device, model.dtype)
        self._upload, self._uploaded = Upload(), model.dtype if levels is None else torch.uint8
        self._ahead = 1 if model.device.type == "cuda" else 0
        self._at_once: int | None = None
        self._computed = False
        self.seconds = 0.0

    def decompose(self, batches: Iterable[Batch]) -> Generator[Part, None, None]:
        """The samples of each batch, with the contributions of those that have no failure.

        Raises:
            InputError: there is not enough memory for a single image.
        """
        queued: deque[_Queued] = deque()
        for batch in batches:
            queued.append(self._queue(batch))
            if len(queued) > self._ahead:
                yield self._part(queued.popleft())
        while queued:
            yield self._part(queued.popleft())

    def _queue(self, batch: Batch) -> "_Queued":
        started = time.perf_counter()
        try:
            return self._queue_parts(batch)
        finally:
            self.seconds += time.perf_counter() - started

    def _queue_parts(self, batch: Batch) -> "_Queued":
        queued = _Queued(list(batch.samples))
        if not batch.rows:
            return queued
        pixels = batch.pixels
        if not pixels.is_cuda:
            pixels = self._upload(pixels, self._model.device, self._uploaded)
        start = 0
        while start < len(batch.rows):
            count = min(self._at_once or len(batch.rows), len(batch.rows) - start)
            rows = batch.rows[start : start + count]
            made = self._fits(pixels[start : start + count])
            if made is not None:
                queued.parts.append(_Decomposed(rows, made))
                start += count
            elif count > 1:
                self._at_once = count // 2
                logger.warning("out of memory with %d images at once: going on with %d", count, self._at_once)
            elif not self._computed:
                raise InputError(f"out of memory on {self._model.device} with a single image: take a smaller model")
            else:
                sample = queued.samples[rows[0]]
                reason = f"{sample.id}: out of memory on {self._model.device}"
                queued.samples[rows[0]] = sample.failed(Failure(Status.OUT_OF_MEMORY, reason))
                start += count
        return queued

    def _fits(self, pixels: Tensor) -> Contributions | None:
        """Contributions; None where memory ran out."""
        try:
            images = pixels if self._levels is None else self._levels(pixels)
            made = self._model.decompose(images, class_token=self._model.tower.has_class_token)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self._computed = True
            return made
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _part(self, queued: "_Queued") -> Part:
        started = time.perf_counter()
        try:
            kept = [self._finite(queued.samples, part) for part in queued.parts]
            kept = [contributions for contributions in kept if len(contributions)]
            return queued.samples, Contributions.cat(kept) if len(kept) > 1 else kept[0] if kept else None
        finally:
            self.seconds += time.perf_counter() - started

    def _finite(self, samples: list[Sample], part: "_Decomposed") -> Contributions:
        finite = part.finite()
        if all(finite):
            return part.contributions
        for row, is_finite in zip(part.rows, finite, strict=True):
            if not is_finite:
                reason = f"{samples[row].id}: the embedding is not finite in {self._model.dtype}".replace("torch.", "")
                samples[row] = samples[row].failed(Failure(Status.NOT_FINITE, reason))
        return part.contributions.select([place for place, is_finite in enumerate(finite) if is_finite])


class _Decomposed:
    """Images that were decomposed at once; on a GPU perhaps not yet."""

    def __init__(self, rows: Sequence[int], contributions: Contributions) -> None:
        self.rows, self.contributions = rows, contributions
        self._finite, self._known = contributions.is_finite(), None
        if self._finite.is_cuda:
            host = torch.empty(self._finite.shape, dtype=torch.bool, pin_memory=True)
            self._finite = host.copy_(self._finite, non_blocking=True)
            self._known = torch.cuda.Event()
            self._known.record(torch.cuda.current_stream(contributions.codes.device))

    def finite(self) -> list[bool]:
        """Which of the images are finite; waits for them."""
        if self._known is not None:
            self._known.synchronize()
        return list(self._finite.tolist())


@dataclass
class _Queued:
    """A batch whose forwards were started."""

    samples: list[Sample]
    parts: list[_Decomposed] = field(default_factory=list)
