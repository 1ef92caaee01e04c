"""Concepts of a choice: that they sum to it, cases known beforehand, and scenes, where the truth is known."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error
from PIL import Image
from tolerances import FLOAT32, FLOAT64

import clipfast
from clipfast import Contributions, InputError, NotKept, descriptions, wrap
from clipfast.analyses.concepts import decide, text_concepts, visual_concepts
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.scene import sample_scene
from clipfast.scenes.vocabulary import SHAPES

CLASSES = directions(4, 20, dtype=torch.float64)
POOL = directions(50, 20, seed=7, dtype=torch.float64)


@pytest.fixture(scope="module")
def one() -> Contributions:
    model = wrap(vision_tower(dtype=torch.float64, image_size=40))
    return model.decompose(pixels(model.module, 1, dtype=torch.float64), tokens=True)


# ----------------------------------------------------------------------------------------------------------- the choice


def test_a_choice_is_the_difference_of_two_similarities(one: Contributions) -> None:
    cosines = CLASSES @ (one.embedding / one.norm[:, None])[0]
    order = cosines.argsort(descending=True).tolist()
    decision = decide(one, CLASSES)
    assert (decision.target, decision.rival) == (order[0], order[1])
    assert error(decision.scores, cosines) <= FLOAT64
    assert decision.margin == pytest.approx(float(cosines[order[0]] - cosines[order[1]]), abs=FLOAT64)
    assert decide(one, CLASSES, order[2]).rival == order[0]  # the most similar of the others
    held = decide(one, CLASSES, order[1], order[3])
    assert held.margin == pytest.approx(float(cosines[order[1]] - cosines[order[3]]), abs=FLOAT64)
    mean = decide(one, CLASSES, order[0], "mean")
    assert mean.rival is None
    assert mean.margin == pytest.approx(float(cosines[order[0]] - cosines[order[1:]].mean()), abs=FLOAT64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: decide(Contributions.cat([one, one]), CLASSES), "one image at a time: here are 2"),
        (lambda one: decide(one, CLASSES[:1]), "one class alone is no choice"),
        (lambda one: decide(one, CLASSES[:, 1:]), r"the classifier has shape \[4, 19\], expected \[classes, 20\]"),
        (lambda one: decide(one, CLASSES, 4), "target is 4: classes are 0 to 3"),
        (lambda one: decide(one, CLASSES, 1, 1), "class 1 is held against itself"),
        (lambda one: decide(one, CLASSES, 1, -1), "against is -1: classes are 0 to 3"),
        (lambda one: decide(one, CLASSES, 1, "worst"), "against is 'worst': choose from runner-up, mean"),
        (lambda one: decide(one, CLASSES * torch.nan), "is not finite"),
        (lambda one: visual_concepts(Contributions.cat([one, one]), CLASSES[0]), "one image at a time: here are 2"),
        (lambda one: visual_concepts(one, CLASSES), r"the direction has shape \[4, 20\], expected \[20\]"),
        (lambda one: visual_concepts(one, CLASSES[0], heads=[]), "no heads to look at"),
        (lambda one: visual_concepts(one, CLASSES[0], heads=[(3, 0)]), "layer 3 does not exist"),
        (lambda one: visual_concepts(one, CLASSES[0], count=0), "0 groups were asked for"),
        (lambda one: text_concepts(CLASSES[0], CLASSES[1, 1:], POOL), "the embedding is"),
        (lambda one: text_concepts(CLASSES[0], CLASSES[1], POOL[:1]), "two or more"),
        (lambda one: text_concepts(CLASSES[0], CLASSES[1], POOL, within=0), "within is 0, expected a share"),
    ],
)
def test_arguments_that_do_not_fit(one: Contributions, change: Callable[[Contributions], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        change(one)


# -------------------------------------------------------------------------------------------------------- text concepts


def test_texts_that_both_sides_have() -> None:
    """Axes of the space as texts: only the one that both the image and the classes have is shared."""
    axes = torch.eye(12, dtype=torch.float64)
    pool = torch.cat([axes, -axes])  # their mean is zero
    image = axes[0] + 0.5 * axes[1]
    classes = axes[0] - 0.5 * axes[2]
    (found,) = text_concepts(image, classes, pool, within=0.2)
    assert found.text == 0
    assert (found.image_rank, found.class_rank) == (0, 0)
    assert found.share == pytest.approx(1, abs=FLOAT64)  # the whole margin, ⟨image, classes⟩
    assert found.image_score == pytest.approx(1 / 1.25**0.5, abs=FLOAT64)


def test_another_word_for_the_same_is_not_counted_twice() -> None:
    axes = torch.eye(12, dtype=torch.float64)
    again = axes[0] + 0.05 * axes[5]
    pool = torch.cat([axes, -axes, again[None], -again[None]])
    image, classes = axes[0] + axes[1], axes[0] + 0.7 * axes[1]
    found = text_concepts(image, classes, pool, within=0.5)
    assert [concept.text for concept in found] == [0, 1]
    assert sum(concept.share for concept in found) == pytest.approx(float(image @ classes), abs=FLOAT64)


def test_shares_are_products_of_coordinates(one: Contributions) -> None:
    """As the definition says, by QR of the texts in the order found; what is left is orthogonal to all of them."""
    decision = decide(one, CLASSES)
    image = (one.embedding / one.norm[:, None])[0]
    found = text_concepts(image, decision.direction, POOL, within=1.0)
    assert len(found) >= 2
    texts = torch.nn.functional.normalize(POOL - POOL.mean(0), dim=1)[[concept.text for concept in found]]
    basis = torch.linalg.qr(texts.T).Q.T
    expected = (basis @ image) * (basis @ decision.direction)
    assert error(torch.tensor([concept.share for concept in found], dtype=torch.float64), expected) <= FLOAT64
    assert len(text_concepts(image, decision.direction, POOL, count=1, within=1.0)) == 1
    assert text_concepts(image, -image, POOL, within=1.0) == []  # no text lies near to both


# ------------------------------------------------------------------------------------------------------ visual concepts


@pytest.mark.parametrize("heads", [None, [(0, 1), (-1, 0), (2, 0)]])
def test_groups_and_the_rest_sum_to_the_margin(one: Contributions, heads: list[tuple[int, int]] | None) -> None:
    decision = decide(one, CLASSES)
    found = visual_concepts(one, decision.direction, POOL, 3, heads)
    assert len(found.groups) == 3
    covered = sum(group.mask.int() for group in found.groups)
    assert torch.equal(covered, torch.ones(one.grid, dtype=torch.int32))  # every patch is in one group
    assert sum(group.score for group in found.groups) + found.prefix + found.other == pytest.approx(
        decision.margin, abs=FLOAT64
    )
    chosen = None if heads is None else [(0, 1), (2, 0)]
    maps = one.text_maps(decision.direction[None], chosen)[0, :, 0]
    assert error(found.scores, maps[1:].view(one.grid)) <= FLOAT64
    assert found.prefix == pytest.approx(float(maps[0]), abs=FLOAT64)
    for group in found.groups:
        assert group.score == pytest.approx(float(found.scores[group.mask].sum()), abs=FLOAT64)
        layer, head, score = group.heads[0]
        patches = one.tokens(layer, head)[0, 1:].view(*one.grid, -1)[group.mask]
        assert score == pytest.approx(float((patches @ decision.direction).sum()), abs=FLOAT64)
        assert abs(score) == max(abs(other) for _, _, other in group.heads)
    assert [group.score for group in found.groups] == sorted((group.score for group in found.groups), reverse=True)


@pytest.mark.parametrize(
    "changes",
    [{}, {"pool_type": "avg"}, {"attentional_pool": True, "attn_pooler_heads": 2}],
    ids=lambda value: str(value),
)
def test_what_is_no_patch_is_the_sum_of_the_other_terms(changes: dict) -> None:
    """By each term's own score, in towers that pool a class token, a mean and by attention."""
    model = wrap(vision_tower(dtype=torch.float64, **changes))
    contributions = model.decompose(pixels(model.module, 1, dtype=torch.float64), tokens=True)
    direction = decide(contributions, CLASSES).direction
    scores = contributions.scores(direction[None])
    terms = scores.start.sum() + scores.mlps.sum() + scores.rest.sum()
    found = visual_concepts(contributions, direction, count=3)
    assert found.other == pytest.approx(float(terms), abs=FLOAT64)
    assert found.patches + found.prefix == pytest.approx(float(scores.heads.sum()), abs=FLOAT64)
    pair = (contributions.layers[-1], 1)
    alone = visual_concepts(contributions, direction, count=3, heads=[pair])
    own = float(scores.heads[0, -1, 1, 0])
    assert alone.other == pytest.approx(float(terms + scores.heads.sum()) - own, abs=FLOAT64)


