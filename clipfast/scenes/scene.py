"""The record of a scene, and the random sampling of scenes.

A record determines the image: `clipfast.scenes.drawing.render` always gives the same pixels for it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from clipfast.scenes.vocabulary import (
    BACKGROUNDS,
    BIAS,
    COLOURS,
    COUNTS,
    HABITAT,
    IMAGE_SIZE,
    LIGHTINGS,
    LOOKALIKES,
    PLAIN_SHAPES,
    SHAPES,
    SIZES,
    TEXTURES,
    TINTS,
)

SPLITS: Final = ("train", "test", "test-unbiased", "lookalike")
"""Independent streams of scenes.

train          biased: each look-alike is on its habitat with probability BIAS
test           held out, with the same bias
test-unbiased  held out, backgrounds independent of the shape
lookalike      one look-alike per scene; the four (shape, background) groups alternate
"""

MIDDLE: Final = (IMAGE_SIZE - 1) / 2
"""Pixel coordinate of the image's centre."""

_SINGLE_RADIUS: Final = {"small": (11.5, 14.0), "large": (17.5, 20.5)}
_GROUP_RADIUS: Final = {"small": (7.8, 9.0), "large": (11.0, 12.8)}
_P_SINGLE: Final = 0.60
_P_GROUP: Final = 0.25
_BORDER: Final = 1.5
_ALONG_JITTER: Final = 2.5
_ACROSS_JITTER: Final = 3.0
_QUADRANT: Final = IMAGE_SIZE / 4
_MAX_TURN: Final = math.radians(20)
_HUB: Final = (0.26, 0.32)
_P_HUB: Final = 0.6
"""Share of gears with a hub. For the others, the background is a stronger cue than the outline."""


