"""Scenes and assertions as small integer arrays, and the truth of every caption for every scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from clipfast.scenes.scene import Scene
from clipfast.scenes.vocabulary import ATTRIBUTES, class_index

Codes = NDArray[np.int8]

KIND_FIELDS: Final = ("shape", "colour", "texture", "size", "position")
SCENE_FIELDS: Final = ("background", "lighting")
ASSERTION_FIELDS: Final = (*KIND_FIELDS, *SCENE_FIELDS, "count")

ABSENT: Final = -1
"""In an assertion: the attribute is not asserted. In a scene: there is no second kind of object."""
UNDEFINED: Final = -2
"""In a scene: the attribute has no single value, so every assertion about it is false."""


def encode_scene(scene: Scene) -> Codes:
    """One scene as int8 [2 * 6 + 2].

    For each of two kinds of object: class indices in the order of KIND_FIELDS, then the number of
    objects of the kind (0 if there is no second kind). Background and lighting follow.
    """
    codes: list[int] = []
    kinds = scene.kinds
    for index in range(2):
        if index >= len(kinds):
            codes += [ABSENT] * len(KIND_FIELDS) + [0]
            continue
        item, number = kinds[index]
        for field in KIND_FIELDS:
            value = getattr(item, field)
            codes.append(UNDEFINED if value is None else class_index(field, value))
        codes.append(number)
    codes += [class_index(field, getattr(scene, field)) for field in SCENE_FIELDS]
    return np.array(codes, dtype=np.int8)


def encode_assertion(asserted: Mapping[str, str]) -> Codes:
    """The assertions of a caption as int8 [8] class indices in the order of ASSERTION_FIELDS."""
    unknown = set(asserted) - set(ATTRIBUTES)
    if unknown:
        raise ValueError(f"unknown attributes: {', '.join(sorted(unknown))}")
    return np.array([class_index(f, asserted[f]) if f in asserted else ABSENT for f in ASSERTION_FIELDS], dtype=np.int8)


def truth_matrix(scenes: Codes, assertions: Codes) -> NDArray[np.bool_]:
    """Whether assertion j holds for scene i: bool [n_scenes, n_assertions].

    An assertion holds if a kind of object in the scene has all asserted object attributes (shape,
    colour, texture, size, position), the number of all objects that have them equals the asserted
    count, and the scene has the asserted background and lighting.

    Args:
        scenes: [n_scenes, 14] rows of `encode_scene`.
        assertions: [n_assertions, 8] rows of `encode_assertion`.
    """
    width = len(KIND_FIELDS)
    total = np.zeros((len(scenes), len(assertions)), dtype=np.int8)
    for start in (0, width + 1):
        number = scenes[:, start + width, None]
        match = np.broadcast_to(number > 0, total.shape).copy()
        for field in range(width):
            value = assertions[None, :, field]
            match &= (value == ABSENT) | (scenes[:, start + field, None] == value)
        total += match * number
    holds = total > 0
    for field in range(len(SCENE_FIELDS)):
        value = assertions[None, :, width + field]
        holds &= (value == ABSENT) | (scenes[:, 2 * (width + 1) + field, None] == value)
    count = assertions[None, :, -1]
    holds &= (count == ABSENT) | (total == count + 1)
    return holds


def holds(asserted: Mapping[str, str], scene: Scene) -> bool:
    """Whether all of `asserted` (attribute to value) is true of the scene."""
    return bool(truth_matrix(encode_scene(scene)[None], encode_assertion(asserted)[None])[0, 0])


def encode_scenes(scenes: Sequence[Scene]) -> Codes:
    """Rows of `encode_scene`: int8 [n, 14]."""
    return np.stack([encode_scene(scene) for scene in scenes])