def test_the_heat_goes_group_by_group(one: Contributions) -> None:
    found = visual_concepts(one, decide(one, CLASSES).direction, count=3)
    heat = found.heat()
    assert heat.flatten().unique().numel() == heat.numel()
    assert (float(heat.min()), float(heat.max())) == (0, 1)
    by_mean = sorted(found.groups, key=lambda group: -group.score / group.patches)
    for hotter, colder in pairwise(by_mean):
        assert float(heat[hotter.mask].min()) > float(heat[colder.mask].max())
    for group in found.groups:
        assert torch.equal(heat[group.mask].argsort(), found.scores[group.mask].argsort())


def test_what_was_not_kept_is_said(one: Contributions) -> None:
    model = wrap(vision_tower(dtype=torch.float64))
    without = model.decompose(pixels(model.module, 1, dtype=torch.float64))
    with pytest.raises(NotKept, match="tokens=True"):
        visual_concepts(without, CLASSES[0])
    some = model.decompose(pixels(model.module, 1, dtype=torch.float64), tokens=True, layers=[-1])
    found = visual_concepts(some, CLASSES[0])
    assert {layer for group in found.groups for layer, _, _ in group.heads} == {2}
    total = sum(group.score for group in found.groups) + found.prefix + found.other
    assert total == pytest.approx(float((some.embedding / some.norm[:, None])[0] @ CLASSES[0]), abs=FLOAT64)


