"""Referring segmentation: maps whose answer is known beforehand, and the bundled model on scenes."""

import math

import pytest
import torch
from torch import Tensor

import clipfast
from benchmarks.truth import referring as benchmark
from clipfast.analyses.phrases import parse
from clipfast.analyses.referring import Settings, Vocabulary, ground, regions, segment
from clipfast.errors import InputError

VOCABULARY = Vocabulary(nouns=("star", "circle", "sea"))
SIZE = (48, 48)
PLACES = {"red star": (2, 2), "blue star": (2, 9), "red circle": (9, 2), "blue circle": (9, 9)}
"""Row and column of things on a grid of 12 × 12 patches, in a sea."""


def drawn(phrase: str, things: dict[str, tuple[int, int]] = PLACES) -> tuple[Tensor, tuple[str, ...]]:
    """Maps in which a thing of 2 × 2 patches scores 1 for its own words and 0 for others."""
    texts = VOCABULARY.texts([parse(phrase)])
    maps = torch.zeros(1, 12, 12, len(texts))
    maps[..., texts.index("sea")] = 0.05
    for name, (row, column) in things.items():
        colour, noun = name.split()
        for text in (f"{colour} object", "plain object", noun):
            maps[0, row : row + 2, column : column + 2, texts.index(text)] = 1
    return maps, texts


def centre(mask: Tensor) -> tuple[float, float]:
    rows, columns = mask.nonzero().double().mean(0).tolist()
    return rows / 4, columns / 4


@pytest.mark.parametrize(
    ("phrase", "thing"),
    [
        ("the red star", "red star"),
        ("the blue circle", "blue circle"),
        ("the star left of the blue circle", "red star"),
        ("the star right of the red star", "blue star"),
        ("the blue object above the blue circle", "blue star"),
        ("the blue object below the blue star", "blue circle"),
        ("the object next to the red star and below the star", "red circle"),
        ("the red object under the red star", "red circle"),
        ("the leftmost circle", "red circle"),
        ("the rightmost red object", "red star"),
        ("the topmost blue object", "blue star"),
        ("the lowest blue object", "blue circle"),
        ("the star on the right", "blue star"),
        ("the object at the bottom left of the image", "red circle"),
    ],
)
def test_the_thing_that_a_phrase_means(phrase: str, thing: str) -> None:
    maps, texts = drawn(phrase)
    if phrase == "the rightmost red object":
        maps, texts = drawn(phrase, {**PLACES, "red star": (2, 5)})
    if phrase.startswith("the object next to"):
        maps, texts = drawn(phrase, {**PLACES, "blue circle": (9, 10), "red circle": (6, 3)})
    places = {"the rightmost red object": (2, 5), "the object next to the red star and below the star": (6, 3)}
    (found,) = ground(maps, texts, parse(phrase), SIZE, VOCABULARY)
    row, column = places.get(phrase, PLACES[thing])
    assert centre(found.mask) == pytest.approx((row + 0.875, column + 0.875), abs=0.3)
    left, top, right, bottom = found.proposals[0].box
    assert (top // 4 <= row, left // 4 <= column, bottom > 4 * row + 4, right > 4 * column + 4) == (True,) * 4
    assert found.mask[top:bottom, left:right].sum() == found.mask.sum()


def test_between_needs_both_landmarks() -> None:
    things = {"red star": (1, 1), "blue star": (9, 5), "red circle": (5, 5), "blue circle": (9, 9)}
    maps, texts = drawn("the star between the red circle and the blue circle", {**things, "green star": (7, 7)})
    phrase = parse("the star between the red circle and the blue circle")
    (found,) = ground(maps, texts, phrase, SIZE, VOCABULARY)
    assert centre(found.mask) == pytest.approx((7.875, 7.875), abs=0.8)


def test_scores_add_up_and_regions_are_apart() -> None:
    phrase = parse("the star")
    maps, texts = drawn("the star")
    (found,) = ground(maps, texts, phrase, SIZE, VOCABULARY)
    scores = [proposal.score for proposal in found.proposals]
    assert len(scores) == 4
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)  # two stars alike
    assert scores[2] == pytest.approx(scores[3], abs=1e-5)  # two circles alike
    assert torch.stack([proposal.mask for proposal in found.proposals]).sum(0).max() == 1
    assert float(found.heat.max()) == 1
    assert float(found.heat.min()) == 0


