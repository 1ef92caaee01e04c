"""Phrases about scenes are true of their target and of nothing else, by a definition written a second time."""

import numpy as np
import pytest

from clipfast.analyses.phrases import Phrase, Thing, parse
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.referring import KINDS, expressions, sample_crowd
from clipfast.scenes.scene import Scene, SceneObject

SCENES = 60


def fits(thing: Thing, item: SceneObject) -> bool:
    return (thing.generic or thing.noun == item.shape) and all(
        getattr(item, attribute.kind) == attribute.word for attribute in thing.attributes
    )


def apart(item: SceneObject, mark: SceneObject) -> float:
    return float(np.hypot(item.x - mark.x, item.y - mark.y))


def holds(kind: str, item: SceneObject, marks: list[SceneObject], nearest: float) -> bool:
    first, last = marks[0], marks[-1]
    middle = np.hypot(item.x - (first.x + last.x) / 2, item.y - (first.y + last.y) / 2)
    return {
        "left": item.x < first.x - 2,
        "right": item.x > first.x + 2,
        "above": item.y < first.y - 2,
        "below": item.y > first.y + 2,
        "near": apart(item, first) == nearest,
        "between": bool(middle < 0.4 * apart(first, last)),
    }[kind]


def meant(phrase: Phrase, scene: Scene) -> list[int]:
    """The objects that a phrase is true of, by the positions of centres alone."""
    left = [at for at, item in enumerate(scene.objects) if fits(phrase.target, item)]
    for relation in phrase.relations:
        marks = []
        for landmark in relation.landmarks:
            (mark,) = [item for item in scene.objects if fits(landmark, item)]
            marks.append(mark)
        nearest = min(apart(scene.objects[one], marks[0]) for one in left)
        left = [one for one in left if holds(relation.kind, scene.objects[one], marks, nearest)]
    for extreme in phrase.extremes:
        values = {
            "leftmost": lambda item: -item.x,
            "rightmost": lambda item: item.x,
            "topmost": lambda item: -item.y,
            "bottommost": lambda item: item.y,
            "largest": lambda item: item.radius,
            "smallest": lambda item: -item.radius,
        }
        left = [max(left, key=lambda one: values[extreme](scene.objects[one]))]
    return left


def test_every_phrase_is_true_of_its_target_alone() -> None:
    seen: set[str] = set()
    for index in range(SCENES):
        scene = sample_crowd(3, "test-unbiased", index)
        for expression in expressions(scene, np.random.default_rng(index), most=6):
            seen.add(expression.kind)
            found = meant(parse(expression.text), scene)
            if expression.kind == "between":
                assert expression.target in found, expression.text
            else:
                assert found == [expression.target], expression.text
    assert seen == set(KINDS)


def test_crowds_repeat_and_are_apart() -> None:
    for index in range(SCENES):
        scene = sample_crowd(3, "test", index)
        masks = render_with_masks(scene)[1]
        assert 3 <= len(masks) <= 6
        assert masks.sum(0).max() == 1
        assert len({item.shape for item in scene.objects}) <= 2
        assert len({item.colour for item in scene.objects}) <= 2
    assert sample_crowd(3, "test", 5) == sample_crowd(3, "test", 5)
    assert sample_crowd(3, "test", 5) != sample_crowd(4, "test", 5)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        sample_crowd(0, "nowhere", 0)
