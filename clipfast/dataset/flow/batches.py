"""Batches of decoded images: always the same images together, whatever the number of threads.

Threads decode several batches ahead, each image right into its place. On a CPU whose cores all compute, decoding and
computing take turns: a forward waits at the end of every operation for its slowest thread, so an image that is decoded
meanwhile costs more than its own time. Each turn is of several batches. Where the turn changes, cores are idle for the
last image, and torch's threads spin for a few milliseconds before they sleep.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipfast.dataset.flow.ahead import Ahead
from clipfast.dataset.flow.decoder import Decoder
from clipfast.dataset.samples import Failure, Sample
from clipfast.errors import ImageError, InputError
from clipfast.images import Size
from clipfast.reading import CORES, MAX_THREADS, spare_cores

_IMAGES, _BYTES = 64, 64 << 20
"""How far threads decode ahead, but for two batches in any case."""


@dataclass(frozen=True)
class Batch:
    """So many samples of a unit, one after the other.

    Attributes:
        samples: all of them, without their contents; those that could not be decoded have a failure.
        rows: the places of those that could be decoded.
        pixels: of those, on the CPU: their input for the model, ``[rows, 3, height, width]``, or bytes that it is made
            from, ``[rows, height, width, 3]`` (see :class:`~clipfast.dataset.flow.decoder.Decoder`).
        jpegs: those that were left to the device, with width and height, by their place in ``samples``. They have no
            pixels yet.
    """

    samples: list[Sample]
    rows: list[int]
    pixels: Tensor
    jpegs: Mapping[int, tuple[bytes, Size]] = field(default_factory=dict)


class Batches:
    """Puts decoded samples together.

    Args:
        decoder: decodes them.
        size: samples in a batch, those that fail too.
        threads: that decode; default as many as torch computes with, at most 16.
        takes_turns: whether decoding and computing take turns; default where the model computes on all cores.

    Raises:
        InputError: ``size`` or ``threads`` is below 1.
    """

    def __init__(
        self, decoder: Decoder, size: int, threads: int | None = None, *, takes_turns: bool | None = None
    ) -> None:
        self._threads = min(torch.get_num_threads(), MAX_THREADS) if threads is None else threads
        if size < 1 or self._threads < 1:
            raise InputError(f"batches of {size} images, decoded in {threads} threads: at least one is needed")
        self._decoder, self._size = decoder, size
        shares_cores = decoder.device.type == "cpu" and spare_cores() == 0
        self._takes_turns = shares_cores if takes_turns is None else takes_turns

    def gather(self, samples: Iterable[Sample]) -> Generator[Batch, None, None]:
        """Batches in the order of the samples.

        Threads take the samples, one at a time. Closing the iterator ends them, and closes a
        :class:`~clipfast.dataset.flow.ahead.Ahead`.

        Raises:
            ClipfastError: what taking or decoding a sample raised, unless that is the failure of a single image.
        """
        ahead = _Threads(self._decoder, samples, self._size, self._threads, takes_turns=self._takes_turns)
        try:
            while (batch := ahead.next()) is not None:
                yield batch
        finally:
            ahead.close()


class _Filling:
    """A batch that threads fill."""

    def __init__(self, pixels: Tensor) -> None:
        self.samples: list[Sample] = []
        self.pixels, self.places = pixels, pixels.numpy()
        self.jpegs: dict[int, tuple[bytes, Size]] = {}
        self.left = 0  # images that are being decoded

    def batch(self) -> Batch:
        rows = [row for row, sample in enumerate(self.samples) if sample.failure is None]
        if len(rows) == len(self.samples):
            return Batch(self.samples, rows, self.pixels[: len(rows)], self.jpegs)
        return Batch(self.samples, rows, self.pixels[rows], self.jpegs)


class _Threads:
    """Threads that fill batches, at most so many at a time."""

    def __init__(
        self, decoder: Decoder, samples: Iterable[Sample], size: int, threads: int, *, takes_turns: bool
    ) -> None:
        self._decoder, self._source, self._samples = decoder, samples, iter(samples)
        self._size, self._takes_turns = size, takes_turns
        self._asks = decoder.device.type == "cpu" and not takes_turns  # whether a forward has left a core
        image = decoder.empty(1).nbytes
        self._most = max(2, min(_IMAGES // size, _BYTES // (size * image)))
        self._taking = threading.Lock()  # held while the next sample is awaited
        self._changed = threading.Condition()
        self._fillings: deque[_Filling] = deque()  # the last one may grow
        self._awaited = self._ended = self._closed = False
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, name=f"clipfast-decoder-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def next(self) -> Batch | None:
        """The next batch, None at the end."""
        with self._changed:
            if not self._is_ready(turn=False):
                self._await()
            if self._error is not None:
                raise self._error
            filling = self._fillings.popleft() if self._fillings else None
            self._changed.notify_all()
        return None if filling is None else filling.batch()

    def _await(self) -> None:
        """Waits for the next batch, or for all that may be decoded ahead where decoding and computing take turns."""
        self._awaited = True
        self._changed.notify_all()
        CORES.notify()
        try:
            self._changed.wait_for(lambda: self._error is not None or self._is_ready(turn=self._takes_turns))
        finally:
            self._awaited = False

    def _is_ready(self, *, turn: bool) -> bool:
        """Whether the next batch is decoded, and with ``turn`` all that may be; or whether there is none."""
        fillings = list(self._fillings) if turn else list(self._fillings)[:1]
        whole = all(each.left == 0 and (self._ended or len(each.samples) == self._size) for each in fillings)
        return whole and (self._ended or len(fillings) == (self._most if turn else 1))

    def close(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if isinstance(self._source, Ahead):
            self._source.close()
        CORES.notify()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        try:
            while (taken := self._take()) is not None:
                self._decode(*taken)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _take(self) -> tuple[_Filling, int, Sample] | None:
        """The next sample and its place, None where there is nothing more to do."""
        with self._taking:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or self._may_decode())
                if self._is_over:
                    return None
            sample = next(self._samples, None)
            with self._changed:
                if sample is None:
                    self._ended = True
                    self._changed.notify_all()
                    return None
                if not self._fillings or len(self._fillings[-1].samples) == self._size:
                    self._fillings.append(_Filling(self._decoder.empty(self._size)))
                filling = self._fillings[-1]
                filling.samples.append(sample)
                filling.left += 1
                return filling, len(filling.samples) - 1, sample

    @property
    def _is_over(self) -> bool:
        return self._closed or self._ended or self._error is not None

    def _may_decode(self) -> bool:
        if self._takes_turns and not self._awaited:
            return False
        return len(self._fillings) < self._most or len(self._fillings[-1].samples) < self._size

    def _decode(self, filling: _Filling, row: int, sample: Sample) -> None:
        with CORES.read(lambda: self._awaited or self._closed) if self._asks else nullcontext():
            try:
                size = self._decoder.left(sample)
                if size is not None and isinstance(sample.content, bytes):
                    filling.jpegs[row] = sample.content, size
                elif not self._closed:
                    self._decoder.decode(sample, filling.places[row])
            except ImageError as error:
                sample = sample.failed(Failure.of(error))
        with self._changed:
            filling.samples[row] = sample.without_content()
            filling.left -= 1
            if filling.left == 0:
                self._changed.notify_all()
