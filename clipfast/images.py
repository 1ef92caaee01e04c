"""Opening image files: whatever a camera, a scanner or the web hands over becomes RGB, or one clear error."""

from os import PathLike, fspath
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from clipfast.errors import ImageError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
"""File name endings taken as images when a folder is given."""


def open_image(path: str | PathLike[str]) -> Image.Image:
    """Reads and decodes an image file as 8-bit RGB, upright.

    Greyscale, palette, CMYK and 16-bit images are converted (16-bit by its full range, not cut at 255), transparency
    is laid on white, and the EXIF orientation is applied.

    Raises:
        ImageError: no such file, not an image, truncated or damaged; the message names the file.
    """
    name = fspath(path)
    try:
        with open(name, "rb") as file:
            return decode_image(file, name)
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: a folder, not an image") from None
    except PermissionError:
        raise ImageError(f"{name}: no permission to read") from None
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror or error}") from None


def decode_image(file: IO[bytes], name: str) -> Image.Image:
    """:func:`open_image` of a file that is open, or of bytes in memory; ``name`` is for messages.

    Raises:
        ImageError: not an image, truncated or damaged.
    """
    try:
        with Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # else it is copied where there is nothing to turn
            return as_rgb(image)
    except UnidentifiedImageError:
        file.seek(0)
        raise ImageError(f"{name}: {_what_instead(file.read(512))}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: too large to decode safely ({error})") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what decoders raise on damage
        raise ImageError(f"{name}: damaged or truncated ({error})") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image as 8-bit RGB."""
    if image.mode.startswith("I"):  # 16 bits, whatever the integers are kept in
        pixels = np.asarray(image).astype(np.float64)
        return _grey(pixels * (255 / 65535))
    if image.mode == "F":
        return _grey(np.asarray(image, dtype=np.float64))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def _what_instead(head: bytes) -> str:
    """Why a file is no image, from its first bytes."""
    if not head:
        return "an empty file"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page, not an image (a failed download?)"
    return "not an image that can be read"
