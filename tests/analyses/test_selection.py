"""Choosing heads: by their texts, by contrast between groups, one after the other; against plain definitions."""

from itertools import pairwise

import pytest
import torch
from builders import directions, vision_tower
from measures import error
from tolerances import FLOAT64
from torch import Tensor

import clipfast
from clipfast import Contributions, Model, Moments, TextSpan
from clipfast.analyses.ablation import ablate
from clipfast.analyses.selection import Chosen, by_contrast, by_texts, greedy, matching, terms_of
from clipfast.analyses.terms import Terms

CLASSES = directions(3, 20, dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> Model:
    return clipfast.wrap(vision_tower(seed=3, dtype=torch.float64))


def drawn(images: int, seed: int) -> Tensor:
    return torch.randn(images, 3, 24, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def moments(model: Model) -> Moments:
    moments = Moments(model)
    moments.update(model.decompose(drawn(30, 1), class_token=True))
    return moments


@pytest.fixture(scope="module")
def contributions(model: Model) -> Contributions:
    return model.decompose(drawn(40, 2), class_token=True)


@pytest.fixture(scope="module")
def labels() -> Tensor:
    return torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def groups() -> Tensor:
    return torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(4))


# ------------------------------------------------------------------------------------------------- from their texts


def test_words_are_whole_and_case_does_not_count() -> None:
    texts = ["A photo of the SEA", "a season", "sea-side", "undersea", "Straße", "a living   room", "living in a room"]
    assert matching(texts, ["sea"]) == {0, 2}
    assert matching(texts, ["STRASSE"]) == {4}
    assert matching(texts, ["living room", "Season"]) == {1, 5}
    assert matching(texts, ["a.photo", "s(a"]) == frozenset()
    for none in ([], [" "]):
        with pytest.raises(clipfast.InputError, match="no words were given, or one is empty"):
            matching(texts, none)


def span(*picks: int) -> TextSpan:
    return TextSpan(picks, torch.zeros(len(picks)), torch.zeros(len(picks), 4), torch.zeros(4), 4, 1.0)


def test_heads_whose_first_texts_match() -> None:
    spans = {(1, 0): span(7, 8, 9, 1), (0, 1): span(8, 1, 7), (0, 0): span(1, 2, 3), (2, 0): span(7), (2, 1): span()}
    assert by_texts(spans, {7, 8, 9}, top=3) == [(1, 0, 3.0), (0, 1, 2.0), (2, 0, 1.0)]
    assert by_texts(spans, {7, 8, 9}, top=3, at_least=2) == [(1, 0, 3.0), (0, 1, 2.0)]
    assert by_texts(spans, [9, 9], top=2) == []
    assert by_texts(spans, {1}, top=4) == [(0, 0, 1.0), (0, 1, 1.0), (1, 0, 1.0)]  # equal ones by layer and head
    for wrong in ({"top": 3, "at_least": 4}, {"at_least": 0}):
        with pytest.raises(clipfast.InputError, match="at_least must be from 1 to top"):
            by_texts(spans, {1}, **wrong)


def test_chosen_heads_as_terms(moments: Moments) -> None:
    assert str(terms_of([Chosen(2, 1, 0.5), Chosen(0, 0, 0.1)], moments)) == "L0.H0, L2.H1"


# --------------------------------------------------------------------------------------------------- by contrast


def test_contrast_is_its_formula(contributions: Contributions, labels: Tensor, groups: Tensor) -> None:
    got = by_contrast(contributions, labels, groups, CLASSES)
    assert len(got) == 6
    assert all(one.score >= other.score for one, other in pairwise(got))
    for layer, head, score in got:
        outputs, spreads = contributions.head(layer, head), []
        for label in range(3):
            others = [other for other in range(3) if other != label]
            margin = outputs @ (CLASSES[label] - CLASSES[others].mean(0))
            means = [float(margin[(labels == label) & (groups == group)].mean()) for group in range(3)]
            spreads.append(max(means) - min(means))
        assert score == pytest.approx(sum(spreads) / 3, abs=FLOAT64)


def test_a_head_that_reads_the_group_stands_out(contributions: Contributions) -> None:
    """One head's codes are moved along the classifier in one of the groups of each class."""
    labels, groups = torch.arange(40) % 2, torch.arange(40) // 20
    away = CLASSES[0] - CLASSES[1]
    pushed = contributions.clone()
    values = contributions.basis.values(1)[1]  # [E, D]
    signs = (1 - 2 * labels) * (2 * groups - 1)
    pushed.codes[:, 1, 1] += 50 * signs[:, None] * (values @ away)
    assert by_contrast(pushed, labels, groups, CLASSES[:2])[0][:2] == (1, 1)
    # The same push for all images of a class tells classes apart, not groups.
    told = contributions.clone()
    told.codes[:, 1, 1] += 50 * (1 - 2 * labels)[:, None] * (values @ away)
    before = {(layer, head): score for layer, head, score in by_contrast(contributions, labels, groups, CLASSES[:2])}
    after = {(layer, head): score for layer, head, score in by_contrast(told, labels, groups, CLASSES[:2])}
    assert after == pytest.approx(before, abs=FLOAT64)


def test_a_class_in_one_group_has_no_contrast(contributions: Contributions) -> None:
    labels = torch.arange(40) % 2
    with pytest.raises(clipfast.InputError, match="no class has images in two groups"):
        by_contrast(contributions, labels, labels, CLASSES)
    with pytest.raises(clipfast.InputError, match=r"groups is torch\.float32"):
        by_contrast(contributions, labels, labels.float(), CLASSES)
    with pytest.raises(clipfast.InputError, match="there are no images to choose by"):
        by_contrast(contributions.select([]), labels[:0], labels[:0], CLASSES)


# ------------------------------------------------------------------------------------------- one after the other


def by_group(features: Tensor, labels: Tensor, groups: Tensor) -> list[float]:
    hits = ((features @ CLASSES.T).argmax(1) == labels).double()
    return [float(hits[groups == group].mean()) for group in range(3)]


@pytest.mark.parametrize("ablated", [None, "cls 1-2, L0.H0, mlp 0"])
def test_greedy_takes_the_best_head_at_every_step(
    contributions: Contributions, labels: Tensor, groups: Tensor, moments: Moments, ablated: str | None
) -> None:
    gone = Terms.parse(ablated or "nothing", contributions.basis)

    def judge(terms: Terms) -> tuple[float, float]:
        accuracies = by_group(ablate(contributions, terms, moments), labels, groups)
        return min(accuracies), sum(accuracies) / 3

    expected, best = [], judge(gone)
    while len(expected) < 4:
        left = [(layer, head) for layer in range(3) for head in range(2) if (layer, head) not in gone.heads]
        scores = [judge(gone | Terms.of(contributions.basis, heads=[pair])) for pair in left]
        if not scores or max(scores) <= best:
            break
        best = max(scores)
        pair = left[scores.index(best)]
        gone |= Terms.of(contributions.basis, heads=[pair])
        expected.append((*pair, best[0]))
    got = greedy(contributions, labels, groups, CLASSES, moments, 4, ablated=ablated)
    assert expected, "a case in which nothing helps shows nothing"
    assert [each[:2] for each in got] == [each[:2] for each in expected]
    assert error(torch.tensor([each.score for each in got]), torch.tensor([each[2] for each in expected])) <= FLOAT64
    assert got == greedy(contributions, labels, groups, CLASSES, moments, 4, ablated=ablated)


def test_greedy_among_some_heads(
    contributions: Contributions, labels: Tensor, groups: Tensor, moments: Moments
) -> None:
    some = greedy(contributions, labels, groups, CLASSES, moments, 4, heads=[(-1, 0), (0, 1)])
    assert {each[:2] for each in some} <= {(2, 0), (0, 1)}
    assert len(greedy(contributions, labels, groups, CLASSES, moments, 1)) == 1
    perfect = (contributions.total() @ CLASSES.T).argmax(1)
    assert greedy(contributions, perfect, groups, CLASSES, moments, 4) == []
    assert greedy(contributions, labels, groups, CLASSES, moments, 4, heads=[]) == []
    with pytest.raises(clipfast.InputError, match="size is 0, expected at least 1"):
        greedy(contributions, labels, groups, CLASSES, moments, 0)
    with pytest.raises(clipfast.InputError, match="head 5 does not exist"):
        greedy(contributions, labels, groups, CLASSES, moments, 1, heads=[(0, 5)])
