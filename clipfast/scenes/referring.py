"""Referring expressions with known truth: scenes of several objects, and phrases that are true of one of them.

A scene of :func:`sample_crowd` repeats shapes and colours, so that a phrase needs all its words: beside a red star
there may be a red ring and a blue star. :func:`expressions` writes the phrases of a scene that are true of exactly one
object. A phrase is left out where an object is near the border between true and false, such as a star that is two
pixels to the left of a circle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final, Literal

import numpy as np

from clipfast.scenes.scene import SPLITS, Scene, SceneObject, object_at, sample_scene
from clipfast.scenes.vocabulary import COLOURS, IMAGE_SIZE, PLAIN_SHAPES, SIZES, TEXTURES

Kind = Literal["attributes", "relation", "two relations", "between", "superlative"]
KINDS: Final[tuple[Kind, ...]] = ("attributes", "relation", "two relations", "between", "superlative")

CLEAR: Final = 6.0
"""Pixels between two centres from which on one is left of, right of, above or below the other."""
_NEARER: Final = 0.75
"""The nearest object is at most this share of the next one's distance away."""
_LARGER: Final = 1.2
"""The largest object has at least this many times the next one's radius."""
_RADIUS: Final = {"small": (7.8, 9.0), "large": (11.0, 12.8)}
_P_QUADRANTS: Final = 0.5
_STREAM: Final = 2
"""Keeps the random numbers of crowds apart from those of the scenes."""


@dataclass(frozen=True)
class Expression:
    """A phrase and the object that it is true of.

    Attributes:
        text: the phrase in lower case.
        kind: what it takes to understand it.
        target: the object, an index into the scene's objects.
    """

    text: str
    kind: Kind
    target: int


# -------------------------------------------------------------------------------------------------------------- scenes


def sample_crowd(seed: int, split: str, index: int) -> Scene:
    """A scene of three to six objects of which several share their shape, colour or texture.

    Background and light are those of :func:`.scene.sample_scene`. Three or four objects, small or large, stand in the
    quadrants of the image, or four to six small ones in cells of a 3 × 3 grid. Look-alikes are left out. The same
    arguments always give the same scene.

    Raises:
        ValueError: an unknown split, or negative numbers.
    """
    scene = sample_scene(seed, split, index)
    rng = np.random.default_rng([seed, SPLITS.index(split), index, _STREAM])
    shapes = [PLAIN_SHAPES[int(at)] for at in rng.permutation(len(PLAIN_SHAPES))[:2]]
    colours = [COLOURS[int(at)] for at in rng.permutation(len(COLOURS))[:2]]
    textures = [TEXTURES[int(at)] for at in rng.permutation(len(TEXTURES))[:2]]
    quadrants = bool(rng.random() < _P_QUADRANTS)
    count, side = (int(rng.integers(3, 5)), 2) if quadrants else (int(rng.integers(4, 7)), 3)
    cell = IMAGE_SIZE / side
    objects = []
    for place in rng.permutation(side * side)[:count]:
        row, column = divmod(int(place), side)
        size = SIZES[int(rng.integers(len(SIZES)))] if quadrants else "small"
        radius = float(rng.uniform(*_RADIUS[size]))
        free = cell / 2 - radius - 1
        x, y = ((at + 0.5) * cell - 0.5 + float(rng.uniform(-free, free)) for at in (column, row))
        shape, colour, texture = (some[int(rng.integers(2))] for some in (shapes, colours, textures))
        objects.append(replace(object_at(rng, shape, colour, size, radius, x, y), texture=texture))
    return replace(scene, objects=tuple(objects))


# ------------------------------------------------------------------------------------------------------------- phrases


@dataclass(frozen=True)
class _Description:
    """Words for an object: those of its attributes that are named, and its shape or ``object``."""

    values: Mapping[str, str]

    @property
    def text(self) -> str:
        adjectives = [self.values[name] for name in ("size", "colour", "texture") if name in self.values]
        return " ".join([*adjectives, self.values.get("shape", "object")])

    def fits(self, item: SceneObject) -> bool:
        return all(getattr(item, name) == value for name, value in self.values.items())


_NAMED: Final = (
    ("shape",),
    ("colour", "shape"),
    ("texture", "shape"),
    ("colour", "texture", "shape"),
    ("colour",),
    ("size", "shape"),
)

Verdict = bool | None
"""Whether something is true of an object; None where it is near the border."""


def _beyond(distance: float) -> Verdict:
    return True if distance >= CLEAR else False if distance <= CLEAR / 3 else None


_DIRECTIONS: Final[dict[str, Callable[[SceneObject, SceneObject], float]]] = {
    "left of": lambda item, mark: mark.x - item.x,
    "to the left of": lambda item, mark: mark.x - item.x,
    "right of": lambda item, mark: item.x - mark.x,
    "to the right of": lambda item, mark: item.x - mark.x,
    "above": lambda item, mark: mark.y - item.y,
    "over": lambda item, mark: mark.y - item.y,
    "below": lambda item, mark: item.y - mark.y,
    "under": lambda item, mark: item.y - mark.y,
}
_NEXT: Final = ("next to", "beside")
_SUPERLATIVES: Final[dict[str, Callable[[SceneObject], float]]] = {
    "leftmost": lambda item: -item.x,
    "rightmost": lambda item: item.x,
    "topmost": lambda item: -item.y,
    "lowest": lambda item: item.y,
    "largest": lambda item: item.radius,
    "smallest": lambda item: -item.radius,
}


