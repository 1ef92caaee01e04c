"""Opening image files: files from cameras, scanners and the web become RGB, or raise one clear error.

Every image that clipfast reads is opened here. Only regular files are opened, and only the formats in :data:`FORMATS`
are decoded. Pillow knows others, and runs another program (Ghostscript) for PostScript, even in a file named ``.jpg``.

Memory is bounded in three ways. Pillow refuses images above twice ``PIL.Image.MAX_IMAGE_PIXELS``. All threads share one
budget for decoded images (:func:`decoding`). Conversions work on strips of an image, so that they allocate nothing
larger than the RGB image itself.
"""

import ctypes
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache
from io import BytesIO
from os import PathLike, fspath
from typing import IO, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import (  # the plugins register their formats when they are imported
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    ImageOps,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TgaImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from clipfast.errors import ImageError, is_out_of_memory
from clipfast.inputs import open_regular, printable

Value = TypeVar("Value")
Size: TypeAlias = tuple[int, int]
Draft: TypeAlias = Callable[[Size], Size]
"""Width and height of an upright image → the least width and height that its user needs."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""The formats that are decoded, by Pillow's names; the content decides, not the file's name. See also :data:`_TGA`."""
_NAMES = "jpg jpeg jpe jfif png apng webp gif bmp tif tiff avif jp2 ppm pgm pbm pnm tga"
SUFFIXES = frozenset(f".{name}" for name in _NAMES.split())
"""File name endings taken as images when a folder is given."""

_TGA = ".tga"
"""TGA is decoded too, but only in files with this ending: it has no signature, so other data can look like it."""
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_STRIP_PIXELS = 1 << 20
_BUDGET = 640 << 20  # 13 photographs of 12 megapixels, which take 4 bytes a pixel
_LARGE = 128 << 20
"""Images of so many bytes leave no free memory behind."""
_UNIT_RANGE, _BYTE_RANGE = 1.0, 255.0
_OVERSHOOT = 0.5
"""How far floating-point pixels may leave their range, in ranges: resampling overshoots at edges."""
_PIXEL_BYTES = {"1": 1, "L": 1, "P": 1, "LA": 4, "I;16": 2, "I;16B": 2, "I;16L": 2}
_CODEC_BYTES = {"WEBP": 4, "AVIF": 8, "JPEG2000": 16}
"""Bytes per pixel that a decoder needs beside the image that Pillow keeps, where it decodes a whole image at once."""


class _OutOfMemoryError(ImageError):
    """Memory ran out while an image was read."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "out_of_memory")


# ------------------------------------------------------------------------------------------------------------ opening


def open_image(path: str | PathLike[str], draft: Draft | None = None) -> Image.Image:
    """Reads and decodes an image file as 8-bit RGB, upright.

    Greyscale, palette and CMYK images are converted, 16-bit ones by their full range. Floating-point pixels are taken
    as 0 … 1 or 0 … 255, see :func:`as_rgb`. Transparency is laid on white, and the EXIF orientation is applied.

    Args:
        path: the file.
        draft: gives the least size that is needed. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, the smallest
            that is not below it; its pixels are not those of the whole image resized.

    Raises:
        ImageError: no such file, not a regular file, not an image, truncated, damaged or too large; the message names
            the file.
    """
    return _open(path, as_rgb, draft)


def open_pixels(path: str | PathLike[str]) -> Image.Image:
    """Reads and decodes an image file in its own mode, upright: for masks, whose pixels are numbers.

    Raises:
        ImageError: as :func:`open_image`.
    """
    return _open(path, _unchanged)


def decode_image(file: IO[bytes], name: str, draft: Draft | None = None) -> Image.Image:
    """:func:`open_image` of a file that is open, or of bytes in memory; ``name`` is for messages.

    Raises:
        ImageError: not an image, truncated, damaged or too large.
    """
    return _decode(file, name, as_rgb, draft)


def decode_pixels(file: IO[bytes], name: str) -> Image.Image:
    """:func:`open_pixels` of a file that is open, or of bytes in memory; ``name`` is for messages.

    Raises:
        ImageError: not an image, truncated, damaged or too large.
    """
    return _decode(file, name, _unchanged)


def _unchanged(image: Image.Image) -> Image.Image:
    return image


def _open(
    path: str | PathLike[str], convert: Callable[[Image.Image], Image.Image], draft: Draft | None = None
) -> Image.Image:
    name = fspath(path)
    status = "unreadable"
    try:
        with open_regular(name) as file:
            return _decode(file, name, convert, draft)
    except FileNotFoundError:
        reason, status = "no such file", "missing"
    except IsADirectoryError:
        reason = "a folder, not an image"
    except PermissionError:
        reason = "no permission to read"
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError:  # a name with a zero byte
        reason = "not a file name"
    raise ImageError(f"{printable(name)}: {reason}", status)


def _decode(
    file: IO[bytes], name: str, convert: Callable[[Image.Image], Image.Image], draft: Draft | None = None
) -> Image.Image:
    shown = printable(name)
    try:
        with decoding(), Image.open(file, formats=_formats(name)) as image:
            if draft is not None:
                _reduce(image, draft)
            _MEMORY.take(_decoded_bytes(image))
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # else it is copied where there is nothing to turn
            return convert(image)
    except ImageError as error:
        raise ImageError(f"{shown}: {error}", error.status) from None
    except UnidentifiedImageError:
        file.seek(0)
        raise ImageError(f"{shown}: {_what_instead(file.read(512))}", "no_image") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{shown}: too large to decode safely ({error})", "too_large") from None
    except Exception as error:  # decoders raise what they like on damage
        if is_out_of_memory(error):
            raise _OutOfMemoryError(f"{shown}: not enough memory to decode it") from None
        raise ImageError(f"{shown}: damaged or truncated ({error})") from None


def _reduce(image: Image.Image, draft: Draft) -> None:
    """Has a JPEG decoded at part of its size."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return
    lies = is_turned(image)
    width, height = draft(image.size[::-1] if lies else image.size)
    image.draft(None, (height, width) if lies else (width, height))


def is_turned(image: Image.Image) -> bool:
    """Whether an image's EXIF orientation exchanges width and height."""
    return image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)


