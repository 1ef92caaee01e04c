"""Heat, masks, labels and their scores: by hand, and against slow definitions."""

import math
from typing import Any

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error
from tolerances import FLOAT64
from torch import Tensor

import clipfast
from clipfast.analyses.segmentation import (
    IGNORE,
    ClassScores,
    Scores,
    average_precision,
    classes,
    heat,
    masks,
    normalise,
    predicted,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(*values: float) -> Tensor:
    """One image of two rows that are alike, ``[1, 2, columns]``."""
    return torch.tensor([[values, values]], dtype=torch.float64)


def bilinear(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """One grid of pixels enlarged, centres of pixels in proportion, edges repeated: by loops."""
    out = torch.zeros(size, dtype=grid.dtype)
    limits = grid.shape
    for i in range(size[0]):
        for j in range(size[1]):
            spot = [(p + 0.5) * limits[axis] / size[axis] - 0.5 for axis, p in enumerate((i, j))]
            for di in (0, 1):
                for dj in (0, 1):
                    corner = [math.floor(s) + d for s, d in zip(spot, (di, dj), strict=True)]
                    weight = math.prod(1 - abs(s - c) for s, c in zip(spot, corner, strict=True))
                    inside = [min(max(c, 0), n - 1) for c, n in zip(corner, limits, strict=True)]
                    out[i, j] += weight * grid[inside[0], inside[1]]
    return out


# ------------------------------------------------------------------------------------------------- heat, masks, labels


def test_heat_by_hand() -> None:
    """Two columns become four: the middle ones lie a quarter of the way."""
    assert normalise(column(0, 4), (2, 4)).tolist() == column(0, 0.25, 0.75, 1).tolist()
    assert normalise(column(-4, 4), (2, 4)).tolist() == column(0, 0, 0.5, 1).tolist()  # −4 −2 2 4, cut at 0
    assert normalise(column(-4, 4), (2, 4), clip=False).tolist() == column(0, 0.25, 0.75, 1).tolist()
    assert normalise(column(2, 6), (2, 4)).tolist() == column(0, 0.25, 0.75, 1).tolist()  # spread from its lowest


def test_contrast_by_hand() -> None:
    """Texts (0, 4) and (2, 2): the first less the mean is (−1, 1), the second less the mean (1, −1)."""
    maps = torch.stack([column(0, 4), column(2, 2)], 3)
    assert heat(maps, 0, (2, 2)).tolist() == column(0, 1).tolist()
    assert heat(maps, 1, (2, 2)).tolist() == column(1, 0).tolist()
    assert heat(maps, 1, (2, 2), contrast=False).tolist() == column(0, 0).tolist()  # the same everywhere


@pytest.mark.parametrize("contrast", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_heat_is_its_definition(contrast: bool, clip: bool) -> None:
    maps, size = drawn(3, 2, 3, 4), (7, 12)
    targets = [2, 0, 3]
    result = heat(maps, targets, size, contrast=contrast, clip=clip)
    for image, target in enumerate(targets):
        grid = maps[image, :, :, target] - (maps[image].mean(2) if contrast else 0)
        expected = bilinear(grid, size)
        expected = expected.clamp_min(0) if clip else expected
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        assert error(result[image], expected) <= FLOAT64
    assert torch.equal(heat(maps, torch.tensor(targets), size, contrast=contrast, clip=clip), result)
    assert torch.equal(heat(maps, 0, size, contrast=contrast, clip=clip)[1], result[1])


def test_heat_of_nothing_is_nothing() -> None:
    assert normalise(torch.full((2, 3, 3), -2.0), (6, 6)).abs().max() == 0
    assert normalise(torch.zeros(0, 3, 3), (6, 6)).shape == (0, 6, 6)
    assert heat(torch.zeros(0, 3, 3, 2), 1, (6, 6)).shape == (0, 6, 6)


def test_heat_of_a_model_is_in_its_own_pictures_places() -> None:
    """From contributions: maps of patches, the predicted class, one number for every pixel of the model's input."""
    model = clipfast.wrap(vision_tower(seed=4, dtype=torch.float64, image_size=(24, 16)))
    texts, images = directions(5, 20, dtype=torch.float64), pixels(model.module, 2, dtype=torch.float64)
    contributions = model.decompose(images, texts=texts)
    target = predicted(contributions, texts)
    assert target.tolist() == (model.encode_image(images) @ texts.T).argmax(1).tolist()
    hot = heat(contributions.patch_maps(), target, model.tower.image_size)
    assert hot.shape == (2, 24, 16)
    for image in range(2):
        scores = contributions.maps[image, 1:, target[image]] - contributions.maps[image, 1:].mean(1)
        expected = bilinear(scores.view(3, 2), (24, 16)).clamp_min(0)
        assert error(hot[image], (expected - expected.min()) / (expected.max() - expected.min())) <= FLOAT64


def test_low_precision_maps_are_enlarged_in_float32() -> None:
    maps = drawn(1, 3, 3, 2).bfloat16()
    assert torch.equal(heat(maps, 0, (9, 9)), heat(maps.float(), 0, (9, 9)))


def test_masks() -> None:
    hot = torch.tensor([[[0, 0.2, 0.6, 1.0]], [[0, 0, 0, 1.0]]])  # means 0.45 and 0.25
    assert masks(hot).tolist() == [[[False, False, True, True]], [[False, False, False, True]]]
    assert masks(hot, 0.2).tolist() == [[[False, False, True, True]], [[False, False, False, True]]]
    assert masks(hot, 0).tolist() == [[[False, True, True, True]], [[False, False, False, True]]]
    assert not masks(torch.zeros(1, 2, 2)).any()


def test_classes_by_hand() -> None:
    """Enlarged (−1½ … 1½) against 0: equal nowhere, the first text left and the second right."""
    maps = torch.stack([column(0, 0), column(-2, 2)], 3)
    assert classes(maps, (2, 4)).tolist() == [[[0, 0, 1, 1]] * 2]
    # The winner less the mean is (1 ½ ½ 1), spread over the image (1 0 0 1).
    assert classes(maps, (2, 4), background=0.0).tolist() == [[[0, 2, 2, 1]] * 2]
    assert classes(maps, (2, 4), background=1.0).tolist() == [[[2, 2, 2, 2]] * 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heat(drawn(2, 3, 3), 0, (6, 6)), r"maps is torch.float64 \[2, 3, 3\], expected \[images, rows, col"),
        (lambda: heat(drawn(2, 1, 2, 3, 3, 4), 0, (6, 6)), "sum over layers and heads first"),
        (lambda: heat(drawn(2, 3, 3, 1), 0, (6, 6)), "give more texts, or no contrast"),
        (lambda: heat(drawn(2, 3, 3, 0), 0, (6, 6)), "maps has no texts"),
        (lambda: heat(drawn(2, 3, 3, 4), 4, (6, 6)), "target 4 does not exist: texts are 0 to 3"),
        (lambda: heat(drawn(2, 3, 3, 4), [0, -1], (6, 6)), "target -1 does not exist"),
        (lambda: heat(drawn(2, 3, 3, 4), [0, 1, 2], (6, 6)), r"target is torch.int64 \[3\], expected a text's index"),
        (lambda: heat(drawn(2, 3, 3, 4), torch.tensor(0.5), (6, 6)), "expected a text's index"),
        (lambda: heat(drawn(2, 3, 3, 4) / 0, 0, (6, 6)), "maps has values that are not finite, first in image 0"),
        (lambda: normalise(drawn(2, 3, 3, 4), (6, 6)), "scores is torch.float64"),
        (lambda: normalise(torch.full((1, 2, 2), math.nan), (6, 6)), "scores has values that are not finite"),
        (lambda: masks(drawn(2, 3)), "heat is torch.float64"),
        (lambda: masks(drawn(2, 3, 3), 1.5), 'threshold is 1.5, expected a heat from 0 to 1 or "mean"'),
        (lambda: masks(drawn(2, 3, 3), "median"), "threshold is 'median'"),
        (lambda: masks(drawn(2, 3, 3), math.nan), "threshold is nan"),
        (lambda: classes(drawn(2, 3, 3, 4), (6, 6), background=-1), "background is -1, expected a heat from 0 to 1$"),
        (lambda: classes(drawn(2, 3, 3, 1), (6, 6), background=0.5), "give more texts"),
    ],
)
def test_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(clipfast.InputError, match=message):
        call()


def test_texts_of_another_width() -> None:
    model = clipfast.wrap(vision_tower())
    with pytest.raises(clipfast.InputError, match=r"text_features has shape \[3, 7\], expected \[texts, 20\]"):
        predicted(model.decompose(pixels(model.module)), torch.ones(3, 7))


# --------------------------------------------------------------------------------------------------- average precision


def slow_average_precision(scores: list[float], truth: list[bool]) -> float:
    """The definition: every distinct score as a threshold, the highest first."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [right for score, right in zip(scores, truth, strict=True) if score >= threshold]
        now = sum(taken) / sum(truth)
        total += (now - recall) * sum(taken) / len(taken)
        recall = now
    return total


def test_average_precision_by_hand() -> None:
    """Recall ⅓ ⅔ 1 at precision 1 ⅔ ¾; of the two equal scores one is right, whichever stands first."""
    scores, expected = torch.tensor([0.9, 0.8, 0.8, 0.5]), 1 / 3 + 2 / 9 + 1 / 4
    assert average_precision(scores, torch.tensor([True, False, True, True])) == pytest.approx(expected, abs=FLOAT64)
    assert average_precision(scores, torch.tensor([True, True, False, True])) == pytest.approx(expected, abs=FLOAT64)
    same = torch.full((4,), 0.3)
    assert average_precision(same, torch.tensor([True, False, False, False])) == 0.25  # no ranking: the share
    assert average_precision(-scores, torch.tensor([False, False, False, True])) == 1
    assert math.isnan(average_precision(scores, torch.zeros(4, dtype=torch.bool)))


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_average_precision_is_its_definition(levels: int) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randint(levels, (60,), generator=generator) / levels
        truth = torch.rand(60, generator=generator) < 0.3
        expected = slow_average_precision(scores.tolist(), truth.tolist())
        assert average_precision(scores, truth) == pytest.approx(expected, abs=FLOAT64)


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_by_hand() -> None:
    """Two images of four pixels at threshold ½; sums over both first, ratios after."""
    hot = torch.tensor([[[1.0, 0.6, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]]])
    truth = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 1, 0]]])
    scores = Scores(0.5)
    scores.update(hot, truth)
    assert scores.pixels.confusion.tolist() == [[3, 1], [2, 2]]
    assert scores.accuracy == pytest.approx(5 / 8)
    assert scores.pixels.iou.tolist() == pytest.approx([3 / 6, 2 / 5])
    assert scores.mean_iou == pytest.approx((3 / 6 + 2 / 5) / 2)
    assert scores.mean_ap == pytest.approx((1 + (1 / 3 + 2 / 3 * 3 / 4)) / 2)  # 1, then all that is 0 at once
    # Both classes in one ranking. First image: 1 (twice background, once foreground, all right), 0.6, 0.4, 0 (thrice).
    first = 3 / 4 + 0 + 1 / 4 * 4 / 5
    # Second: 1 (one foreground right; three background, one right) and 0 (three foreground, two right; one background).
    second = 2 / 4 * 2 / 4 + 2 / 4 * 4 / 8
    assert scores.mean_ap_both == pytest.approx((first + second) / 2)
    assert (scores.images, scores.ranked) == (2, 2)


def test_scores_are_their_definition_over_batches() -> None:
    hot = normalise(drawn(6, 3, 4), (9, 8))
    truth = drawn(6, 9, 8, seed=1) > 0.4
    truth[2] = False  # an image without foreground: no average precision
    scores, halves = Scores(), [Scores(), Scores()]
    for start, half in ((0, halves[0]), (2, halves[0]), (4, halves[1])):
        half.update(hot[start : start + 2], truth[start : start + 2])
    halves[0].merge(halves[1])
    scores.update(hot, truth)
    result = torch.stack([image > image.mean() for image in hot])
    right = [float((result == truth).double().mean())]
    for expected in (False, True):
        right.append(
            float(
                ((result == expected) & (truth == expected)).sum() / ((result == expected) | (truth == expected)).sum()
            )
        )
    ap = [slow_average_precision(hot[i].flatten().tolist(), truth[i].flatten().tolist()) for i in range(6) if i != 2]
    for one in (scores, halves[0]):
        assert one.accuracy == pytest.approx(right[0], abs=1e-7)
        assert one.mean_iou == pytest.approx((right[1] + right[2]) / 2, abs=1e-7)
        assert one.mean_ap == pytest.approx(sum(ap) / 5, abs=FLOAT64)
        assert (one.images, one.ranked) == (6, 5)
    assert halves[0].mean_ap_both == pytest.approx(scores.mean_ap_both, abs=FLOAT64)


def test_perfect_heat_and_none() -> None:
    truth = drawn(2, 5, 5) > 0.3
    perfect, opposite = Scores(0.5), Scores(0.5)
    perfect.update(truth.double(), truth)
    opposite.update((~truth).double(), truth)
    assert (perfect.accuracy, perfect.mean_iou, perfect.mean_ap, perfect.mean_ap_both) == (1, 1, 1, 1)
    assert (opposite.accuracy, opposite.mean_iou) == (0, 0)


def test_ignored_pixels_count_for_nothing() -> None:
    hot, truth = normalise(drawn(1, 3, 4), (6, 8)), (drawn(1, 6, 8, seed=1) > 0).long()
    whole, left = Scores(0.4), Scores(0.4)
    truth[:, 4:] = IGNORE
    whole.update(hot, truth)
    left.update(hot[:, :4], truth[:, :4])
    assert torch.equal(whole.pixels.confusion, left.pixels.confusion)
    assert whole.mean_ap == left.mean_ap


def test_scores_before_the_first_image() -> None:
    scores = Scores()
    assert all(math.isnan(v) for v in (scores.accuracy, scores.mean_iou, scores.mean_ap, scores.mean_ap_both))


def test_class_scores_by_hand() -> None:
    """Class 3 occurs in neither; one pixel is ignored."""
    truth = torch.tensor([[[0, 0, 1, 1, 2, IGNORE]]])
    labels = torch.tensor([[[0, 1, 1, 1, 1, 3]]])
    scores, other = ClassScores(4), ClassScores(4)
    scores.update(labels, truth)
    assert scores.iou.tolist()[:3] == pytest.approx([1 / 2, 2 / 4, 0])
    assert math.isnan(scores.iou[3])
    assert scores.mean_iou == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert scores.accuracy == pytest.approx(3 / 5)
    other.update(torch.tensor([[[3]]]), torch.tensor([[[3]]]))
    scores.merge(other)
    assert scores.mean_iou == pytest.approx((1 / 2 + 1 / 2 + 0 + 1) / 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scores(2.0), "threshold is 2.0"),
        (lambda: Scores().update(torch.full((1, 2, 2), 3.0), torch.ones(1, 2, 2).bool()), "heat is not from 0 to 1"),
        (lambda: Scores().update(torch.full((1, 2, 2), math.nan), torch.ones(1, 2, 2).bool()), "heat is not from"),
        (lambda: Scores().update(torch.ones(1, 2, 2), torch.ones(1, 2, 3).bool()), r"truth \[1, 2, 3\]"),
        (lambda: Scores().update(torch.ones(1, 2, 2), torch.full((1, 2, 2), 255)), r"truth has \[255\]: expected 0 to"),
        (lambda: Scores().update(torch.ones(1, 2, 2), torch.ones(1, 2, 2)), "truth is torch.float32"),
        (lambda: Scores(0.1).merge(Scores(0.2)), "at threshold 0.2 cannot be added to scores at 0.1"),
        (lambda: ClassScores(3).merge(ClassScores(4)), "scores of 4 classes cannot be added to scores of 3"),
        (lambda: ClassScores(3, ignore=2), "3 classes with 2 to ignore"),
        (lambda: ClassScores(0), "0 classes"),
        (lambda: ClassScores(3).update(torch.full((1, 2, 2), 3), torch.ones(1, 2, 2).long()), r"labels has \[3\]"),
    ],
)
def test_scores_of_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(clipfast.InputError, match=message):
        call()


def test_a_refused_batch_leaves_no_trace() -> None:
    scores = Scores()
    with pytest.raises(clipfast.InputError):
        scores.update(torch.ones(1, 2, 2), torch.full((1, 2, 2), 7))
    assert scores.images == 0
    assert int(scores.pixels.confusion.sum()) == 0
