"""Images as data URIs: small, and each as it looks to the model."""

import base64
from io import BytesIO

import numpy as np
from PIL import Image

from clipfast.report.palette import Values, enlarged, greyed, limit, overlay

_QUALITY = 72
_ACCENT = (214, 106, 26)


def data_uri(picture: Image.Image, kind: str = "webp") -> str:
    """A picture as ``data:image/…``: WebP for photographs, ``png`` where every pixel counts."""
    into = BytesIO()
    if kind == "webp":
        picture.save(into, format="webp", quality=_QUALITY, method=4)
    else:
        picture.save(into, format="png", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(into.getvalue()).decode('ascii')}"


def fitted(picture: Image.Image, side: int, enlarge: bool = False) -> Image.Image:
    """A picture with its longer side ``side`` pixels; not more than it has unless it may be enlarged."""
    scale = side / max(picture.size)
    if scale >= 1 and not enlarge:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def heat(picture: Image.Image, values: Values, top: float | None = None) -> tuple[str, float]:
    """A map over a picture as a data URI, and the value at which its palette ends.

    Args:
        picture: of the size wanted.
        values: ``[rows, columns]``.
        top: where the palette ends; chosen for these values if not given.
    """
    reach = limit(values) if top is None else top
    shown = overlay(greyed(picture), enlarged(values / reach, picture.size))
    return data_uri(Image.fromarray(shown)), reach


def matrix(values: Values) -> str:
    """Values ``[rows, columns]`` from 0 to 1 as a data URI: a pixel each, the more opaque the larger.

    On a light page or a dark one zero looks like the page itself.
    """
    pixels = np.empty((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = _ACCENT
    pixels[..., 3] = np.clip(np.abs(values) * 255 + 0.5, 0, 255)
    return data_uri(Image.fromarray(pixels), "png")
