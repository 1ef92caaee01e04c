"""Renders scenes: pixels and masks from a record.

Every shape is a signed distance function (negative inside). Mapping the distance across one pixel to
coverage anti-aliases the edges. All random numbers come from a generator seeded by the record.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from clipfast.scenes.backgrounds import paint_background
from clipfast.scenes.scene import SPLITS, Scene, SceneObject
from clipfast.scenes.vocabulary import IMAGE_SIZE

Field = NDArray[np.floating[Any]]
"""A float32 array over a window of pixels, [height, width]."""

LOBES: Final = 6
LOBE_HEIGHT: Final = 0.16
TOOTH_SHARPNESS: Final = 2.5
"""Squareness of a gear's teeth."""
PETAL_SOFTNESS: Final = 0.25
"""Roundness of the notches between a flower's petals. Both values set the similarity of the look-alikes."""

_OUTLINE: Final = 1.3
_OUTLINE_SHADE: Final = 0.30
_DARK_TONE: Final = 0.42
_GAIN: Final = {"bright": 1.18, "normal": 0.98, "dim": 0.66}
_TINT: Final = {"neutral": (1.0, 1.0, 1.0), "warm": (1.06, 1.0, 0.90), "cold": (0.92, 1.0, 1.07)}


def render(scene: Scene) -> NDArray[np.uint8]:
    """The image of a scene, uint8 RGB [64, 64, 3]; a record always gives the same bytes."""
    return render_with_masks(scene)[0]