@pytest.mark.parametrize("index", [3, 14])
def test_the_object_of_a_scene_is_a_group_that_is_named_after_it(index: int) -> None:
    model = clipfast.load("scenes")
    scene = sample_scene(0, "test-unbiased", index)
    (item,) = scene.objects
    drawn, objects = render_with_masks(scene)
    texts = list(descriptions.scene_attributes())
    pool = model.encode_text(texts)
    classifier = model.encode_text([f"a photo of a {shape}" for shape in SHAPES])
    contributions = model.decompose([Image.fromarray(drawn)], tokens=True)
    decision = decide(contributions, classifier)
    assert SHAPES[decision.target] == item.shape
    found = visual_concepts(contributions, decision.direction, pool)
    best = found.groups[0]
    there = torch.nn.functional.avg_pool2d(torch.from_numpy(objects.any(0)).float()[None], 8)[0]
    assert float(there[best.mask].mean()) > 0.5
    assert float(there[~best.mask].mean()) < 0.1
    named = " ".join(texts[text] for text, _ in best.texts)
    assert item.shape in named or item.colour in named
    image = (contributions.embedding / contributions.norm[:, None])[0]
    (first, *_) = text_concepts(image, decision.direction, pool)
    assert item.shape in texts[first.text]
    assert best.score > 0.5 * decision.margin
    total = sum(group.score for group in found.groups) + found.prefix + found.other
    assert total == pytest.approx(decision.margin, abs=FLOAT32)
