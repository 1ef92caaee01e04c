"""Panels: their colours, and layouts for any number of texts, heads and characters."""

import numpy as np
import pytest
from builders import clip_model, directions
from PIL import Image

import clipfast
from clipfast.report.canvas import shortened, width_of, wrapped
from clipfast.report.palette import diverging, enlarged, greyed, limit, overlay
from clipfast.report.panels import HeadMaps, TextMaps, heads_panel, text_panel
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import MOST_TEXTS, best_texts, text_shares


def picture(width: int = 24, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_overlay_of_zero_is_the_picture_and_signs_have_colours() -> None:
    ground = greyed(picture())
    unchanged = overlay(ground, np.zeros((24, 24)))
    assert np.abs(unchanged - ground[..., None]).max() <= 0.5
    (below, above) = diverging(np.array([-1.0, 1.0]))
    assert below[2] > below[0]  # blue
    assert above[0] > above[2]  # orange
    raised = overlay(ground, np.full((24, 24), 1.0)).astype(int)
    assert (raised[..., 0] > raised[..., 2]).all()


def test_enlarged_keeps_constants_and_positions() -> None:
    assert np.allclose(enlarged(np.full((3, 5), 0.7), (50, 30)), 0.7, atol=1e-6)
    one = np.zeros((4, 4), dtype=np.float32)
    one[1, 2] = 1
    large = enlarged(one, (40, 40))
    row, column = np.unravel_index(large.argmax(), large.shape)
    assert (row // 10, column // 10) == (1, 2)


def test_limit() -> None:
    assert limit(np.zeros(5)) == 1.0
    assert limit(np.array([])) == 1.0
    assert limit(np.array([-2.0, np.nan, np.inf])) == pytest.approx(2.0)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_text_panels(count: int) -> None:
    rng = np.random.default_rng(count)
    texts = [f"text {number} ü\n中 {'long ' * number}" for number in range(count)]
    shown = TextMaps("a\udcffb", picture(48, 24), texts, rng.normal(size=count), rng.normal(size=(2, 4, count)))
    assert text_panel(shown).tobytes() == text_panel(shown).tobytes()


# A picture of constant grey, 100 of 255, and constant maps. The expected colours are computed by hand: the background
# is 60 + 100 · 170/255 = 126.7, under an opacity of 92 % of (170, 50, 0) at the top of the scale and (8, 48, 130) at
# the bottom.
GREY, RAISED, LOWERED, NEUTRAL = (100, 100, 100), (167, 56, 10), (17, 54, 130), (127, 127, 127)


def test_text_panel_has_the_colour_of_every_map() -> None:
    """Three texts with maps of 2, -2 and 0; their mean is 0, so the second block equals the first."""
    maps = np.stack([np.full((2, 4), value) for value in (2.0, -2.0, 0.0)], axis=-1)
    panel = text_panel(TextMaps("x", Image.new("RGB", (48, 24), GREY), ["a", "b", "c"], [0.3, 0.2, 0.1], maps))
    for middle_of_row in (134 + 54, 404 + 54):  # tiles are 216 × 108 and 230 apart
        colours = [panel.getpixel((22 + 230 * column + 108, middle_of_row)) for column in range(4)]
        assert colours == [GREY, RAISED, LOWERED, NEUTRAL]
    assert panel.getpixel((22 + 216 + 7, 188)) == (255, 255, 255)  # between two tiles


def test_text_panel_keeps_the_order_of_texts_that_all_fit() -> None:
    maps = np.stack([np.full((2, 4), value) for value in (-2.0, 2.0)], axis=-1)
    panel = text_panel(TextMaps("x", Image.new("RGB", (48, 24), GREY), ["low", "high"], [0.1, 0.3], maps))
    assert [panel.getpixel((22 + 230 * column + 108, 188)) for column in (1, 2)] == [LOWERED, RAISED]


def test_heads_panel_has_the_colour_of_every_head_and_bar() -> None:
    """Two heads with shares of 0.5 and -0.25, and an MLP with -0.5."""
    maps = np.stack([np.full((3, 3), value) for value in (4.0, -4.0)])[None]
    shown = HeadMaps("x", Image.new("RGB", (48, 24), GREY), "a", 0.2, [5], [[0.5, -0.25]], [-0.5], maps)
    panel = heads_panel(shown)
    top = 194  # below the words and the scale, which are higher than so wide a picture
    assert [panel.getpixel((84 + 137 * head + 66, top + 33)) for head in range(2)] == [RAISED, LOWERED]
    middle = 84 + 2 * 137 - 5 + 28 + 104 + 73  # the zero of the bars
    heads, mlp = top + 33 - 9, top + 33 + 9
    assert panel.getpixel((middle + 30, heads)) == (226, 122, 24)  # heads together: +0.25, half of 73 pixels
    assert panel.getpixel((middle + 45, heads)) == (255, 255, 255)
    assert panel.getpixel((middle - 60, mlp)) == (33, 104, 190)  # the MLP: -0.5, all of 73 pixels
    assert panel.getpixel((middle + 5, mlp)) == (255, 255, 255)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (6, 3), (24, 16)])
def test_heads_panels(layers: int, heads: int) -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(layers, heads)).tolist()
    maps = rng.normal(size=(layers, heads, 4, 4))
    shown = HeadMaps("x", picture(), "a dog", 0.2, range(layers), scores, [0.0] * layers, maps)
    assert heads_panel(shown).width < 2000


def test_wrapped_lines_fit() -> None:
    text = "a very long line of words that goes on"
    for lines in (1, 2, 3):
        rows = wrapped(text, 14, 100, lines)
        assert 1 <= len(rows) <= lines
        assert all(width_of(row, 14) <= 100 for row in rows)
    assert shortened("short", 14, 100) == "short"
    assert wrapped("", 14, 100, 2) == []


def test_denormalizer_restores_the_picture() -> None:
    model = clipfast.wrap(clip_model())
    original = picture()
    (restored,) = Denormalizer(model).pictures(model.prepare([original]))
    assert np.abs(np.asarray(restored, dtype=int) - np.asarray(original, dtype=int)).max() <= 1


def test_shares_sum_to_the_score() -> None:
    model = clipfast.wrap(clip_model())
    features = directions(13, model.tower.embed_dim)
    texts = [str(number) for number in range(13)]
    contributions = model.decompose(model.prepare([picture(), picture(30, 20)]), layers=[1])
    for image in text_shares(contributions, features, texts):
        assert len(image) == MOST_TEXTS
        assert [shares.score for shares in image] == sorted((shares.score for shares in image), reverse=True)
        for shares in image:
            total = shares.start + sum(shares.attention) + sum(shares.mlps) + shares.rest
            assert total == pytest.approx(shares.score, abs=1e-5)
            assert sum(shares.heads[0]) == pytest.approx(shares.attention[0], abs=1e-6)
            assert shares.top_heads(1)[0][2] == max(shares.heads[0], key=abs)
    two_texts = text_shares(contributions, features[:2], texts[:2])
    assert [shares.text for shares in two_texts[0]] == texts[:2]


def test_best_texts() -> None:
    assert best_texts([0.1, 0.3, 0.2], 2) == [1, 2]
    assert best_texts([0.1, 0.3], 2) == [0, 1]