def plain_jpeg_size(content: bytes) -> Size | None:
    """Width and height of a JPEG like most: whole, in RGB or grey, upright; None for every other image. Reads headers.

    Args:
        content: the file.
    """
    if not (content.startswith(_JPEG_START) and content.endswith(_JPEG_END)):
        return None
    try:
        with Image.open(BytesIO(content), formats=["JPEG"]) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L")
            return image.size if plain and image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else None
    except Exception:  # decoders raise what they like on damage
        return None


def _formats(name: str) -> list[str]:
    """The formats to try for a file: those of :data:`FORMATS` that this build of Pillow has."""
    return _formats_and_tga() if name.lower().endswith(_TGA) else _listed_formats()


@cache
def _listed_formats() -> list[str]:
    return [name for name in FORMATS if name in Image.OPEN]


@cache
def _formats_and_tga() -> list[str]:
    return [*_listed_formats(), "TGA"]


def _what_instead(head: bytes) -> str:
    """Why a file is no image, from its first bytes."""
    if not head:
        return "an empty file"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not an image (a failed download?)"
    if head.startswith((b"%!PS", b"%PDF", b"\xc5\xd0\xd3\xc6")):
        return "PostScript or PDF, not an image: convert it to PNG"
    return "not an image that can be read"


# --------------------------------------------------------------------------------------------------------- converting


def as_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB.

    Integers of more than 8 bits are scaled by the range of 16 bits. Floating-point pixels are taken as 0 … 1 where the
    largest is below 1.5, else as 0 … 255, and cut off at the ends.

    Raises:
        ImageError: floating-point pixels that are not finite or leave both ranges by more than half.
    """
    if image.mode.startswith("I"):
        return _in_strips(image, _sixteen_bits)
    if image.mode == "F":
        scale = _float_scale(image)
        return _in_strips(image, lambda strip: _grey(np.asarray(strip, dtype=np.float64) * scale))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        return _in_strips(image, _on_white)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Converts an image strip by strip, so that ``convert`` allocates no more than a strip needs."""
    if image.width * image.height <= _STRIP_PIXELS:
        return convert(image)
    result = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        result.paste(convert(strip), (0, top))
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image as copies of its rows, of about :data:`_STRIP_PIXELS` each, with the number of their first row."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _sixteen_bits(image: Image.Image) -> Image.Image:
    return _grey(np.asarray(image).astype(np.float64) * (255 / 65535))


