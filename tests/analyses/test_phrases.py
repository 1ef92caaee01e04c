"""Phrases taken apart: what is found in them, what stays in the noun, and that no text breaks the parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfast.analyses import phrases
from clipfast.analyses.phrases import Phrase, parse
from clipfast.errors import InputError


def shown(phrase: Phrase) -> tuple[object, ...]:
    """A phrase in short: target, relations with their landmarks, places and extremes."""
    relations = [(relation.kind, *(thing.text for thing in relation.landmarks)) for relation in phrase.relations]
    return (phrase.target.text, relations, list(phrase.places), list(phrase.extremes))


@pytest.mark.parametrize(
    ("text", "target", "relations", "places", "extremes"),
    [
        (
            "the red star left of the blue circle and above the sea",
            "red star",
            [("left", "blue circle"), ("above", "sea")],
            [],
            [],
        ),
        ("The Star  to the RIGHT of a tree", "star", [("right", "tree")], [], []),
        ("the star on the left of the sea", "star", [("left", "sea")], [], []),
        ("the star on the left of the image", "star", [], ["left"], []),
        ("star on the left", "star", [], ["left"], []),
        ("the cat in the upper left corner of the photo", "cat", [], ["top", "left"], []),
        ("woman right", "woman", [], ["right"], []),
        ("top left cat", "cat", [], ["top", "left"], []),
        ("the bottle on the left wall", "bottle", [("on", "wall")], [], []),
        ("a box in the picture", "box", [], [], []),
        ("the leftmost star", "star", [], [], ["leftmost"]),
        ("the star that is furthest left", "star", [], [], ["leftmost"]),
        ("the biggest of the stars", "stars", [], [], ["largest"]),
        ("the largest", "object", [], [], ["largest"]),
        ("on the right", "object", [], ["right"], []),
        ("the circle between the red star and the sea", "circle", [("between", "red star", "sea")], [], []),
        ("the cat between dog and bird", "cat", [("between", "dog", "bird")], [], []),
        ("the cat between the dogs", "cat", [("near", "dogs")], [], []),
        ("the ring above the circle and the star", "ring", [("above", "circle", "star")], [], []),
        ("the black and white dog next to a tall tree", "black white dog", [("near", "tall tree")], [], []),
        ("fish and chips", "fish and chips", [], [], []),
        ("the man with a red hat in front of the house", "man", [("with", "red hat"), ("on", "house")], [], []),
        ("the sky above", "sky above", [], [], []),
        ("a square", "square", [], [], []),
        ("the zorbly gnarf", "zorbly gnarf", [], [], []),
        ("the star, left of the sea, below the sun.", "star", [("left", "sea"), ("below", "sun")], [], []),
    ],
)
def test_what_a_phrase_says(
    text: str, target: str, relations: list[tuple[str, ...]], places: list[str], extremes: list[str]
) -> None:
    assert shown(parse(text)) == (target, relations, places, extremes)


def test_attributes_have_kinds_and_things_are_named_once() -> None:
    phrase = parse("the small round striped red thing beside the red ball and under the red ball")
    kinds = [(attribute.kind, attribute.word) for attribute in phrase.target.attributes]
    assert kinds == [("size", "small"), ("shape", "round"), ("texture", "striped"), ("colour", "red")]
    assert phrase.target.generic
    assert [thing.text for thing in phrase.things] == ["small round striped red thing", "red ball"]
    assert not phrase.things[1].generic


@pytest.mark.parametrize("text", ["", " ", "the", "left of the circle", "?!", "the and of", "next to"])
def test_a_phrase_without_a_target_has_one_clear_line(text: str) -> None:
    if text == "next to":  # a relation to nothing is taken for a name
        assert parse(text).target.noun == "next to"
        return
    with pytest.raises(InputError, match="does not say what to find: begin with it") as error:
        parse(text)
    assert "\n" not in str(error.value)


WORDS = sorted(
    {word for templates in phrases._RELATIONS.values() for template in templates for word in template.split()}
    | set(phrases._PLACES)
    | {word for words in phrases._EXTREMES for word in words.split()}
    | {word for words in phrases.ATTRIBUTES.values() for word in words}
    | phrases._DETERMINERS
    | phrases._FILLERS
    | phrases._IMAGE
    | {"and", ",", ";", "star", "sea", "of", "that"}
)


@given(st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join))
def test_any_text_is_a_phrase_or_is_refused(text: str) -> None:
    try:
        phrase = parse(text)
    except InputError:
        return
    assert phrase.target.noun
    assert all(thing.noun and thing.text.split() for thing in phrase.things)
    assert all(len(relation.landmarks) >= (2 if relation.kind == "between" else 1) for relation in phrase.relations)
    assert parse(phrase.text) == phrase
