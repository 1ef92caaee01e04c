"""Images on their way to a model's input: prepared in threads, the next batch while the last one is used.

Decoding and resizing are C code that gives Python's lock away, so threads do, and nothing has to be started, copied or
sent between processes. What is in a batch, and in what order, does not depend on them.

A forward on a GPU leaves the CPU to the threads that read. One on the CPU waits at the end of every operation for the
slowest of its own threads, so a core that is taken from one of them is taken from all: while it runs, no more images
are begun than there are cores without a thread of its own (:func:`computing`). They are read by all threads at once
before it, and while its results are drawn or written.

JPEGs are decoded whole, as open_clip does: decoding them at half or a quarter of their size would be faster, and give
other pixels.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count, islice
from os import PathLike
from typing import Any, Generic, TypeAlias, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from clipfast.errors import ClipfastError, InputError
from clipfast.images import as_rgb, open_image

Item = TypeVar("Item")
Value = TypeVar("Value")
Transform: TypeAlias = Callable[[Image.Image], Tensor]
Picture: TypeAlias = Image.Image | str | PathLike[str]

MOST_THREADS = 16
_LEVELS = 256
_LAST = (["_convert_to_rgb", "ToTensor", "Normalize"], ["MaybeConvertMode", "MaybeToTensor", "Normalize"])
"""How open_clip's preprocessing ends, in its versions."""


class Prepare:
    """A model's preprocessing, as it is: PIL image → ``[3, height, width]``, bit for bit what it gives itself.

    open_clip's ends by making a float of every byte and normalising it. A channel has 256 bytes, so those two steps are
    asked once what becomes of each and looked up from then on; torch's operations on a picture would also wake as many
    threads for themselves as they run on, in every thread that reads.

    Args:
        transform: the preprocessing; called in several threads at once.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._steps, self._table = _split(transform)

    def __call__(self, image: Image.Image) -> Tensor:
        """The image as the model's input, ``[3, height, width]``."""
        if self._table is None:
            return self._transform(image)
        seen = image
        for step in self._steps:
            seen = step(seen)
        bytes_ = np.asarray(seen)
        prepared = np.empty((3, *bytes_.shape[:2]), np.float32)
        for channel, levels in enumerate(self._table):
            # every byte is a place in the table: "clip" only says that this need not be checked
            np.take(levels, bytes_[:, :, channel], out=prepared[channel], mode="clip")
        return torch.from_numpy(prepared)


def _split(transform: Transform) -> tuple[list[Callable[[Image.Image], Image.Image]], NDArray[np.float32] | None]:
    """The steps up to an 8-bit RGB picture, and what the others make of its bytes, ``[3, 256]``.

    No table for anything but open_clip's own order: … → RGB → ToTensor → Normalize.
    """
    steps: list[Any] = list(cast(Any, transform).transforms) if type(transform) is Compose else []
    if [_name(step) for step in steps[-3:]] not in _LAST or getattr(steps[-3], "mode", "RGB") != "RGB":
        return [], None
    ramp = np.broadcast_to(np.arange(_LEVELS, dtype=np.uint8)[None, :, None], (1, _LEVELS, 3))
    levels = steps[-1](steps[-2](Image.fromarray(np.ascontiguousarray(ramp))))
    if levels.dtype != torch.float32:
        return [], None
    return steps[:-2], levels[:, 0].contiguous().numpy()


def _name(step: object) -> str:
    return getattr(step, "__name__", type(step).__name__)


class _Turns:
    """Who may take a core: forwards on the CPU, and the threads that read."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._forwards = self._reading = self._spare = 0

    @contextmanager
    def forward(self, spare: int) -> Iterator[None]:
        """While a forward runs, which leaves some cores alone."""
        with self._changed:
            self._forwards += 1
            self._spare = spare
        try:
            yield
        finally:
            with self._changed:
                self._forwards -= 1
                self._changed.notify_all()

    @contextmanager
    def read(self, is_awaited: Callable[[], bool]) -> Iterator[None]:
        """While an image is read: at once where somebody waits for it, else when there is a core for it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._forwards or self._reading < self._spare or is_awaited())
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    def changed(self) -> None:
        """Has everybody ask again."""
        with self._changed:
            self._changed.notify_all()