def render_with_masks(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Image [64, 64, 3] uint8 and masks [n_objects, 64, 64] bool of every object's visible pixels.

    Later objects are drawn over earlier ones; a pixel of both belongs to the later one.
    """
    rng = np.random.default_rng([scene.seed, SPLITS.index(scene.split), scene.index, 1])
    canvas = paint_background(scene.background, rng)
    masks = np.zeros((len(scene.objects), IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    for number, item in enumerate(scene.objects):
        rows, columns, coverage = _paint_object(canvas, item)
        masks[:, rows, columns] &= ~coverage
        masks[number, rows, columns] = coverage
    _light(canvas, scene, rng)
    np.clip(canvas, 0.0, 1.0, out=canvas)
    return (canvas * np.float32(255.0) + np.float32(0.5)).astype(np.uint8), masks


def _paint_object(canvas: Field, item: SceneObject) -> tuple[slice, slice, NDArray[np.bool_]]:
    """Draw one object on the canvas in place; returns its window and its mask in that window."""
    reach = item.radius * 1.2 + 2.0
    rows = slice(max(0, math.floor(item.y - reach)), min(IMAGE_SIZE, math.ceil(item.y + reach) + 1))
    columns = slice(max(0, math.floor(item.x - reach)), min(IMAGE_SIZE, math.ceil(item.x + reach) + 1))
    down = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(item.y)
    right = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(item.x)
    scale_x, scale_y = item.radius * item.aspect, item.radius / item.aspect
    cos, sin = math.cos(item.rotation), math.sin(item.rotation)
    u = (cos * right + sin * down) / np.float32(scale_x)
    v = (cos * down - sin * right) / np.float32(scale_y)
    distance = shape_distance(item.shape, u, v)
    if item.hub:
        distance = np.maximum(distance, np.float32(item.hub) - np.hypot(u, v))
    distance = distance * np.float32(item.radius)
    coverage = np.clip(np.float32(0.5) - distance, 0.0, 1.0)
    body = np.clip(np.float32(0.5) - (distance + np.float32(_OUTLINE)), 0.0, 1.0)
    tone = _tone(item, right, down)
    shading = np.float32(1.0) - np.float32(0.10) * np.clip(u + v, -1.2, 1.2)
    strength = (body * tone + (1.0 - body) * np.float32(_OUTLINE_SHADE)) * shading
    base = np.array(colorsys.hsv_to_rgb(item.hue, item.saturation, item.value), dtype=np.float32)
    window = canvas[rows, columns]
    window += coverage[..., None] * (strength[..., None] * base - window)
    return rows, columns, coverage > 0.5


def shape_distance(shape: str, u: Field, v: Field) -> Field:
    """Signed distance to a shape of about unit radius, at coordinates u (right) and v (down)."""
    return _DISTANCES[shape](u, v)


def _circle(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - np.float32(0.94)


def _square(u: Field, v: Field) -> Field:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.80)


def _triangle(u: Field, v: Field) -> Field:
    v = v - np.float32(0.12)
    slant = np.float32(math.sqrt(3) / 2) * np.abs(u) - np.float32(0.5) * v
    return np.maximum(v, slant) - np.float32(0.56)


def _star(u: Field, v: Field) -> Field:
    outer, inner = 1.08, 0.46
    step = math.pi / 5
    radius = np.hypot(u, v)
    # fold the plane onto half an arm, where the edge is a straight line
    angle = np.abs((np.arctan2(u, -v) + np.float32(step)) % np.float32(2 * step) - np.float32(step))
    ax, ay = outer, 0.0
    bx, by = inner * math.cos(step), inner * math.sin(step)
    length = math.hypot(bx - ax, by - ay)
    nx, ny = (by - ay) / length, (ax - bx) / length
    distance: Field = radius * (np.cos(angle) * np.float32(nx) + np.sin(angle) * np.float32(ny)) - np.float32(ax * nx)
    return distance


def _cross(u: Field, v: Field) -> Field:
    a, b = np.abs(u), np.abs(v)
    long, wide = np.maximum(a, b), np.minimum(a, b)
    return np.maximum(long - np.float32(0.98), wide - np.float32(0.34))


def _heart(u: Field, v: Field) -> Field:
    x = np.abs(u) * np.float32(0.62)
    y = np.float32(0.55) - v * np.float32(0.62)
    lobe = np.hypot(x - np.float32(0.25), y - np.float32(0.75)) - np.float32(math.sqrt(2) / 4)
    along = np.maximum(x + y, 0.0) * np.float32(0.5)
    notch = x * x + (y - np.float32(1.0)) ** 2
    side = (x - along) ** 2 + (y - along) ** 2
    flank = np.sqrt(np.minimum(notch, side)) * np.sign(x - y)
    return np.where(x + y > 1.0, lobe, flank) / np.float32(0.62)


def _crescent(u: Field, v: Field) -> Field:
    bite = np.float32(0.80) - np.hypot(u - np.float32(0.42), v + np.float32(0.10))
    distance: Field = np.maximum(np.hypot(u, v) - np.float32(1.0), bite)
    return distance


def _ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - np.float32(0.73)) - np.float32(0.26)


def _flower(u: Field, v: Field) -> Field:
    angle = np.arctan2(u, -v) * np.float32(LOBES / 2)
    cos = np.cos(angle)
    petal = np.sqrt(cos * cos + np.float32(PETAL_SOFTNESS**2))
    low, high = PETAL_SOFTNESS, math.hypot(1.0, PETAL_SOFTNESS)
    wave = (petal - np.float32(low)) * np.float32(2 / (high - low)) - 1
    slope = np.float32(1 / (high - low)) * np.sin(angle) * cos / petal
    return _lobed(u, v, wave, slope, 0.86)


def _gear(u: Field, v: Field) -> Field:
    angle = np.arctan2(u, -v) * np.float32(LOBES)
    full = math.tanh(TOOTH_SHARPNESS)
    squashed = np.tanh(np.float32(TOOTH_SHARPNESS) * np.cos(angle))
    slope = np.float32(TOOTH_SHARPNESS / full) * np.sin(angle) * (1 - squashed * squashed)
    return _lobed(u, v, squashed / np.float32(full), slope, 0.89)


def _lobed(u: Field, v: Field, wave: Field, slope: Field, size: float) -> Field:
    """A disc whose rim follows `wave` (-1 to 1); `slope` is minus its derivative by LOBES x angle."""
    radius = np.hypot(u, v)
    rim = np.float32(size) * (1 + np.float32(LOBE_HEIGHT) * wave)
    # dividing by the gradient's length keeps the soft edge one pixel wide on steep flanks; in the
    # middle it would draw seams, so there the distance is that of the inner rim
    steep = np.float32(size * LOBE_HEIGHT * LOBES) * slope / np.maximum(radius, np.float32(0.3))
    near = (radius - rim) / np.sqrt(1 + steep * steep)
    distance: Field = np.minimum(near, radius - np.float32(size * (1 - LOBE_HEIGHT)))
    return distance


_DISTANCES: Final[dict[str, Callable[[Field, Field], Field]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "crescent": _crescent,
    "ring": _ring,
    "flower": _flower,
    "gear": _gear,
}


def _tone(item: SceneObject, right: Field, down: Field) -> Field:
    """Brightness over the object's window: 1 for the light tone, _DARK_TONE for the dark one."""
    if item.texture == "plain":
        return np.ones(np.broadcast_shapes(right.shape, down.shape), dtype=np.float32)
    turn = np.float32(2 * math.pi / item.texture_period)
    cos, sin = math.cos(item.texture_angle), math.sin(item.texture_angle)
    a = (cos * right + sin * down) * turn + np.float32(2 * math.pi * item.texture_phase[0])
    b = (cos * down - sin * right) * turn + np.float32(2 * math.pi * item.texture_phase[1])
    if item.texture == "striped":
        wave = np.sin(b)
    elif item.texture == "checkered":
        # a lower frequency: squares of one period look like a chessboard, smaller ones like dots
        wave = np.sin(a * np.float32(0.6)) * np.sin(b * np.float32(0.6)) * 2
    else:
        wave = np.float32(0.75) - (np.cos(a) + np.cos(b))
    light = np.clip(wave * np.float32(2.5) + np.float32(0.5), 0.0, 1.0)
    tone: Field = np.float32(_DARK_TONE) + np.float32(1 - _DARK_TONE) * light
    return tone


def _light(canvas: Field, scene: Scene, rng: np.random.Generator) -> None:
    """Apply brightness, tint, a slow gradient across the image and noise; in place."""
    angle = rng.uniform(0, 2 * math.pi)
    ramp = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    across, along = np.float32(0.10 * math.cos(angle)), np.float32(0.10 * math.sin(angle))
    slope = across * ramp[None, :] + along * ramp[:, None]
    gain = np.array(_TINT[scene.tint], dtype=np.float32) * np.float32(_GAIN[scene.lighting])
    canvas *= (1 + slope)[..., None] * gain
    canvas += (rng.random((IMAGE_SIZE, IMAGE_SIZE, 1), dtype=np.float32) - np.float32(0.5)) * np.float32(0.03)
