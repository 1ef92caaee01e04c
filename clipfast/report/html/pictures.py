"""Images as data URIs: small, and as the model sees them."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image

from clipfast.report.palette import Values, enlarged, greyed, limit, overlay

_QUALITY = 72
_ACCENT = (214, 106, 26)


def data_uri(picture: Image.Image, kind: str = "webp") -> str:
    """A picture as ``data:image/…``: WebP for photographs, PNG where every pixel matters."""
    into = BytesIO()
    if kind == "webp":
        picture.save(into, format="webp", quality=_QUALITY, method=4)
    else:
        picture.save(into, format="png", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(into.getvalue()).decode('ascii')}"


def fitted(picture: Image.Image, side: int, enlarge: bool = False) -> Image.Image:
    """A picture resized so that its longer side has ``side`` pixels; a smaller one is enlarged only if allowed."""
    scale = side / max(picture.size)
    if scale >= 1 and not enlarge:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def heat(picture: Image.Image, values: Values, top: float | None = None) -> tuple[str, float]:
    """A map over a picture as a data URI, and the value at which its palette ends.

    Args:
        picture: of the size of the result.
        values: ``[rows, columns]``.
        top: the value at which the palette ends; chosen from the values by default.
    """
    reach = limit(values) if top is None else top
    shown = overlay(greyed(picture), enlarged(values / reach, picture.size))
    return data_uri(Image.fromarray(shown)), reach


def matrix(values: Values) -> str:
    """Values ``[rows, columns]`` from 0 to 1 as a data URI: one pixel per value, with the value as opacity.

    Zero is transparent, on a light page and on a dark one.
    """
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _ACCENT
    pixels[..., 3] = np.clip(np.abs(values) * 255 + 0.5, 0, 255)
    return data_uri(Image.fromarray(pixels), "png")
