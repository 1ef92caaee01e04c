"""The closed world of the scenes: every attribute and the values it can take.

The order of the values is part of the data format: class indices in the training arrays and in the
evaluation tables are positions in these tuples.
"""

from __future__ import annotations

from typing import Final

SHAPES: Final = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "heart",
    "crescent",
    "ring",
    "flower",
    "gear",
)
"""Ten shapes; the last two are look-alikes of each other (see `LOOKALIKES`)."""

LOOKALIKES: Final = ("flower", "gear")
"""Two shapes with the same lobes, told apart by how square these are, and some gears by the hole in the middle."""

PLAIN_SHAPES: Final = tuple(name for name in SHAPES if name not in LOOKALIKES)

COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
TEXTURES: Final = ("plain", "striped", "dotted", "checkered")
SIZES: Final = ("small", "large")
COUNTS: Final = ("one", "two", "three", "four")
POSITIONS: Final = ("left", "right", "top", "bottom", "centre")
BACKGROUNDS: Final = ("sea", "forest", "desert", "night", "snow", "city")
LIGHTINGS: Final = ("bright", "normal", "dim")
TINTS: Final = ("neutral", "warm", "cold")

ATTRIBUTES: Final[dict[str, tuple[str, ...]]] = {
    "shape": SHAPES,
    "colour": COLOURS,
    "texture": TEXTURES,
    "size": SIZES,
    "count": COUNTS,
    "position": POSITIONS,
    "background": BACKGROUNDS,
    "lighting": LIGHTINGS,
}
"""Attributes that captions can assert, by name."""

HABITAT: Final = {"flower": "forest", "gear": "city"}
"""The background each look-alike is nearly always seen on in the biased splits."""

BIAS: Final = 0.93
"""Share of a look-alike's scenes that show it on its habitat, in the biased splits."""

IMAGE_SIZE: Final = 64
"""Side of every image, in pixels."""

MAX_OBJECTS: Final = 4


def class_index(attribute: str, value: str) -> int:
    """Position of `value` among the classes of `attribute`; ValueError when it is not one of them."""
    try:
        return ATTRIBUTES[attribute].index(value)
    except KeyError:
        raise ValueError(f"unknown attribute {attribute!r}; known: {', '.join(ATTRIBUTES)}") from None
    except ValueError:
        known = ", ".join(ATTRIBUTES[attribute])
        raise ValueError(f"unknown {attribute} {value!r}; known: {known}") from None
