"""Captions of scenes with the attributes they assert, and the prompts for zero-shot classification.

A caption describes a random subset of a scene's attributes in random words and order. The asserted
attributes are stored with the text, so that its truth can be computed for any other scene
(`clipfast.scenes.encoding.truth_matrix`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from clipfast.scenes.scene import Scene, SceneObject
from clipfast.scenes.vocabulary import ATTRIBUTES, COUNTS

_SHAPE_WORDS: Final[dict[str, tuple[str, str]]] = {
    "circle": ("circle", "circles"),
    "square": ("square", "squares"),
    "triangle": ("triangle", "triangles"),
    "star": ("star", "stars"),
    "cross": ("cross", "crosses"),
    "heart": ("heart", "hearts"),
    "crescent": ("crescent", "crescents"),
    "ring": ("ring", "rings"),
    "flower": ("flower", "flowers"),
    "gear": ("gear", "gears"),
}
_ANY_SHAPE: Final = (("object", "objects"), ("shape", "shapes"), ("thing", "things"))
_SYNONYMS: Final[dict[str, tuple[str, ...]]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "centre": ("centre", "middle"),
    "plain": ("plain", "solid"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
}
_PLACE: Final[dict[str, tuple[str, ...]]] = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
    "centre": ("in the centre", "in the middle"),
}
_SETTING: Final[dict[str, tuple[str, ...]]] = {
    "sea": ("at sea", "over the sea", "by the sea", "in front of the ocean", "above the water"),
    "forest": ("in the forest", "in a forest", "among trees", "in the woods"),
    "desert": ("in the desert", "in a desert", "over the dunes", "on the sand"),
    "night": ("at night", "in the night", "under the stars", "in the night sky"),
    "snow": ("in the snow", "in snow", "on a snowy day", "in winter"),
    "city": ("in the city", "in a city", "in town", "among buildings"),
}
_LANDSCAPE: Final[dict[str, tuple[str, ...]]] = {
    "sea": ("the sea", "a sea scene", "a view of the ocean", "open water"),
    "forest": ("a forest", "a forest scene", "the woods", "trees"),
    "desert": ("a desert", "a desert scene", "sand dunes", "the desert"),
    "night": ("the night", "a night scene", "a night sky", "a starry night"),
    "snow": ("snow", "a snowy scene", "a winter scene", "snowy hills"),
    "city": ("a city", "a city scene", "buildings", "a city street"),
}
_LIGHT: Final[dict[str, tuple[str, ...]]] = {
    "bright": ("in bright light", "brightly lit"),
    "normal": ("in normal light", "normally lit"),
    "dim": ("in dim light", "dimly lit"),
}
_OPENINGS: Final = (
    *("", "", "", "a photo of ", "a picture of ", "an image of "),
    *("there is ", "this is ", "we see "),
)
_PLURAL: Final = {"there is ": "there are ", "this is ": "these are "}
_OBJECT_FIELDS: Final = ("shape", "colour", "texture", "size", "count", "position")


@dataclass(frozen=True)
class Caption:
    """A text and the attributes it asserts (attribute to value), true of the scene it describes."""

    text: str
    asserted: Mapping[str, str]


def caption(scene: Scene, rng: np.random.Generator) -> Caption:
    """A caption of one to five attributes of the scene, in random words and order."""
    kinds = scene.kinds
    item = kinds[int(rng.integers(len(kinds)))][0]
    known = [name for name in ATTRIBUTES if _known(name, item)]
    # short captions teach single words, long ones teach their combination
    size = int(rng.choice(5, p=(0.34, 0.24, 0.20, 0.13, 0.09))) + 1
    weights = np.array([_WEIGHTS[name] for name in known])
    chosen = rng.choice(len(known), size=min(size, len(known)), replace=False, p=weights / weights.sum())
    asserted: dict[str, str] = {}
    for index in sorted(int(i) for i in chosen):
        name = known[index]
        asserted[name] = _value(name, scene, item)
    if "count" in asserted:
        # count all objects that the description fits: the other kind may share the asserted attributes
        named = {name: getattr(item, name) for name in _OBJECT_FIELDS if name in asserted and name != "count"}
        matching = [other for other in scene.objects if all(getattr(other, name) == named[name] for name in named)]
        asserted["count"] = COUNTS[len(matching) - 1]
    return Caption(phrase(asserted, rng), asserted)


_WEIGHTS: Final = {
    "shape": 2.0,
    "colour": 1.2,
    "texture": 1.2,
    "size": 0.7,
    "count": 1.2,
    "position": 1.6,
    "background": 1.2,
    "lighting": 0.4,
}


def _known(name: str, item: SceneObject) -> bool:
    return name != "position" or item.position is not None


def _value(name: str, scene: Scene, item: SceneObject) -> str:
    source = scene if name in ("background", "lighting", "count") else item
    return str(getattr(source, name))


def phrase(asserted: Mapping[str, str], rng: np.random.Generator) -> str:
    """Express assertions as a text in lower case, with commas only, of at most about 20 words."""
    words_by_name = {name: _word(value, rng) for name, value in asserted.items()}
    tail: list[str] = []
    if "position" in asserted:
        tail.append(_any(_PLACE[asserted["position"]], rng))
    if "lighting" in asserted:
        tail.append(_any(_LIGHT[asserted["lighting"]], rng))
    if not any(name in asserted for name in _OBJECT_FIELDS):
        subject = _any(_LANDSCAPE[asserted["background"]], rng) if "background" in asserted else "a scene"
        return _any(_OPENINGS, rng) + " ".join([subject, *tail])
    if "background" in asserted:
        tail.append(_any(_SETTING[asserted["background"]], rng))
    order = [tail[int(i)] for i in rng.permutation(len(tail))]
    subject = _subject(asserted, words_by_name, rng)
    if order and rng.random() < 0.2:
        return f"{order[0]}, " + " ".join([subject, *order[1:]])
    opening = _any(_OPENINGS, rng)
    if asserted.get("count", "one") != "one":
        opening = _PLURAL.get(opening, opening)
    return opening + " ".join([subject, *order])


def _subject(asserted: Mapping[str, str], words_by_name: Mapping[str, str], rng: np.random.Generator) -> str:
    adjectives = [words_by_name[name] for name in ("size", "colour", "texture") if name in words_by_name]
    if len(adjectives) > 1 and rng.random() < 0.5:
        adjectives = [adjectives[int(i)] for i in rng.permutation(len(adjectives))]
    if not adjectives and "shape" not in asserted and "count" not in asserted:
        return _any(("something", "an object", "a shape", "a thing"), rng)
    names = _SHAPE_WORDS[asserted["shape"]] if "shape" in asserted else _ANY_SHAPE[int(rng.integers(3))]
    count = asserted.get("count")
    if count is None:
        phrase_words = [*adjectives, names[0]]
        article = "an" if phrase_words[0][0] in "aeiou" else "a"
    else:
        phrase_words = [*adjectives, names[count != "one"]]
        article = _any(("one", "a single", "only one") if count == "one" else (count,), rng)
    return " ".join([article, *phrase_words])


def _word(value: str, rng: np.random.Generator) -> str:
    return _any(_SYNONYMS.get(value, (value,)), rng)


def _any(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


_ADJECTIVE: Final = (
    *("a {} object", "a photo of a {} object", "a {} shape"),
    *("a {} thing", "a picture of a {} shape"),
)
_PROMPTS: Final[dict[str, tuple[str, ...]]] = {
    "shape": ("a {}", "a photo of a {}", "a picture of a {}", "an image of a {}", "there is a {}"),
    "colour": _ADJECTIVE,
    "texture": _ADJECTIVE,
    "size": _ADJECTIVE,
    "count": ("{} objects", "a photo of {} objects", "{} shapes", "a picture of {} things"),
    "position": ("something {}", "an object {}", "a photo of an object {}", "a shape {}"),
    "background": ("{}", "a photo of {}", "a picture of {}", "an image of {}"),
    "lighting": ("a scene {}", "a photo of a scene {}", "a picture of a scene {}"),
}
_FILLERS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "position": _PLACE,
    "background": _LANDSCAPE,
    "lighting": _LIGHT,
}


def prompts(attribute: str) -> dict[str, list[str]]:
    """Prompts for zero-shot classification: a list of texts for every class of the attribute.

    The classes are in the order of the vocabulary. Raises ValueError for an unknown attribute.
    """
    if attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {attribute!r}; known: {', '.join(ATTRIBUTES)}")
    texts: dict[str, list[str]] = {}
    for value in ATTRIBUTES[attribute]:
        words = _FILLERS.get(attribute, {}).get(value) or _SYNONYMS.get(value, (value,))
        texts[value] = [_singular(t, value).format(word) for t in _PROMPTS[attribute] for word in words]
    return texts


def _singular(template: str, value: str) -> str:
    if value == "one":
        return template.replace("objects", "object").replace("shapes", "shape").replace("things", "thing")
    if value == "orange":
        return template.replace("a {}", "an {}")
    return template


def words() -> list[str]:
    """Every word that captions and prompts can contain, sorted."""
    texts = [*_OPENINGS, *_PLURAL.values(), "a an one single only something scene", *COUNTS]
    texts += [word for pair in (*_SHAPE_WORDS.values(), *_ANY_SHAPE) for word in pair]
    texts += [value for name in ("colour", "texture", "size") for value in ATTRIBUTES[name]]
    for table in (_SYNONYMS, _PLACE, _SETTING, _LANDSCAPE, _LIGHT):
        texts += [text for options in table.values() for text in options]
    return sorted({word for text in texts for word in text.split()})
