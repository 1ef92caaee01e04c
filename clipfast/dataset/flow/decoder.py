"""Decoding: an encoded image becomes the model's input."""

import io
import threading
import time
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.errors import ClipfastError, ImageError
from clipfast.images import as_rgb, decode_image, open_image, with_memory
from clipfast.preprocessing import Prepare


class FailedSampleError(ClipfastError):
    """An image that the reader could not read; its ``failure`` says why."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.status = failure.status


class Decoder:
    """Decodes and prepares images, in many threads at once.

    Args:
        preprocess: the model's preprocessing: PIL image → ``[3, height, width]``.

    Attributes:
        seconds: time that all threads have spent so far.
    """

    def __init__(self, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self._prepare = Prepare(preprocess)
        self._lock = threading.Lock()
        self.seconds = 0.0

    def decode(self, sample: Sample) -> Tensor:
        """The model's input of one image, ``[3, height, width]``.

        Raises:
            ClipfastError: it cannot be decoded; :meth:`Failure.of` says the status.
        """
        if sample.failure is not None:
            raise FailedSampleError(sample.failure)
        started = time.perf_counter()
        try:
            return with_memory(lambda: self._prepare(_opened(sample), sample.id), sample.id)
        finally:
            with self._lock:
                self.seconds += time.perf_counter() - started


def _opened(sample: Sample) -> Image.Image:
    content = sample.content
    if content is None:
        return open_image(sample.path)
    if isinstance(content, bytes):
        return decode_image(io.BytesIO(content), sample.id)
    try:
        return as_rgb(content)
    except (OSError, ValueError, SyntaxError) as error:  # decoders raise what they like on damage
        raise ImageError(f"{sample.id}: damaged or truncated ({error})") from None


def failure_of(error: ClipfastError) -> Failure:
    """What became of an image whose decoding raised this."""
    return Failure.of(error) if getattr(error, "status", None) else Failure(Status.DECODE_ERROR, str(error))
