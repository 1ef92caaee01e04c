"""Decoding: an encoded image becomes the model's input, or the bytes that a device makes it from.

On the CPU the threads that decode also look up the number of every byte (:mod:`clipfast.preprocessing`). For a model on
a GPU they leave bytes, a quarter of the numbers' memory, and the GPU looks up the same table
(:class:`clipfast.transfer.Levels`).
"""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from clipfast.dataset.flow.fast import Fast
from clipfast.dataset.samples import Sample
from clipfast.errors import ImageError, InputError
from clipfast.images import Draft, Size, as_rgb, decode_image, open_image, plain_jpeg_size, with_memory
from clipfast.inputs import printable
from clipfast.model import Model
from clipfast.preprocessing import Prepare, look_up

Mode: TypeAlias = Literal["exact", "fast"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Decoder:
    """Decodes and prepares images, in many threads at once.

    Args:
        model: whose preprocessing is applied.
        mode: ``"exact"``: the bits that the preprocessing gives itself; ``"fast"``: see
            :mod:`clipfast.dataset.flow.fast`.
        leaves_bytes: whether a batch holds bytes where that is possible; default for a model on a CUDA device.
        leaves_jpegs: whether usual JPEGs are left to the device in fast mode, see :mod:`clipfast.dataset.flow.jpegs`.

    Attributes:
        device: where the model computes.
        seconds: time that all threads have spent so far.
        levels: the number of every byte, ``[3, 256]``, where batches hold bytes; None where they hold numbers.
        fast: the fast form of the preprocessing; None for ``"exact"``.
        leaves_jpegs: whether :meth:`left` leaves any JPEG.

    Raises:
        InputError: no such mode, or a preprocessing that has no fast form.
    """

    def __init__(
        self, model: Model, mode: Mode = "exact", *, leaves_bytes: bool | None = None, leaves_jpegs: bool = False
    ) -> None:
        if mode not in MODES:
            raise InputError(f"preprocessing {mode!r}: choose {' or '.join(MODES)}")
        self.fast = Fast(model.preprocess) if mode == "fast" else None
        self._prepare = Prepare(model.preprocess)
        self._table = self._prepare.levels
        self._size = model.image_size
        self.device = model.device
        bytes_are_left = self.device.type == "cuda" if leaves_bytes is None else leaves_bytes
        self.levels = self._table if bytes_are_left else None
        self.leaves_jpegs = leaves_jpegs and self.fast is not None and self.levels is not None
        # Numbers of unknown steps are rounded to the model's dtype once, later.
        self._dtype = torch.float64 if self._table is None and model.dtype == torch.float64 else torch.float32
        self._lock = threading.Lock()
        self.seconds = 0.0

    def empty(self, images: int) -> Tensor:
        """Memory for so many images: float ``[images, 3, height, width]``, or uint8 ``[images, height, width, 3]``."""
        height, width = self._size
        if self.levels is not None:
            return torch.empty(images, height, width, 3, dtype=torch.uint8)
        return torch.empty(images, 3, height, width, dtype=self._dtype)

    def left(self, sample: Sample) -> Size | None:
        """Width and height of a JPEG that is left to the device; None for an image to be decoded here."""
        if not self.leaves_jpegs or not isinstance(sample.content, bytes):
            return None
        size = plain_jpeg_size(sample.content)
        if size is None or self.fast is None:
            return None
        try:
            self.fast.size(size)
        except ImageError:
            return None
        return size

    def decode(self, sample: Sample, place: NDArray[np.generic]) -> None:
        """Writes an image to its place in a batch.

        Args:
            sample: the image.
            place: an image of :meth:`empty`.

        Raises:
            ImageError: it cannot be decoded.
            InputError: the preprocessing gives images of another size than the model takes.
        """
        if sample.failure is not None:
            raise ImageError(sample.failure.reason, sample.failure.status)
        with self.timed():
            with_memory(lambda: self._decode(sample, place), sample.id)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A block whose time is counted in :attr:`seconds`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds += time.perf_counter() - started

    def _decode(self, sample: Sample, place: NDArray[np.generic]) -> None:
        if self.fast is not None:
            pixels = self._fast_pixels(self.fast, sample)
        elif self._table is not None:
            pixels = self._prepare.pixels(_opened(sample), sample.id)
        else:
            _check_shape(place, self._written(place, sample))
            return
        if self.levels is not None:
            _check_shape(place, pixels.shape)
            place[:] = pixels
        elif self._table is not None:
            _check_shape(place, (3, *pixels.shape[:2]))
            look_up(self._table, pixels, cast(NDArray[np.float32], place))

    def _written(self, place: NDArray[np.generic], sample: Sample) -> tuple[int, ...]:
        """The shape of what the preprocessing gives; it is written where it fits."""
        prepared = self._prepare(_opened(sample), sample.id)
        if tuple(prepared.shape) == place.shape:
            place[:] = prepared.numpy()
        return tuple(prepared.shape)

    def _fast_pixels(self, fast: Fast, sample: Sample) -> NDArray[np.uint8]:
        wanted: list[Size] = []

        def draft(size: Size) -> Size:
            wanted.append(fast.size(size))
            return wanted[-1]

        image = _opened(sample, draft)
        if not wanted:  # not a JPEG: it is whole
            try:
                draft(image.size)
            except ImageError as error:
                raise ImageError(f"{printable(sample.id)}: {error}", error.status) from None
        return fast.pixels(image, wanted[0])


def _opened(sample: Sample, draft: Draft | None = None) -> Image.Image:
    content = sample.content
    if content is None:
        return open_image(sample.path, draft)
    if isinstance(content, bytes):
        return decode_image(io.BytesIO(content), sample.id, draft)
    try:
        content.load()
        return as_rgb(content)
    except ImageError as error:
        raise ImageError(f"{printable(sample.id)}: {error}", error.status) from None
    except (OSError, ValueError, SyntaxError) as error:  # decoders raise what they like on damage
        raise ImageError(f"{printable(sample.id)}: damaged or truncated ({error})") from None


def _check_shape(place: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if place.shape != shape:
        raise InputError(
            f"the preprocessing gives images of shape {list(shape)}, the model takes {list(place.shape)}: "
            "use the preprocessing that belongs to it"
        )
