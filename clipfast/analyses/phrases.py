"""Referring phrases taken apart: what to find, how it looks, and where it is relative to what else.

``"the red star left of the blue circle and above the sea"`` has the target ``star`` with the colour ``red``, and the
relations ``left`` to ``blue circle`` and ``above`` to ``sea``. Templates of words find relations, positions and
superlatives; there is no grammar behind them and nothing to download. What no template knows stays in the noun.

Every relation is one of the target's: in ``"the star left of the circle above the sea"`` the star is above the sea.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from clipfast.errors import InputError

RelationKind = Literal["left", "right", "above", "below", "near", "between", "on", "with"]
Place = Literal["left", "right", "top", "bottom", "middle"]
Extreme = Literal["leftmost", "rightmost", "topmost", "bottommost", "largest", "smallest"]
AttributeKind = Literal["size", "colour", "texture", "shape"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ATTRIBUTES: Final[Mapping[AttributeKind, frozenset[str]]] = MappingProxyType(
    {
        "size": _words("small little tiny large big huge tall short long wide thin thick"),
        "colour": _words(
            "red orange yellow green blue purple violet pink white black brown grey gray golden silver beige turquoise"
        ),
        "texture": _words(
            "plain solid striped dotted spotted checkered chequered patterned smooth furry wooden metal metallic glass"
        ),
        "shape": _words("round circular square triangular rectangular oval curved flat"),
    }
)
"""Words that say how something looks, where a noun follows them."""

OPPOSITES: Final[Mapping[AttributeKind, tuple[str, ...]]] = MappingProxyType(
    {
        "size": ("small", "large"),
        "colour": ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "brown", "grey"),
        "texture": ("plain", "striped", "dotted", "checkered"),
        "shape": ("round", "square", "triangular"),
    }
)
"""What a word of each kind stands out from, unless the caller says otherwise."""

_NOUNS: Final = (
    "person man woman child dog cat bird horse car bus bicycle boat chair table bed cup bottle plate book phone screen "
    "tree flower grass sky water sea mountain road building wall floor food ball box bag hat shirt window door lamp "
    "sign"
)
NOUNS: Final = tuple(_NOUNS.split())
"""What a noun stands out from, unless the caller says otherwise."""

LARGE: Final = _words("large big huge tall long wide thick")
"""The words of size that mean more of it; the other ones mean less."""

GENERIC: Final = frozenset(
    {"object", "objects", "thing", "things", "one", "ones", "item", "something", "anything", "shape"}
)
"""Nouns that say nothing of how something looks."""

_RELATIONS: Final[Mapping[RelationKind, tuple[str, ...]]] = MappingProxyType(
    {
        "left": ("left of", "to the left of", "on the left of", "at the left of", "on the left side of", "left from"),
        "right": (
            "right of",
            "to the right of",
            "on the right of",
            "at the right of",
            "on the right side of",
            "right from",
        ),
        "above": ("above", "over", "on top of", "higher than", "at the top of"),
        "below": ("below", "under", "beneath", "underneath", "lower than", "at the bottom of"),
        "near": (
            "next to",
            "beside",
            "near",
            "near to",
            "close to",
            "by",
            "nearest to",
            "closest to",
            "adjacent to",
            "alongside",
        ),
        "between": ("between", "in between"),
        "on": (
            "on",
            "upon",
            "in",
            "inside",
            "inside of",
            "within",
            "in the middle of",
            "in the centre of",
            "in the center of",
            "in front of",
            "before",
            "behind",
            "in back of",
            "against",
            "at",
            "among",
        ),
        "with": ("with", "holding", "wearing", "carrying", "that has", "which has", "who has", "having"),
    }
)
_PLACES: Final[Mapping[str, Place]] = MappingProxyType(
    {
        "left": "left", "right": "right", "top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom",
        "middle": "middle", "centre": "middle", "center": "middle", "central": "middle",
    }
)  # fmt: skip
_EXTREMES: Final[Mapping[str, Extreme]] = MappingProxyType(
    {
        "leftmost": "leftmost", "left-most": "leftmost", "furthest left": "leftmost", "farthest left": "leftmost",
        "far left": "leftmost",
        "rightmost": "rightmost", "right-most": "rightmost", "furthest right": "rightmost",
        "farthest right": "rightmost", "far right": "rightmost",
        "topmost": "topmost", "top-most": "topmost", "uppermost": "topmost", "highest": "topmost",
        "bottommost": "bottommost", "bottom-most": "bottommost", "lowermost": "bottommost", "lowest": "bottommost",
        "largest": "largest", "biggest": "largest", "tallest": "largest", "widest": "largest",
        "smallest": "smallest", "littlest": "smallest", "tiniest": "smallest", "shortest": "smallest",
    }
)  # fmt: skip
_DETERMINERS: Final = _words("the a an this that these those its their his her my your our some")
_FILLERS: Final = _words(
    "is are was were which who standing located situated placed positioned lying sitting there also"
)
_IMAGE: Final = _words("image picture photo photograph frame scene view screen")
_PARTS: Final = _words("side corner half part edge area")
_INTO: Final = _words("on at in to near towards toward from")
_AND: Final = ("and", ",", ";")
_TRAILING: Final = _words("left right top bottom middle centre center")
_AFTER: Final = frozenset({*_AND, *_FILLERS, "that"})
_EMPTY: Final = frozenset({*_DETERMINERS, *_FILLERS, *_AND, "of"})
_TEMPLATES: Final[Mapping[tuple[str, ...], RelationKind]] = MappingProxyType(
    {tuple(words.split()): kind for kind, templates in _RELATIONS.items() for words in templates}
)
_LONGEST: Final = max(map(len, _TEMPLATES))
_TOKEN: Final = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[,;]")


@dataclass(frozen=True)
class Attribute:
    """A word for how something looks.

    Attributes:
        kind: what the word is about.
        word: the word.
    """

    kind: AttributeKind
    word: str


@dataclass(frozen=True)
class Thing:
    """Something that a phrase names.

    Attributes:
        noun: the noun with every word before it that is no attribute.
        attributes: how it looks, in the order of the phrase.
    """

    noun: str
    attributes: tuple[Attribute, ...] = ()

    @property
    def text(self) -> str:
        """Attributes and noun, such as ``red star``."""
        return " ".join([*(attribute.word for attribute in self.attributes), self.noun])

    @property
    def generic(self) -> bool:
        """Whether the noun says nothing of how the thing looks: ``object``, ``one``."""
        return self.noun in GENERIC


@dataclass(frozen=True)
class Relation:
    """Where the target is relative to something else.

    Attributes:
        kind: ``"on"`` is also ``in``, ``in front of`` and ``behind``: where the two overlap in the image. ``"with"`` is
            also ``holding`` and ``wearing``.
        landmarks: what else; two or more for ``"between"``, and any number otherwise, which all must hold.
    """

    kind: RelationKind
    landmarks: tuple[Thing, ...]


@dataclass(frozen=True)
class Phrase:
    """A phrase taken apart.

    Attributes:
        text: the phrase as it was given, with single spaces.
        target: what to find.
        relations: where it is relative to other things.
        places: where it is in the image.
        extremes: in what it exceeds others of its kind.
    """

    text: str
    target: Thing
    relations: tuple[Relation, ...] = ()
    places: tuple[Place, ...] = ()
    extremes: tuple[Extreme, ...] = ()

    @property
    def things(self) -> tuple[Thing, ...]:
        """The target and all landmarks, each once."""
        landmarks = [thing for relation in self.relations for thing in relation.landmarks]
        return tuple(dict.fromkeys([self.target, *landmarks]))


def parse(text: str) -> Phrase:
    """Takes a phrase apart.

    Without a noun the target is an ``object``: ``"the leftmost"``, ``"on the right"``.

    Args:
        text: English, such as ``"the leftmost red star above the sea"``; case does not matter.

    Raises:
        InputError: nothing in it says what to find.
    """
    words = _TOKEN.findall(text.casefold())
    segments, places = _segments(words)
    target = _Chunk.of(segments[0][1])
    relations = []
    for kind, chunk in segments[1:]:
        landmarks = [_Chunk.of(part).thing for part in _split(chunk, pair=kind == "between")]
        named = tuple(landmark for landmark in landmarks if landmark is not None)
        if kind is not None and named:
            relations.append(Relation("near" if kind == "between" and len(named) == 1 else kind, named))
    thing = target.thing
    if thing is None:
        if not (target.extremes or target.places or places):
            shown = " ".join(text.split())[:60]
            raise InputError(
                f'{shown!r} does not say what to find: begin with it, as in "the red star left of the sea"'
            )
        thing = Thing("object")
    return Phrase(
        " ".join(text.split()),
        thing,
        tuple(dict.fromkeys(relations)),
        tuple(dict.fromkeys([*target.places, *places])),
        tuple(dict.fromkeys(target.extremes)),
    )


_Segment = tuple[RelationKind | None, list[str]]


def _segments(words: Sequence[str]) -> tuple[list[_Segment], list[Place]]:
    """The target's words and those after every relation, and the places that are named apart from nouns."""
    segments: list[_Segment] = [(None, [])]
    places: list[Place] = []
    at = 0
    while at < len(words):
        relation, length = _relation_at(words, at)
        found, taken = _place_at(words, at)
        if taken >= max(length, 1):
            places += found
            at += taken
        elif relation is not None and _names_something(words[at + length :]):
            segments.append((relation, []))
            at += length
        else:
            segments[-1][1].append(words[at])
            at += 1
    return segments, places