def expressions(scene: Scene, rng: np.random.Generator, most: int = 1) -> list[Expression]:
    """Phrases that are true of one object of a scene, at most ``most`` of each kind, in random words.

    A phrase with a relation or a superlative is kept only where it needs that: where the description of its target fits
    at least one other object. Landmarks fit exactly one object.
    """
    names: list[_Description] = []
    for item in scene.objects:
        for named in _NAMED:
            description = _Description({name: getattr(item, name) for name in named})
            if description not in names:
                names.append(description)
    fitting = [(name, [at for at, item in enumerate(scene.objects) if name.fits(item)]) for name in names]
    unique = [(name, at[0]) for name, at in fitting if len(at) == 1]
    several = [(name, at) for name, at in fitting if len(at) > 1]
    found: dict[Kind, list[tuple[str, int]]] = {kind: [] for kind in KINDS}
    found["attributes"] = [(name.text, at) for name, at in unique]
    marks: dict[int, _Description] = {at: name for name, at in sorted(unique, key=lambda pair: -len(pair[0].values))}
    for name, candidates in several:
        others = [(mark, at) for at, mark in marks.items() if at not in candidates]
        for mark, at in others:
            for relation, distance in _DIRECTIONS.items():
                verdicts = [_beyond(distance(scene.objects[one], scene.objects[at])) for one in candidates]
                _keep(found["relation"], f"{name.text} {relation} the {mark.text}", candidates, verdicts)
            verdicts = _nearest([_distance(scene.objects[one], scene.objects[at]) for one in candidates])
            for relation in _NEXT:
                _keep(found["relation"], f"{name.text} {relation} the {mark.text}", candidates, verdicts)
        for (first, a), (second, b) in combinations(others, 2):
            _two_relations(scene, found["two relations"], name, candidates, ((first, a), (second, b)))
            verdicts = [_between(*(scene.objects[at] for at in (one, a, b))) for one in candidates]
            text = f"{name.text} between the {first.text} and the {second.text}"
            _keep(found["between"], text, candidates, verdicts)
        for word, value in _SUPERLATIVES.items():
            verdicts = _most([value(scene.objects[one]) for one in candidates], "est" in word and word != "lowest")
            _keep(found["superlative"], f"{word} {name.text}", candidates, verdicts)
    chosen = []
    for kind, phrases in found.items():
        order = rng.permutation(len(phrases))[:most]
        chosen += [Expression(f"the {phrases[int(at)][0]}", kind, phrases[int(at)][1]) for at in order]
    return chosen


def _keep(phrases: list[tuple[str, int]], text: str, candidates: Sequence[int], verdicts: Sequence[Verdict]) -> None:
    """Adds a phrase that is true of one candidate and clearly false of the others."""
    if sum(verdict is True for verdict in verdicts) == 1 and None not in verdicts:
        phrases.append((text, candidates[list(verdicts).index(True)]))


def _two_relations(
    scene: Scene,
    phrases: list[tuple[str, int]],
    name: _Description,
    candidates: Sequence[int],
    marks: Sequence[tuple[_Description, int]],
) -> None:
    """Adds phrases of which neither relation alone tells the target."""
    (first, a), (second, b) = marks
    for one, along in _DIRECTIONS.items():
        for other, across in _DIRECTIONS.items():
            pairs = [
                (
                    _beyond(along(scene.objects[at], scene.objects[a])),
                    _beyond(across(scene.objects[at], scene.objects[b])),
                )
                for at in candidates
            ]
            if any(sum(pair[which] is True for pair in pairs) < 2 for which in (0, 1)):
                continue
            both = [False if False in pair else None if None in pair else True for pair in pairs]
            _keep(phrases, f"{name.text} {one} the {first.text} and {other} the {second.text}", candidates, both)


def _distance(item: SceneObject, other: SceneObject) -> float:
    return math.hypot(item.x - other.x, item.y - other.y)


def _nearest(distances: Sequence[float]) -> list[Verdict]:
    """True for the least distance, if it is clearly the least."""
    ranked = sorted(distances)
    clear = ranked[0] <= _NEARER * ranked[1]
    return [distance == ranked[0] if clear else None for distance in distances]


def _most(values: Sequence[float], sizes: bool) -> list[Verdict]:
    """True for the greatest value, if it is clearly the greatest: positions by pixels, sizes by their ratio."""
    second, first = sorted(values)[-2:]
    clear = max(abs(first / second), abs(second / first)) >= _LARGER if sizes else first - second >= CLEAR
    return [value == first if clear else None for value in values]


def _between(item: SceneObject, first: SceneObject, second: SceneObject) -> Verdict:
    """Whether an object is near the middle part of the line between two others."""
    length = _distance(first, second)
    along = ((item.x - first.x) * (second.x - first.x) + (item.y - first.y) * (second.y - first.y)) / length**2
    off = abs((item.x - first.x) * (second.y - first.y) - (item.y - first.y) * (second.x - first.x)) / length
    if 0.3 <= along <= 0.7 and off <= CLEAR:
        return True
    return False if not 0.1 <= along <= 0.9 or off >= 2 * CLEAR else None