_TURNS = _Turns()


@contextmanager
def computing() -> Iterator[None]:
    """While a model computes on the CPU: images are read ahead on the cores that torch has no thread for."""
    with _TURNS.forward(max(0, _cores() - torch.get_num_threads())):
        yield


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Read(Generic[Item, Value]):
    """What came of one item.

    Attributes:
        item: the item.
        value: what was read; None where that failed.
        error: why it failed, None where it did not.
    """

    item: Item
    value: Value | None
    error: ClipfastError | None = None

    def result(self) -> Value:
        """What was read.

        Raises:
            ClipfastError: :attr:`error`.
        """
        if self.error is not None:
            raise self.error
        assert self.value is not None
        return self.value


def read_ahead(
    read: Callable[[Item], Value], items: Iterable[Item], size: int, threads: int | None = None
) -> Generator[list[Read[Item, Value]], None, None]:
    """Batches of what ``read`` makes of items, in their order; the next batch is read while one is used.

    No more than two batches are held or under way. Closing the iterator, which may be left early, drops what has not
    been begun.

    Args:
        read: what to do with an item, in a thread. A :class:`ClipfastError` it raises is kept for its item; anything
            else is raised when its batch is asked for.
        items: taken two batches ahead.
        size: items of a batch.
        threads: how many read; default as many as torch computes with, at most 16.

    Raises:
        InputError: a batch of nothing, or no threads.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS) if threads is None else threads
    if size < 1 or threads < 1:
        raise InputError(f"batches of {size} images, read in {threads} threads: at least one is needed of either")
    return _read_ahead(read, iter(items), size, threads)


def _read_ahead(
    read: Callable[[Item], Value], items: Iterator[Item], size: int, threads: int
) -> Generator[list[Read[Item, Value]], None, None]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="clipfast-reading")
    begun: deque[list[Future[Read[Item, Value]]]] = deque()
    numbers, awaited = count(), -1

    def kept(item: Item, batch: int) -> Read[Item, Value]:
        with _TURNS.read(lambda: batch <= awaited):
            try:
                return Read(item, read(item))
            except ClipfastError as error:
                return Read(item, None, error)

    def begin() -> None:
        number = next(numbers)
        batch = [pool.submit(kept, item, number) for item in islice(items, size)]
        if batch:
            begun.append(batch)

    try:
        begin()
        while begun:
            begin()  # before waiting for the batch before it: no thread is idle while there is something to read
            awaited += 1
            _TURNS.changed()
            yield [each.result() for each in begun.popleft()]
    finally:
        awaited = next(numbers)  # nobody waits for a core any more
        _TURNS.changed()
        pool.shutdown(cancel_futures=True)


def prepared(transform: Transform, images: Iterable[Picture], size: int) -> Iterator[Tensor]:
    """Images ``size`` at a time, ``[size, 3, height, width]``, by :class:`Prepare` and :func:`read_ahead`.

    Args:
        transform: the preprocessing.
        images: paths, or PIL images. Those are decoded where this is called if they have not been: two of them may
            read from one file.
        size: images of a batch.

    Raises:
        ImageError: a file that cannot be read, when its batch is asked for.
        InputError: batches of nothing.
    """
    prepare = Prepare(transform)

    def read(image: Picture) -> Tensor:
        return prepare(as_rgb(image) if isinstance(image, Image.Image) else open_image(image))

    return _stacked(read_ahead(read, map(_loaded, images), size))


def _loaded(image: Picture) -> Picture:
    if isinstance(image, Image.Image):
        image.load()
    return image


def _stacked(batches: Generator[list[Read[Picture, Tensor]], None, None]) -> Iterator[Tensor]:
    with closing(batches):
        for batch in batches:
            yield torch.stack([each.result() for each in batch])