def _relation_at(words: Sequence[str], at: int) -> tuple[RelationKind | None, int]:
    """The relation whose template begins at a word, and how many words it takes; the longest one."""
    for length in range(min(_LONGEST, len(words) - at), 0, -1):
        kind = _TEMPLATES.get(tuple(words[at : at + length]))
        if kind is not None:
            return kind, length
    return None, 0


def _place_at(words: Sequence[str], at: int) -> tuple[list[Place], int]:
    """The places that are named from a word on, as in ``at the top left of the image``, and how many words that takes.

    A place of something else, ``on the left of the star``, is a relation and none of these.
    """
    end = at
    if end < len(words) and words[end] in _INTO:
        end += 1
    else:
        return [], 0
    while end < len(words) and words[end] in _DETERMINERS:
        end += 1
    places: list[Place] = []
    while end < len(words) and words[end] in _PLACES:
        places.append(_PLACES[words[end]])
        end += 1
    if places and end < len(words) and words[end] in _PARTS:
        end += 1
    ends = _image_at(words, end + 1) if end < len(words) and words[end] == "of" else None
    if places:
        if ends is not None:
            return places, ends - at
        # followed by a noun, "on the left wall", it is that noun's place, and after "of" it is a relation
        free = end == len(words) or words[end] in _AFTER or _relation_at(words, end)[0] is not None
        return (places, end - at) if free else ([], 0)
    inside = _image_at(words, at + 1)  # "in the picture" says nothing
    return ([], 0) if inside is None else ([], inside - at)