def _on_white(image: Image.Image) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _float_scale(image: Image.Image) -> float:
    """What floating-point pixels are multiplied with to become 0 … 255."""
    low, high = _extrema(image)
    for full in (_UNIT_RANGE, _BYTE_RANGE):
        if high <= full * (1 + _OVERSHOOT):
            if low >= -full * _OVERSHOOT:
                return 255 / full
            break
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ImageError("some floating-point pixels are not finite numbers: save it with 8 or 16 bits")
    raise ImageError(
        f"floating-point pixels from {low:g} to {high:g}: expected 0 to 1 or 0 to 255, save it with 8 or 16 bits"
    )


def _extrema(image: Image.Image) -> tuple[float, float]:
    """The smallest and largest pixel of a floating-point image; NaN where one is."""
    ends = [(pixels.min(), pixels.max()) for pixels in (np.asarray(strip) for _, strip in _strips(image))]
    return float(np.min(ends)), float(np.max(ends))


# ------------------------------------------------------------------------------------------------------------- memory


class MemoryBudget:
    """Bytes that the images of all threads share. Threads are served in the order in which they ask.

    A thread that has taken some does not wait for more, so that no two threads wait for each other. An amount above
    the total counts as the total: the largest images are decoded alone, not refused.
    """

    def __init__(self, total: int) -> None:
        self.total = self._free = total
        # Taken by itself: what a signal handler raises at the end of Condition.__enter__ would leave it taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[object] = deque()
        self._thread = threading.local()

    def scope(self, *, alone: bool = False) -> AbstractContextManager[None]:
        """Returns what is taken inside at the end of the outermost scope of this thread.

        Args:
            alone: takes everything before it starts.
        """
        return _Scope(self, alone)

    def take(self, amount: int) -> None:
        """Waits for ``amount`` bytes, inside a :meth:`scope`."""
        amount = min(amount, self.total)
        with self._lock:
            if not self._thread.taken and (self._waiting or self._free < amount):
                ticket = object()
                self._waiting.append(ticket)
                try:
                    self._changed.wait_for(lambda: self._waiting[0] is ticket and self._free >= amount)
                finally:
                    self._waiting.remove(ticket)
                    self._changed.notify_all()
            self._thread.taken += amount
            self._free -= amount

    def enter(self) -> None:
        """Begins a scope of this thread."""
        self._thread.depth = getattr(self._thread, "depth", 0) + 1
        if self._thread.depth == 1:
            self._thread.taken = 0

    def leave(self) -> None:
        """Ends a scope of this thread, and returns what it took if it was the outermost."""
        self._thread.depth -= 1
        if self._thread.depth == 0 and self._thread.taken:
            if self._thread.taken >= _LARGE:
                _return_free_memory()
            with self._lock:
                self._free += self._thread.taken
                self._thread.taken = 0
                if self._waiting:
                    self._changed.notify_all()


def _return_free_memory() -> None:
    """Returns free memory to the system: glibc keeps what a thread freed for that thread, up to a whole image each."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], object] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class _Scope(AbstractContextManager[None]):
    def __init__(self, budget: MemoryBudget, alone: bool) -> None:
        self._budget, self._alone = budget, alone

    def __enter__(self) -> None:
        self._budget.enter()
        if self._alone:
            try:
                self._budget.take(self._budget.total)
            except BaseException:  # an interrupt while it waits
                self._budget.leave()
                raise

    def __exit__(self, *_: object) -> None:
        self._budget.leave()


_MEMORY = MemoryBudget(_BUDGET)


def decoding() -> AbstractContextManager[None]:
    """A block in which images are opened and used: the budget counts them as in memory until its end."""
    return _MEMORY.scope()


def with_memory(read: Callable[[], Value], name: str) -> Value:
    """Calls ``read``, which opens one image; where memory runs out, once more while no other thread decodes.

    Args:
        read: opens and uses one image.
        name: the image's name, for the message.

    Raises:
        ImageError: there is not enough memory for this image alone.
    """
    try:
        with _MEMORY.scope():
            return read()
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
    try:  # outside the except block: its traceback keeps the allocated memory alive
        with _MEMORY.scope(alone=True):
            return read()
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
    raise ImageError(f"{printable(name)}: not enough memory to read it", "out_of_memory")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, _OutOfMemoryError) or is_out_of_memory(error)


def _decoded_bytes(image: Image.Image) -> int:
    """Approximate number of bytes that decoding and converting an image takes, from its header."""
    per_pixel = _PIXEL_BYTES.get(image.mode, 4) + (image.mode != "RGB") * 4 + _CODEC_BYTES.get(image.format or "", 0)
    return image.width * image.height * per_pixel
