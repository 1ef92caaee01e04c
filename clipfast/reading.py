"""Reading images into a model's input: threads prepare the next batch while the last one is used.

Decoding and resizing are C code that releases Python's lock, so threads suffice; no processes are started, and nothing
is copied between them. The contents and the order of batches do not depend on the number of threads.

A forward on a GPU leaves the CPU to the reading threads. A forward on the CPU waits at the end of every operation for
its slowest thread, so taking a core from one of its threads slows all of them. While it runs, no more images are begun
than there are cores without one of its threads (:func:`computing`). All threads read before it, and while its results
are drawn or written.

JPEGs are decoded at full size, as open_clip does: decoding at half or a quarter of it would be faster, but give other
pixels.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from os import PathLike, fspath
from typing import Generic, Literal, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor

from clipfast.errors import ClipfastError, ImageError, InputError
from clipfast.images import as_rgb, open_image, with_memory
from clipfast.inputs import printable
from clipfast.preprocessing import Prepare, Transform

Item = TypeVar("Item")
Value = TypeVar("Value")
Picture: TypeAlias = Image.Image | str | PathLike[str]
OnError: TypeAlias = Literal["raise", "skip"]

MAX_THREADS = 16


class _Cores:
    """Shares the cores between forwards on the CPU and the threads that read."""

    def __init__(self) -> None:
        # Taken by itself: what a signal handler raises at the end of Condition.__enter__ would leave it taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._forwards = self._reading = self._spare = 0

    @contextmanager
    def forward(self, spare: int) -> Iterator[None]:
        """While a forward runs that leaves ``spare`` cores to reading threads."""
        with self._lock:
            self._forwards += 1
            self._spare = spare
        try:
            yield
        finally:
            with self._lock:
                self._forwards -= 1
                self._changed.notify_all()

    @contextmanager
    def read(self, is_awaited: Callable[[], bool]) -> Iterator[None]:
        """While an image is read: starts at once if its batch is awaited, else when a core is free."""
        with self._lock:
            self._changed.wait_for(lambda: not self._forwards or self._reading < self._spare or is_awaited())
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1
                self._changed.notify_all()

    def notify(self) -> None:
        """Has every waiting thread check its condition again."""
        with self._lock:
            self._changed.notify_all()


CORES = _Cores()
"""Those of this process."""


@contextmanager
def computing() -> Iterator[None]:
    """While a model computes on the CPU: images are read ahead only on cores that none of torch's threads uses."""
    with CORES.forward(spare_cores()):
        yield


def spare_cores() -> int:
    """Cores that none of torch's threads uses while a model computes on the CPU."""
    return max(0, _available_cores() - torch.get_num_threads())


def _available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Read(Generic[Item, Value]):
    """The result of reading one item.

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
    """Batches of the results of ``read``, in the order of the items; the next batch is read while one is used.

    At most two batches are read or waiting at any time. Closing the iterator early drops what has not been started.

    Args:
        read: reads an item, in a thread. A :class:`ClipfastError` it raises is kept for its item; any other exception
            is raised when its batch is asked for.
        items: consumed up to two batches ahead.
        size: items per batch.
        threads: number of reading threads; default the number of threads that torch computes with, at most 16.

    Raises:
        InputError: ``size`` or ``threads`` is below 1.
    """
    threads = min(torch.get_num_threads(), MAX_THREADS) if threads is None else threads
    if size < 1 or threads < 1:
        raise InputError(f"batches of {size} images, read in {threads} threads: at least one is needed of either")
    return _read_ahead(read, iter(items), size, threads)


def _read_ahead(
    read: Callable[[Item], Value], items: Iterator[Item], size: int, threads: int
) -> Generator[list[Read[Item, Value]], None, None]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="clipfast-reading")
    started: deque[list[Future[Read[Item, Value]]]] = deque()
    numbers, awaited = count(), -1

    def read_item(item: Item, batch: int) -> Read[Item, Value]:
        with CORES.read(lambda: batch <= awaited):
            try:
                return Read(item, read(item))
            except ClipfastError as error:
                return Read(item, None, error)

    def start() -> None:
        number = next(numbers)
        batch = [pool.submit(read_item, item, number) for item in islice(items, size)]
        if batch:
            started.append(batch)

    try:
        start()
        while started:
            start()  # before waiting for the previous batch: no thread is idle while there is something to read
            awaited += 1
            CORES.notify()
            yield [future.result() for future in started.popleft()]
    finally:
        awaited = next(numbers)  # threads that wait for a core go on, and end
        CORES.notify()
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read.

    Attributes:
        index: its position among all images.
        image: the image as it was given.
        error: why it could not be read.
    """

    index: int
    image: Picture
    error: ClipfastError