def _image_at(words: Sequence[str], at: int) -> int | None:
    """Where ``the image`` ends if it begins at a word."""
    while at < len(words) and words[at] in _DETERMINERS:
        at += 1
    return at + 1 if at < len(words) and words[at] in _IMAGE else None


def _names_something(words: Sequence[str]) -> bool:
    """Whether a noun may follow: a relation without one is part of the noun before it, as in ``the sky above``."""
    return any(word not in _EMPTY for word in words) and not (words and _relation_at(words, 0)[0] is not None)


def _split(words: Sequence[str], pair: bool) -> Iterator[list[str]]:
    """Landmarks with ``and`` or a comma between, where an article follows; of a pair the first ``and`` will do."""
    parts: list[list[str]] = [[]]
    for at, word in enumerate(words):
        article = at + 1 < len(words) and words[at + 1] in _DETERMINERS
        if word in _AND and (article or (pair and len(parts) == 1 and word == "and" and "and" in words[at:])):
            parts.append([])
        else:
            parts[-1].append(word)
    if pair and len(parts) > 2:
        parts = [part for part in parts if any(word not in _EMPTY for word in part)]
    yield from parts


@dataclass(frozen=True)
class _Chunk:
    """What the words between two relations say."""

    thing: Thing | None
    places: tuple[Place, ...] = ()
    extremes: tuple[Extreme, ...] = ()

    @classmethod
    def of(cls, words: Sequence[str]) -> "_Chunk":
        rest: list[str] = []
        extremes: list[Extreme] = []
        kept = [word for word in words if word not in _DETERMINERS and word not in _FILLERS and word not in _AND[1:]]
        at = 0
        while at < len(kept):
            two = _EXTREMES.get(" ".join(kept[at : at + 2]))
            one = _EXTREMES.get(kept[at])
            if two is not None or one is not None:
                extremes.append(two or one)  # type: ignore[arg-type]
            else:
                rest.append(kept[at])
            at += 1 + (two is not None)
        while rest and rest[0] in ("and", "of"):
            rest.pop(0)
        while rest and rest[-1] in ("and", "of"):
            rest.pop()
        if not rest:
            return cls(None, (), tuple(extremes))
        places = [_PLACES[word] for word in rest[:-1] if word in _PLACES]
        nouns = [word for word in rest[:-1] if word not in _PLACES] + rest[-1:]
        if nouns[-1] in _TRAILING and len(nouns) > 1:
            places.append(_PLACES[nouns.pop()])
        attributes = [_attribute(word) for word in nouns[:-1]]
        words_left = [
            word
            for at, word in enumerate(nouns)
            if at == len(nouns) - 1 or (attributes[at] is None and not _joins(nouns, attributes, at))
        ]
        named = tuple(attribute for attribute in attributes if attribute is not None)
        return cls(Thing(" ".join(words_left), named), tuple(places), tuple(extremes))


def _attribute(word: str) -> Attribute | None:
    kinds = [kind for kind, words in ATTRIBUTES.items() if word in words]
    return Attribute(kinds[0], word) if kinds else None


def _joins(words: Sequence[str], attributes: Sequence[Attribute | None], at: int) -> bool:
    """Whether a word is the ``and`` of ``black and white``."""
    return words[at] == "and" and at > 0 and attributes[at - 1] is not None
