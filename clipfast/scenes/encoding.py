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
"""In an assertion: says nothing about this attribute. In a scene: there is no second kind of object."""
UNDEFINED: Final = -2
"""In a scene: the attribute has no single true value, so whatever is asserted about it is false."""


def encode_scene(scene: Scene) -> Codes:
    """One scene as int8 [2 * 6 + 2].

    For each of up to two kinds of object: class indices in the order of KIND_FIELDS, then how many
    objects of the kind there are (0: no such kind); last the background and the lighting.
    """
    codes: list[int] = []
    kinds = scene.kinds
    for place in range(2):
        if place >= len(kinds):
            codes += [ABSENT] * len(KIND_FIELDS) + [0]
            continue
        item, number = kinds[place]
        for field in KIND_FIELDS:
            value = getattr(item, field)
            codes.append(UNDEFINED if value is None else class_index(field, value))
        codes.append(number)
    codes += [class_index(field, getattr(scene, field)) for field in SCENE_FIELDS]
    return np.array(codes, dtype=np.int8)


def encode_assertion(asserted: Mapping[str, str]) -> Codes:
    """What a caption asserts as int8 [8] class indices in the order of ASSERTION_FIELDS."""
    unknown = set(asserted) - set(ATTRIBUTES)
    if unknown:
        raise ValueError(f"unknown attributes: {', '.join(sorted(unknown))}")
    return np.array([class_index(f, asserted[f]) if f in asserted else ABSENT for f in ASSERTION_FIELDS], dtype=np.int8)


def truth_matrix(scenes: Codes, assertions: Codes) -> NDArray[np.bool_]:
    """Whether assertion j holds for scene i: bool [n_scenes, n_assertions].

    An assertion holds when one kind of object in the scene has all the object attributes it names
    (shape, colour, texture, size, position), the number of all objects that have them is the count
    it names, and the scene has the background and the lighting it names.

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
            wanted = assertions[None, :, field]
            match &= (wanted == ABSENT) | (scenes[:, start + field, None] == wanted)
        total += match * number
    holds = total > 0
    for field in range(len(SCENE_FIELDS)):
        wanted = assertions[None, :, width + field]
        holds &= (wanted == ABSENT) | (scenes[:, 2 * (width + 1) + field, None] == wanted)
    count = assertions[None, :, -1]
    holds &= (count == ABSENT) | (total == count + 1)
    return holds


def holds(asserted: Mapping[str, str], scene: Scene) -> bool:
    """Whether everything in `asserted` (attribute to value) is true of the scene."""
    return bool(truth_matrix(encode_scene(scene)[None], encode_assertion(asserted)[None])[0, 0])


def encode_scenes(scenes: Sequence[Scene]) -> Codes:
    """Rows of `encode_scene`: int8 [n, 14]."""
    return np.stack([encode_scene(scene) for scene in scenes])