class ImageBatches(Iterator[Tensor]):
    """Batches of images as a model's input, see :func:`prepared`.

    Attributes:
        skipped: the images left out so far, in their order; always empty with ``on_error="raise"``.
        indices: positions of the last batch's images among all images.
    """

    def __init__(
        self,
        batches: Generator[list[Read["_Item", Tensor]], None, None],
        on_error: OnError,
        join: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        self.skipped: list[Skipped] = []
        self.indices: list[int] = []
        self._batches, self._on_error, self._join = batches, on_error, join

    def __next__(self) -> Tensor:
        """The next batch, ``[images, 3, height, width]``; at most as many images as asked for, at least one."""
        for batch in self._batches:
            if self._on_error == "raise":
                for row in batch:
                    if row.error is not None:
                        self.close()
                        raise row.error
            rows = [row for row in batch if row.error is None]
            self.skipped += [
                Skipped(row.item.index, row.item.image, row.error) for row in batch if row.error is not None
            ]
            if rows:
                self.indices = [row.item.index for row in rows]
                return self._join([row.result() for row in rows])
        raise StopIteration

    def close(self) -> None:
        """Stops reading ahead; what has not been started is dropped."""
        self._batches.close()

    def __del__(self) -> None:
        self._batches.close()


@dataclass(frozen=True)
class _Item:
    """An image with its position, and why it cannot be read where that is known already."""

    index: int
    image: Picture
    error: ClipfastError | None = None

    @property
    def name(self) -> str:
        filename = getattr(self.image, "filename", "") if isinstance(self.image, Image.Image) else fspath(self.image)
        return filename or f"image {self.index}"


def prepared(
    transform: Transform,
    images: Iterable[Picture],
    size: int,
    on_error: OnError = "raise",
    join: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> ImageBatches:
    """Batches of ``size`` images, ``[size, 3, height, width]``, by :class:`Prepare` and :func:`read_ahead`.

    Args:
        transform: the preprocessing.
        images: paths, or PIL images. PIL images that are not decoded yet are decoded in the calling thread: two of them
            may read from one file.
        size: images per batch.
        on_error: ``"raise"`` raises the error of an image that cannot be read; ``"skip"`` leaves the image out and
            reports it in :attr:`ImageBatches.skipped`.
        join: makes a batch of its images, ``[3, height, width]`` each; ``torch.stack`` for None.

    Raises:
        ImageError: a file that cannot be read, when its batch is asked for and ``on_error`` is ``"raise"``.
        InputError: ``size`` is below 1, another ``on_error``, or something that is neither a path nor a PIL image.
    """
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error is {on_error!r}: expected 'raise' or 'skip'")
    prepare = Prepare(transform)

    def read(item: _Item) -> Tensor:
        if item.error is not None:
            raise item.error
        image = item.image

        def read_image() -> Tensor:
            rgb = _convert(image, item.name) if isinstance(image, Image.Image) else open_image(image)
            return prepare(rgb, item.name)

        return with_memory(read_image, item.name)

    return ImageBatches(read_ahead(read, _items(images), size), on_error, _stack if join is None else join)


def _stack(images: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(images))


def _convert(image: Image.Image, name: str) -> Image.Image:
    try:
        return as_rgb(image)
    except ImageError as error:
        raise ImageError(f"{printable(name)}: {error}", error.status) from None


def _items(images: Iterable[Picture]) -> Iterator[_Item]:
    for index, image in enumerate(images):
        if isinstance(image, Image.Image):
            try:
                image.load()
            except Exception as error:  # decoders raise what they like on damage
                yield _Item(index, image, ImageError(f"image {index}: damaged or truncated ({error})"))
                continue
        elif not isinstance(image, str | PathLike):
            raise InputError(f"image {index} is a {type(image).__name__}: expected a path or a PIL image")
        yield _Item(index, image)