def test_likelihood_of_a_word_is_its_definition() -> None:
    """softmax of β (s − mean) / rms at its own entry, plus half the logarithm of the peak."""
    maps, texts = drawn("the red object")
    (found,) = regions(maps, texts, SIZE, VOCABULARY, Settings(sharpness=0.7))
    columns = [texts.index(text) for text in VOCABULARY.of_word("colour", "red")]
    for region in range(len(found)):
        scores = [float(found.scores[region, column]) for column in columns]
        centred = [score - sum(scores) / len(scores) for score in scores]
        rms = math.sqrt(sum(value**2 for value in centred) / len(centred))
        weights = [math.exp(0.7 * value / rms) for value in centred]
        expected = math.log(weights[0] / sum(weights)) + math.log(float(found.peaks[region])) / 2
        likelihood = float(found.likelihoods(parse("the red object").target)[region])
        assert likelihood == pytest.approx(expected, abs=1e-5)


def test_scores_of_regions_are_means_of_the_enlarged_maps() -> None:
    maps = torch.rand(1, 6, 5, len(VOCABULARY.texts([])), generator=torch.Generator().manual_seed(0))
    (found,) = regions(maps, VOCABULARY.texts([]), (30, 40), VOCABULARY, Settings(cut=0.8))
    large = torch.nn.functional.interpolate(maps.permute(0, 3, 1, 2), (30, 40), mode="bilinear")[0]
    assert len(found) > 1
    for mask, scores in zip(found.masks, found.scores, strict=False):
        weights = mask * found.salience
        torch.testing.assert_close(scores, (large * weights).sum((1, 2)) / weights.sum(), atol=1e-5, rtol=1e-4)
    outside = ~found.masks.any(0)
    torch.testing.assert_close(found.scores[-1], large[:, outside].mean(1), atol=1e-5, rtol=1e-4)


def test_an_image_where_nothing_stands_out_has_no_proposals() -> None:
    texts = VOCABULARY.texts([parse("the star")])
    (found,) = ground(torch.zeros(1, 12, 12, len(texts)), texts, parse("the star"), SIZE, VOCABULARY)
    assert found.proposals == ()
    assert not found.mask.any()
    assert not found.heat.any()


def test_bad_input_is_refused() -> None:
    maps, texts = drawn("the star")
    for call, message in (
        (lambda: ground(maps[0], texts, parse("the star"), SIZE, VOCABULARY), "expected .images, rows, columns"),
        (lambda: ground(maps, texts[1:], parse("the star"), SIZE, VOCABULARY), "expected .images, rows, columns"),
        (lambda: ground(maps, ("x", *texts[1:]), parse("the star"), SIZE, VOCABULARY), "maps has no text 'star'"),
        (lambda: ground(maps, texts, parse("the gear"), SIZE, VOCABULARY), "maps has no text 'gear'"),
        (lambda: ground(maps / 0, texts, parse("the star"), SIZE, VOCABULARY), "not finite"),
        (lambda: Vocabulary(nouns=("star",)), "nouns has fewer than two"),
        (lambda: Vocabulary(attributes={"colour": ("red",)}), "fewer than two words for 'colour'"),
        (lambda: Vocabulary(templates=("a photo",)), "templates has one without"),
        (lambda: Settings(cut=1.5), "cut is 1.5, expected a share"),
        (lambda: Settings(reach=0), "reach is 0, expected a number above 0"),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.fixture(scope="module")
def model() -> clipfast.Model:
    return clipfast.load("scenes")


@pytest.mark.slow
def test_the_bundled_model_finds_more_than_the_map_of_the_phrase(model: clipfast.Model) -> None:
    """A small version of the experiment; the bar of ten points is that of the whole one."""
    result = benchmark.experiment(model, 8, 20)
    rows = result["methods"]
    assert result["phrases"]["test"] > 40
    assert 100 * (rows[benchmark.OURS]["mean_iou"] - rows[benchmark.PLAIN]["mean_iou"]) >= 10
    assert rows[benchmark.OURS]["mean_iou"] > rows[benchmark.WITHOUT]["mean_iou"]
    assert rows[benchmark.PLAIN]["mean_iou"] > rows[benchmark.ATTENTION]["mean_iou"]


def test_segment_takes_a_model_and_a_phrase(model: clipfast.Model) -> None:
    scene = benchmark.sample_crowd(12, "test-unbiased", 0)
    picture = benchmark.Image.fromarray(benchmark.render_with_masks(scene)[0])
    found = segment(model, [picture, picture], "the leftmost object", benchmark.VOCABULARY)
    assert len(found) == 2
    torch.testing.assert_close(found[0].heat, found[1].heat, atol=1e-4, rtol=1e-3)
    assert found[0].mask.shape == model.image_size
    assert 0 < found[0].proposals[0].score <= 1
