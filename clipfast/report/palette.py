"""Colours: a diverging palette centred at zero, over a grey picture.

Blue lowers a score, orange raises it; the two hues differ for every common kind of colour blindness. The opacity of the
colour grows with the value, so at zero the picture shows unchanged.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Values = NDArray[np.floating]

INK = (32, 36, 44)
FAINT = (110, 116, 128)
PAPER = (255, 255, 255)
LINE = (214, 218, 224)
ACCENT = (176, 74, 10)

_STOPS = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
_COLOURS = np.array([(8, 48, 130), (40, 118, 205), (200, 200, 200), (240, 140, 30), (170, 50, 0)], dtype=np.float64)
_COVER = 0.92


def diverging(values: Values) -> NDArray[np.float64]:
    """Colours of values in [-1, 1] (clipped), ``[...] → [..., 3]`` in 0 … 255."""
    clipped = np.clip(values, -1, 1)
    return np.stack([np.interp(clipped, _STOPS, _COLOURS[:, channel]) for channel in range(3)], axis=-1)


def greyed(picture: Image.Image) -> NDArray[np.float64]:
    """A picture in grey with reduced contrast, ``[height, width]`` in 0 … 255: the background of a heat map."""
    return 60 + np.asarray(picture.convert("L"), dtype=np.float64) * (170 / 255)


def overlay(ground: NDArray[np.float64], values: Values) -> Pixels:
    """Draws a heat map over a grey picture.

    Args:
        ground: ``[height, width]`` of :func:`greyed`.
        values: ``[height, width]`` in [-1, 1].

    Returns:
        ``[height, width, 3]``.
    """
    cover = (_COVER * np.clip(np.abs(values), 0, 1) ** 0.8)[..., None]
    mixed = ground[..., None] * (1 - cover) + diverging(values) * cover
    return np.clip(mixed + 0.5, 0, 255).astype(np.uint8)


def enlarged(values: Values, size: tuple[int, int]) -> NDArray[np.float32]:
    """A map ``[rows, columns]`` upsampled bicubically to ``[height, width]``, ``size`` being (width, height)."""
    raw = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(raw.resize(size, Image.Resampling.BICUBIC))


def limit(values: Values) -> float:
    """The value at which the palette saturates: the 99.5 % quantile of the magnitudes."""
    finite = np.abs(values[np.isfinite(values)])
    top = float(np.quantile(finite, 0.995)) if finite.size else 0.0
    return top if top > 0 else 1.0
