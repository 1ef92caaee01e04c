"""The vocabulary of the scenes: all attributes and their values.

The order of the values is part of the data format: class indices in the training arrays and the
evaluation are positions in these tuples.
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
"""Ten shapes; the last two are look-alikes (see `LOOKALIKES`)."""

LOOKALIKES: Final = ("flower", "gear")
"""Two shapes with the same number of lobes. A gear's are more square, and some gears have a hole."""

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
"""The attributes that captions can assert, with their values."""

HABITAT: Final = {"flower": "forest", "gear": "city"}
"""The usual background of each look-alike in the biased splits."""

BIAS: Final = 0.93
"""Share of a look-alike's scenes that have its usual background, in the biased splits."""

IMAGE_SIZE: Final = 64
"""Side of every image, in pixels."""

MAX_OBJECTS: Final = 4


def class_index(attribute: str, value: str) -> int:
    """Index of `value` among the classes of `attribute`; raises ValueError if either is unknown."""
    try:
        return ATTRIBUTES[attribute].index(value)
    except KeyError:
        raise ValueError(f"unknown attribute {attribute!r}; known: {', '.join(ATTRIBUTES)}") from None
    except ValueError:
        known = ", ".join(ATTRIBUTES[attribute])
        raise ValueError(f"unknown {attribute} {value!r}; known: {known}") from None