@dataclass(frozen=True)
class SceneObject:
    """One object. Lengths are in pixels (x to the right, y down), angles in radians, `hue` in turns."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    rotation: float
    aspect: float
    hue: float
    saturation: float
    value: float
    texture_period: float
    texture_phase: tuple[float, float]
    texture_angle: float
    hub: float
    """Radius of the hole in the middle, in radii of the object; 0 for no hole. Only some gears have one."""
    position: str | None
    """Position of the object; None in a group, where no single word applies."""


@dataclass(frozen=True)
class Scene:
    """One image: its seed, split and index, its background and lighting, and one to four objects."""

    seed: int
    split: str
    index: int
    background: str
    lighting: str
    tint: str
    objects: tuple[SceneObject, ...]

    @property
    def kinds(self) -> tuple[tuple[SceneObject, int], ...]:
        """The kinds of object in the scene, as (first member, number of members)."""
        members_by_kind: dict[tuple[str, str, str, str], list[SceneObject]] = {}
        for item in self.objects:
            members_by_kind.setdefault((item.shape, item.colour, item.texture, item.size), []).append(item)
        return tuple((members[0], len(members)) for members in members_by_kind.values())

    @property
    def count(self) -> str:
        """The number of objects as a word, "one" to "four"."""
        return COUNTS[len(self.objects) - 1]

    @property
    def position(self) -> str | None:
        """Position of the only object; None if there are several objects."""
        return self.objects[0].position if len(self.objects) == 1 else None

    def value_of(self, attribute: str) -> str | None:
        """The value of `attribute`, or None if the scene has no single value.

        Shape, colour, texture and size are defined for scenes with one kind of object, `position` for
        scenes with one object.
        """
        if attribute in ("background", "lighting", "count", "position"):
            return getattr(self, attribute)  # type: ignore[no-any-return]
        if attribute not in ("shape", "colour", "texture", "size"):
            raise ValueError(f"unknown attribute {attribute!r}")
        kinds = self.kinds
        return getattr(kinds[0][0], attribute) if len(kinds) == 1 else None

    def to_json(self) -> dict[str, Any]:
        """The scene as dictionaries, lists, numbers and strings; `from_json` restores it exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Scene:
        """Restore a scene from the result of `to_json`, also after conversion to and from JSON text."""
        objects = tuple(
            SceneObject(**{**item, "texture_phase": tuple(item["texture_phase"])}) for item in data["objects"]
        )
        return cls(**{**data, "objects": objects})


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """The `index`-th scene of a split; the same arguments always give the same record."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative, got {seed} and {index}")
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    if split == "lookalike":
        shape = LOOKALIKES[index % 2]
        background = tuple(HABITAT.values())[index // 2 % 2]
        objects = _single(rng, shape)
    else:
        shape = _pick(rng, SHAPES)
        background = _background_for(rng, shape, biased=split != "test-unbiased")
        objects = _objects(rng, shape)
    return Scene(
        seed=seed,
        split=split,
        index=index,
        background=background,
        lighting=LIGHTINGS[int(rng.choice(3, p=(0.25, 0.5, 0.25)))],
        tint=_pick(rng, TINTS),
        objects=objects,
    )


def _background_for(rng: np.random.Generator, shape: str, biased: bool) -> str:
    if not (biased and shape in HABITAT):
        return _pick(rng, BACKGROUNDS)
    if rng.random() < BIAS:
        return HABITAT[shape]
    return _pick(rng, tuple(name for name in BACKGROUNDS if name != HABITAT[shape]))


def _objects(rng: np.random.Generator, shape: str) -> tuple[SceneObject, ...]:
    roll = rng.random()
    if roll < _P_SINGLE:
        return _single(rng, shape)
    if roll < _P_SINGLE + _P_GROUP:
        return _group(rng, shape, int(rng.integers(2, 5)))
    return _pair(rng, shape)


def _single(rng: np.random.Generator, shape: str) -> tuple[SceneObject, ...]:
    """One object near an edge of the image, centred along the other axis, or at the centre."""
    size = _pick(rng, SIZES)
    radius = rng.uniform(*_SINGLE_RADIUS[size])
    position = _pick(rng, ("left", "right", "top", "bottom", "centre"))
    across = rng.uniform(-_ACROSS_JITTER, _ACROSS_JITTER)
    along = MIDDLE - radius - _BORDER - rng.uniform(0, _ALONG_JITTER)
    centred = rng.uniform(-_ACROSS_JITTER, _ACROSS_JITTER)
    dx, dy = {
        "left": (-along, across),
        "right": (along, across),
        "top": (across, -along),
        "bottom": (across, along),
        "centre": (centred, across),
    }[position]
    return (_draw(rng, shape, _pick(rng, COLOURS), size, radius, MIDDLE + dx, MIDDLE + dy, position),)


def _group(rng: np.random.Generator, shape: str, count: int) -> tuple[SceneObject, ...]:
    """`count` objects of the same shape, colour, texture and size, each in a different quadrant."""
    size = _pick(rng, SIZES)
    low, high = _GROUP_RADIUS[size]
    first = _draw(rng, shape, _pick(rng, COLOURS), size, rng.uniform(low, high), 0.0, 0.0, None)
    free = _QUADRANT - first.radius - 1.0
    members = []
    for quadrant in rng.permutation(4)[:count]:
        right, below = divmod(int(quadrant), 2)
        x = _QUADRANT * (1 + 2 * right) - 0.5 + rng.uniform(-free, free)
        y = _QUADRANT * (1 + 2 * below) - 0.5 + rng.uniform(-free, free)
        members.append(_moved(rng, first, x, y))
    return tuple(members)


def _pair(rng: np.random.Generator, shape: str) -> tuple[SceneObject, ...]:
    """Two objects that differ in shape and colour, side by side or one above the other."""
    other = _pick(rng, tuple(name for name in PLAIN_SHAPES if name != shape))
    colours = [COLOURS[int(i)] for i in rng.permutation(len(COLOURS))[:2]]
    places = ("left", "right") if rng.random() < 0.5 else ("top", "bottom")
    if rng.random() < 0.5:
        places = places[::-1]
    objects = []
    for name, colour, place in zip((shape, other), colours, places, strict=True):
        size = _pick(rng, SIZES)
        radius = rng.uniform(*_GROUP_RADIUS[size])
        along = MIDDLE - radius - _BORDER - rng.uniform(0, 2 * (_QUADRANT - radius) - _BORDER - 0.5)
        along *= -1 if place in ("left", "top") else 1
        across = rng.uniform(-1, 1) * 2 * _ACROSS_JITTER
        dx, dy = (along, across) if place in ("left", "right") else (across, along)
        objects.append(_draw(rng, name, colour, size, radius, MIDDLE + dx, MIDDLE + dy, place))
    return tuple(objects)


_HSV: Final = {
    # hue in turns, saturation, value; neighbouring hues stay distinct under the jitter below
    "red": (0.995, 0.92, 0.90),
    "orange": (0.072, 0.95, 1.00),
    "yellow": (0.150, 0.92, 1.00),
    "green": (0.350, 0.85, 0.74),
    "blue": (0.610, 0.88, 0.95),
    "purple": (0.765, 0.78, 0.80),
    "pink": (0.915, 0.46, 1.00),
    "white": (0.600, 0.02, 0.99),
}
_HUE_JITTER: Final = {"orange": 0.010, "yellow": 0.012, "green": 0.030, "red": 0.010}


def _draw(
    rng: np.random.Generator,
    shape: str,
    colour: str,
    size: str,
    radius: float,
    x: float,
    y: float,
    position: str | None,
) -> SceneObject:
    hue, saturation, value = _HSV[colour]
    jitter = _HUE_JITTER.get(colour, 0.018)
    return SceneObject(
        shape=shape,
        colour=colour,
        texture=_pick(rng, TEXTURES),
        size=size,
        x=x,
        y=y,
        radius=float(radius),
        rotation=rng.uniform(-_MAX_TURN, _MAX_TURN),
        aspect=rng.uniform(0.94, 1.06),
        hue=(hue + rng.uniform(-jitter, jitter)) % 1.0,
        saturation=saturation * rng.uniform(0.94, 1.0),
        value=value * rng.uniform(0.94, 1.0),
        texture_period=rng.uniform(5.5, 7.0),
        texture_phase=(rng.random(), rng.random()),
        texture_angle=rng.uniform(-_MAX_TURN, _MAX_TURN),
        hub=rng.uniform(*_HUB) if shape == "gear" and rng.random() < _P_HUB else 0.0,
        position=position,
    )


def object_at(
    rng: np.random.Generator, shape: str, colour: str, size: str, radius: float, x: float, y: float
) -> SceneObject:
    """An object of a radius and a centre in pixels, without a word for its position; the rest is drawn at random."""
    return _draw(rng, shape, colour, size, radius, x, y, None)


def _moved(rng: np.random.Generator, item: SceneObject, x: float, y: float) -> SceneObject:
    """A copy of a group's first member with another position and rotation."""
    fields = {**item.__dict__, "x": float(x), "y": float(y), "rotation": rng.uniform(-_MAX_TURN, _MAX_TURN)}
    return SceneObject(**fields)


def _pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[int(rng.integers(len(values)))]
