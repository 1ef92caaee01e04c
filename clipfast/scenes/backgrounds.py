"""The six random backgrounds: sea, forest, desert, night, snow and city.

Every painter takes a random generator and returns float32 RGB in [0, 1], [64, 64, 3], before lighting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from clipfast.scenes.vocabulary import IMAGE_SIZE

Picture = NDArray[np.float32]

_X: Final = np.arange(IMAGE_SIZE, dtype=np.float32)
_DOWN: Final = np.arange(IMAGE_SIZE, dtype=np.float32)[:, None]


def paint_background(name: str, rng: np.random.Generator) -> Picture:
    """Paint one of the six backgrounds; the result depends only on the generator's state."""
    return _PAINTERS[name](rng)


def _rgb(red: float, green: float, blue: float) -> Picture:
    return np.array((red, green, blue), dtype=np.float32)


def _vary(rng: np.random.Generator, colour: Picture, amount: float = 0.05) -> Picture:
    return colour + (rng.random(3, dtype=np.float32) - np.float32(0.5)) * np.float32(2 * amount)


def _gradient(top: Picture, bottom: Picture) -> Picture:
    share = (_DOWN / np.float32(IMAGE_SIZE - 1))[:, :, None]
    return np.broadcast_to(top + (bottom - top) * share, (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()


def _blend(picture: Picture, cover: Picture, colour: Picture) -> None:
    """Blend `colour` (RGB or a picture) into the picture by opacity `cover` [64, 64]; in place."""
    picture += cover[..., None] * (colour - picture)


def _hills(rng: np.random.Generator, height: float, swing: float) -> Picture:
    """Height of a rolling skyline per column, as a row index: [64]."""
    phase = rng.random(3, dtype=np.float32) * np.float32(2 * np.pi)
    length = np.float32(2 * np.pi) / rng.uniform(np.float32(22), np.float32(60), 2).astype(np.float32)
    curve = np.sin(_X * length[0] + phase[0]) + np.float32(0.5) * np.sin(_X * length[1] + phase[1])
    skyline: Picture = np.float32(height) + np.float32(swing) * curve
    return skyline


def _below(skyline: Picture) -> Picture:
    """Soft mask [64, 64] of the pixels under a skyline [64]."""
    cover: Picture = np.clip(_DOWN - skyline + np.float32(0.5), 0.0, 1.0)
    return cover


def _disc(x: float, y: float, radius: float, softness: float = 1.0) -> Picture:
    distance = np.hypot(_X - np.float32(x), _DOWN - np.float32(y))
    inside = (np.float32(radius) - distance) / np.float32(softness)
    cover: Picture = np.clip(inside + np.float32(0.5), 0.0, 1.0)
    return cover


def _patches(rng: np.random.Generator, cells: int) -> Picture:
    """Noise in [-0.5, 0.5], [64, 64], constant on `cells` × `cells` blocks."""
    coarse = rng.random((cells, cells), dtype=np.float32) - np.float32(0.5)
    step = IMAGE_SIZE // cells
    return coarse.repeat(step, axis=0).repeat(step, axis=1)


def _sea(rng: np.random.Generator) -> Picture:
    horizon = rng.uniform(14, 26)
    picture = _gradient(_vary(rng, _rgb(0.50, 0.74, 0.93)), _vary(rng, _rgb(0.95, 0.97, 0.99), 0.03))
    water = _gradient(_vary(rng, _rgb(0.05, 0.36, 0.56)), _vary(rng, _rgb(0.10, 0.58, 0.68)))
    depth = np.maximum(_DOWN - np.float32(horizon), 0.0) + np.float32(3.0)
    phase = rng.random(2, dtype=np.float32) * np.float32(6.28)
    # waves grow towards the viewer: the phase advances with the logarithm of the depth
    bend = np.float32(1.6) * np.sin(_X * np.float32(0.22) + phase[0])
    swell = np.sin(np.float32(rng.uniform(9, 13)) * np.log(depth) + bend)
    ripple = np.sin(_X * np.float32(0.45) + _DOWN * np.float32(0.9) + phase[1])
    water += (np.float32(0.07) * np.maximum(swell, 0) + np.float32(0.02) * ripple)[..., None]
    _blend(picture, _below(np.full(IMAGE_SIZE, horizon, dtype=np.float32)), water)
    return picture


def _forest(rng: np.random.Generator) -> Picture:
    picture = _gradient(_vary(rng, _rgb(0.16, 0.40, 0.17), 0.04), _vary(rng, _rgb(0.30, 0.52, 0.22), 0.04))
    picture += (_patches(rng, 16) * np.float32(0.10) + _patches(rng, 32) * np.float32(0.06))[..., None]
    ground = _hills(rng, rng.uniform(48, 54), 1.5)
    for _ in range(int(rng.integers(5, 9))):
        centre, half = rng.uniform(-2, 66), rng.uniform(1.2, 3.2)
        bark = _vary(rng, _rgb(0.33, 0.21, 0.11), 0.03)
        across = np.clip(np.float32(half) - np.abs(_X - np.float32(centre)) + np.float32(0.5), 0.0, 1.0)
        left, right = max(0, int(centre - half - 1)), min(IMAGE_SIZE, int(centre + half + 2))
        if left < right:
            window = picture[:, left:right]
            window += across[None, left:right, None] * (bark - window)
    soil = _gradient(_rgb(0.20, 0.34, 0.10), _rgb(0.34, 0.26, 0.13))
    soil += (_patches(rng, 32) * np.float32(0.08))[..., None]
    _blend(picture, _below(ground), soil)
    crown = _hills(rng, rng.uniform(8, 14), 2.0)
    crown += rng.uniform(-2, 2, IMAGE_SIZE // 4).astype(np.float32).repeat(4)
    leaves = _vary(rng, _rgb(0.09, 0.30, 0.10), 0.03) + (_patches(rng, 16) * np.float32(0.14))[..., None]
    _blend(picture, 1 - _below(crown), leaves)
    return picture


def _desert(rng: np.random.Generator) -> Picture:
    picture = _gradient(_vary(rng, _rgb(0.55, 0.76, 0.88), 0.04), _vary(rng, _rgb(1.0, 0.88, 0.68), 0.03))
    _blend(picture, _disc(rng.uniform(6, 58), rng.uniform(5, 12), rng.uniform(2.5, 4)), _rgb(1.0, 0.97, 0.82))
    level = rng.uniform(22, 30)
    for shade in (0.98, 0.90, 0.82):
        skyline = _hills(rng, level, rng.uniform(2, 4))
        sand = _vary(rng, _rgb(0.93, 0.77, 0.50), 0.025) * np.float32(shade)
        ripple = np.sin((_DOWN - skyline) * np.float32(0.9)) * np.float32(0.02)
        _blend(picture, _below(skyline), sand + ripple[..., None])
        level += rng.uniform(10, 14)
    return picture


def _night(rng: np.random.Generator) -> Picture:
    picture = _gradient(_vary(rng, _rgb(0.03, 0.03, 0.12), 0.015), _vary(rng, _rgb(0.13, 0.12, 0.32), 0.03))
    count = int(rng.integers(18, 34))
    rows, columns = rng.integers(0, 56, count), rng.integers(0, IMAGE_SIZE, count)
    picture[rows, columns] = rng.uniform(0.5, 1.0, (count, 1)).astype(np.float32)
    x, y, radius = rng.uniform(5, 59), rng.uniform(5, 11), rng.uniform(3, 4.5)
    _blend(picture, np.float32(0.25) * _disc(x, y, radius + 2, 6.0), _rgb(0.8, 0.8, 0.7))
    _blend(picture, _disc(x, y, radius), _rgb(0.96, 0.95, 0.82))
    _blend(picture, _below(_hills(rng, rng.uniform(50, 57), 2.5)), _vary(rng, _rgb(0.03, 0.04, 0.08), 0.015))
    return picture


def _snow(rng: np.random.Generator) -> Picture:
    picture = _gradient(_vary(rng, _rgb(0.66, 0.74, 0.84), 0.03), _vary(rng, _rgb(0.86, 0.90, 0.95), 0.02))
    level = rng.uniform(24, 34)
    for shade in (0.90, 0.95, 0.99):
        skyline = _hills(rng, level, rng.uniform(1.5, 3.5))
        depth = np.clip((_DOWN - skyline) / np.float32(14), 0.0, 1.0)
        white = _rgb(0.97, 0.985, 1.0) * np.float32(shade) - depth[..., None] * _rgb(0.10, 0.07, 0.03)
        _blend(picture, _below(skyline), white)
        level += rng.uniform(9, 13)
    count = int(rng.integers(30, 60))
    rows, columns = rng.integers(0, IMAGE_SIZE, count), rng.integers(0, IMAGE_SIZE - 1, count)
    picture[rows, columns] = np.float32(1.0)
    picture[rows[::2], columns[::2] + 1] = np.float32(1.0)
    return picture


def _city(rng: np.random.Generator) -> Picture:
    picture = _gradient(_vary(rng, _rgb(0.62, 0.64, 0.72)), _vary(rng, _rgb(0.86, 0.76, 0.70)))
    x = -int(rng.integers(0, 6))
    while x < IMAGE_SIZE:
        width, top = int(rng.integers(9, 16)), int(rng.integers(4, 30))
        wall = _vary(rng, _rgb(0.40, 0.40, 0.45), 0.08)
        left, right = max(x, 0), min(x + width - 1, IMAGE_SIZE)
        picture[top:, left:right] = wall
        grid = picture[top + 2 :, left + 1 : right - 1]
        lit = rng.random((len(range(0, grid.shape[0], 5)), len(range(0, grid.shape[1], 4)))) < 0.55
        glow = np.where(lit[..., None], _rgb(0.98, 0.88, 0.52), wall * np.float32(0.6))
        for dy in (0, 1, 2):
            for dx in (0, 1):
                part = grid[dy::5, dx::4]
                part[:] = glow[: part.shape[0], : part.shape[1]]
        x += width
    picture[58:] = _vary(rng, _rgb(0.26, 0.26, 0.28), 0.02)
    picture[61, int(rng.integers(0, 4)) :: 8] = np.float32(0.85)
    return picture


_PAINTERS: Final[dict[str, Callable[[np.random.Generator], Picture]]] = {
    "sea": _sea,
    "forest": _forest,
    "desert": _desert,
    "night": _night,
    "snow": _snow,
    "city": _city,
}
