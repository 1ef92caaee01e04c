"""Top and random images per head and text: against a sort of everything, in any batches, shards and order."""

import random

import pytest
import torch
from torch import Tensor

from clipfast import InputError
from clipfast.analyses.tops import Tops

IMAGES, HEADS, TEXTS = 83, 3, 4


def scores(integers: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if integers:  # many ties
        return torch.randint(0, 6, (IMAGES, HEADS, TEXTS), generator=generator).double()
    return torch.randn(IMAGES, HEADS, TEXTS, generator=generator, dtype=torch.float64)


def collected(rows: Tensor, batch: int, tops: Tops) -> Tops:
    for start in range(0, len(rows), batch):
        tops.push(rows[start : start + batch])
    return tops


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("batch", [1, 7, IMAGES])
def test_the_best_of_all(integers: bool, batch: int) -> None:
    rows = scores(integers)
    tops = collected(rows, batch, Tops(9))
    expected = rows.sort(dim=0, descending=True, stable=True)
    assert torch.equal(tops.scores, expected.values[:9].permute(1, 2, 0))
    assert torch.equal(tops.images, expected.indices[:9].permute(1, 2, 0))
    assert tops.seen == IMAGES
    for head in range(HEADS):
        for text in range(TEXTS):
            shown = tops.best(head, text)
            assert [each.image for each in shown] == expected.indices[:9, head, text].tolist()
            assert [each.score for each in shown] == expected.values[:9, head, text].tolist()
            assert all(rows[each.image, head, text] == each.score for each in tops.sample(head, text))


def test_shards_in_any_order() -> None:
    rows, names = scores(integers=True), [f"{number}.png" for number in range(IMAGES)]
    whole = Tops(6, 8, seed=3)
    whole.push(rows, names=names)
    for seed in range(4):
        order = random.Random(seed).sample(range(IMAGES), IMAGES)
        parts = [order[first : first + 21] for first in range(0, IMAGES, 21)]
        merged = Tops(6, 8, seed=3)
        for part in parts:
            shard = Tops(6, 8, seed=3)
            shard.push(rows[part], images=part, names=[names[image] for image in part])
            merged.merge(shard)
        merged.merge(Tops(6, 8, seed=3))
        assert torch.equal(merged.images, whole.images)
        assert torch.equal(merged.scores, whole.scores)
        assert merged.seen == whole.seen
        for head in range(HEADS):
            assert merged.sample(head, 1) == whole.sample(head, 1)
            assert merged.best(head, 2) == whole.best(head, 2)


def test_names_come_back_and_only_those_shown_are_kept() -> None:
    tops = Tops(2, 3)
    rows = scores()
    for start in range(0, IMAGES, 10):
        some = range(start, min(start + 10, IMAGES))
        tops.push(rows[some.start : some.stop], names=[f"{number}.png" for number in some])
    for shown in (*tops.best(1, 1), *tops.sample(1, 1)):
        assert shown.name == f"{shown.image}.png"
    assert len(tops._names) <= HEADS * TEXTS * 2 + 3
    unnamed = Tops(1)
    unnamed.push(rows)
    assert unnamed.best(0, 0)[0].name is None


def test_fewer_images_than_asked_for() -> None:
    tops = Tops(50, 50)
    tops.push(scores()[:4])
    assert tops.images.shape == (HEADS, TEXTS, 4)
    assert sorted(shown.image for shown in tops.sample(0, 0)) == [0, 1, 2, 3]
    tops.push(scores()[4:4])
    assert tops.seen == 4


def test_the_sample_is_random_and_fair() -> None:
    """The same for a seed, another for another; over many seeds every image is drawn as often as every other."""
    drawn = [0] * 20
    samples = set()
    for seed in range(600):
        tops = Tops(1, 5, seed=seed)
        tops.push(torch.zeros(20, 1, 1))
        images = [shown.image for shown in tops.sample(0, 0)]
        assert len(set(images)) == 5
        samples.add(tuple(images))
        for image in images:
            drawn[image] += 1
    assert len(samples) > 590
    # Binomial, 600 draws of 1/4: mean 150, deviation 10.6; five of them either way.
    assert 97 <= min(drawn) <= max(drawn) <= 203
    none = Tops(1, 0)
    none.push(torch.zeros(20, 1, 1))
    assert none.sample(0, 0) == []


def test_it_keeps_copies_not_views() -> None:
    rows = scores()
    tops = Tops(3)
    tops.push(rows)
    before = (tops.scores.clone(), tops.sample(0, 0))
    rows.zero_()
    assert torch.equal(tops.scores, before[0])
    assert tops.sample(0, 0) == before[1]


def test_what_does_not_fit() -> None:
    rows = scores()
    tops = Tops(3)
    for call in (lambda: tops.best(0, 0), lambda: tops.sample(0, 0), lambda: tops.images, lambda: tops.scores):
        with pytest.raises(InputError, match="no scores were pushed yet"):
            call()
    with pytest.raises(InputError, match=r"scores have shape \[83, 3\], expected \[images, heads, texts\]"):
        tops.push(rows[..., 0])
    tops.push(rows)
    with pytest.raises(InputError, match=r"scores have shape \[83, 2, 4\], expected \[images, 3, 4\]"):
        tops.push(rows[:, :2])
    with pytest.raises(InputError, match="1 different images for 2 rows of scores"):
        tops.push(rows[:2], images=[100, 100])
    with pytest.raises(InputError, match="1 names for 2 images"):
        tops.push(rows[:2], names=["x"])
    with pytest.raises(InputError, match="a score is not finite"):
        tops.push(rows[:2] * torch.nan)
    with pytest.raises(InputError, match=r"image \d+ was pushed before"):
        tops.push(rows, images=range(IMAGES))
    with pytest.raises(InputError, match="no head 3 and text 0: there are 3 heads and 4 texts"):
        tops.best(3, 0)
    assert tops.seen == IMAGES
    assert torch.equal(tops.images, collected(rows, 20, Tops(3)).images)  # what was refused changed nothing


def test_tops_that_do_not_merge() -> None:
    tops = collected(scores(), 30, Tops(3))
    with pytest.raises(InputError, match="same count, sample size and seed"):
        tops.merge(Tops(4))
    with pytest.raises(InputError, match=r"image \d+ was pushed before"):
        tops.merge(collected(scores(), 30, Tops(3)))
    other = Tops(3)
    other.push(scores()[:, :1], images=range(100, 100 + IMAGES))
    with pytest.raises(InputError, match=r"these tops are of \[1, 4\] heads and texts"):
        tops.merge(other)
    for arguments in ((0, 3), (3, -1)):
        with pytest.raises(InputError, match="count is"):
            Tops(*arguments)
