"""Panels: a picture, and heat maps of where in it the score of a text comes from.

``text_panel`` shows a map per text, ``heads_panel`` a map per head for one text. The patches of a map sum to the score
of its heads. All maps of a block share one scale, centred at zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipfast.report.canvas import Sheet, wrapped
from clipfast.report.palette import ACCENT, FAINT, INK, LINE, diverging, enlarged, greyed, limit, overlay
from clipfast.report.shares import MOST_TEXTS, best_texts

Maps = NDArray[np.float32]

TILE = 216
GAP = 14
MARGIN = 22
COLUMNS = 6

_TITLE = 17
_HEADER = 58
_FOOTER = 66


@dataclass(frozen=True)
class TextMaps:
    """The contents of a text panel.

    Attributes:
        title: the image's name.
        picture: as the model sees it.
        texts: ``T`` texts.
        scores: ``[T]`` cosine similarities.
        maps: ``[rows, columns, T]``.
        about: which heads the maps cover.
    """

    title: str
    picture: Image.Image
    texts: Sequence[str]
    scores: Sequence[float]
    maps: Maps
    about: str = "all heads"


@dataclass(frozen=True)
class HeadMaps:
    """The contents of a heads panel.

    Attributes:
        title: the image's name.
        picture: as the model sees it.
        text: the text.
        score: cosine similarity of image and text.
        layers: ``L`` layers of the model.
        scores: ``[L][H]``, the share of each head.
        mlps: ``[L]``, the share of the MLP of each of these layers.
        maps: ``[L, H, rows, columns]``.
    """

    title: str
    picture: Image.Image
    text: str
    score: float
    layers: Sequence[int]
    scores: Sequence[Sequence[float]]
    mlps: Sequence[float]
    maps: Maps


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """The picture resized so that its longer side has ``side`` pixels."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)


def text_panel(shown: TextMaps) -> Image.Image:
    """The picture and a map per text; with several texts a second block shows each map minus the mean over the texts.

    All texts of CLIP are similar, and so are their maps. The difference from the mean shows what distinguishes a text.
    """
    order = best_texts(shown.scores, MOST_TEXTS)
    whole = shown.maps
    blocks = [("contribution of each patch to the score of a text", whole[..., order])]
    if len(shown.texts) > 1:
        blocks.append(
            (
                "the same minus the mean over all texts",
                whole[..., order] - whole.mean(-1, keepdims=True),
            )
        )
    picture = _fitted(shown.picture, TILE)
    columns = min(COLUMNS, len(order) + 1)
    lines = -(-(len(order) + 1) // columns)
    cell = picture.height + 2 * _TITLE + 22 + GAP
    block_height = 26 + lines * cell + _FOOTER
    width = 2 * MARGIN + max(columns * (TILE + GAP) - GAP, 3 * TILE)
    sheet = Sheet(width, MARGIN + 30 + len(blocks) * block_height)
    count = len(shown.texts)
    counted = f", {len(order)} best of {count} texts" if len(order) < count else ""
    sheet.text((MARGIN, MARGIN - 6), shown.title, 20)
    sheet.text((width - MARGIN, MARGIN), f"{shown.about}{counted}", 13, FAINT, "ra")
    ground = greyed(picture)
    best = max(range(len(order)), key=lambda place: shown.scores[order[place]])
    for number, (headline, maps) in enumerate(blocks):
        top = MARGIN + 30 + number * block_height
        sheet.text((MARGIN, top), headline, 13, FAINT)
        scale = limit(maps)
        for place in range(len(order) + 1):
            x = MARGIN + place % columns * (TILE + GAP)
            y = top + 26 + place // columns * cell
            if place == 0:
                sheet.text((x, y + 2 * _TITLE + 2), "as the model sees it", 13, FAINT)
                sheet.picture((x, y + 2 * _TITLE + 22), picture)
                continue
            text = order[place - 1]
            colour = ACCENT if place - 1 == best else INK
            title = wrapped(shown.texts[text], 14, TILE, 2)
            for row, line in enumerate(title):
                sheet.text((x, y + (2 - len(title) + row) * _TITLE), line, 14, colour, part_of=shown.texts[text])
            sheet.text((x, y + 2 * _TITLE + 2), f"score {shown.scores[text]:+.3f}", 13, colour)
            heat = enlarged(maps[..., place - 1] / scale, picture.size)
            sheet.picture((x, y + 2 * _TITLE + 22), overlay(ground, heat))
        sheet.legend((MARGIN, top + 26 + lines * cell), scale)
    return sheet.image


def heads_panel(shown: HeadMaps) -> Image.Image:
    """A map per head, one row per layer, with the share of each head, layer and MLP in the score."""
    layers, heads = shown.maps.shape[:2]
    tile = int(np.clip(960 / heads, 52, 132))
    picture = _fitted(shown.picture, tile)
    large = _fitted(shown.picture, 132)
    gap, labels, bars = 5, 62, 250
    step_y = picture.height + gap + (17 if tile >= 72 else 0)
    left = MARGIN + labels
    grid_width = heads * (tile + gap) - gap
    head_of_page = MARGIN + max(large.height, 132) + 40  # the words beside it are as high as a square picture
    width = max(left + grid_width + 28 + bars + MARGIN, 640)
    sheet = Sheet(width, head_of_page + layers * step_y + MARGIN)
    sheet.picture((MARGIN, MARGIN), large)
    beside = MARGIN + large.width + 18
    sheet.text((beside, MARGIN), shown.title, 20)
    for row, line in enumerate(wrapped(shown.text, 16, width - beside - MARGIN, 2)):
        sheet.text((beside, MARGIN + 28 + row * 19), line, 16, ACCENT, part_of=shown.text)
    sheet.text(
        (beside, MARGIN + 68), f"score {shown.score:+.3f}: contribution of the patches through every head", 13, FAINT
    )
    scale = limit(shown.maps)
    sheet.legend((beside, MARGIN + 88), scale)
    ground = greyed(picture)
    for head in range(heads):
        name = f"head {head}" if tile >= 60 else str(head)
        sheet.text((left + head * (tile + gap) + picture.width / 2, head_of_page - 18), name, 12, FAINT, "ma")
    for row, layer in enumerate(shown.layers):
        y = head_of_page + row * step_y
        sheet.text((left - 10, y + picture.height / 2), f"layer {layer}", 13, INK, "rm")
        for head in range(heads):
            x = left + head * (tile + gap)
            sheet.picture((x, y), overlay(ground, enlarged(shown.maps[row, head] / scale, picture.size)))
            if tile >= 72:
                at = (x + picture.width / 2, y + picture.height + 2)
                sheet.text(at, f"{shown.scores[row][head]:+.3f}", 12, FAINT, "ma")
    sums = [sum(row) for row in shown.scores]
    _bars(sheet, (left + grid_width + 28, head_of_page), (bars, step_y, picture.height), sums, shown.mlps)
    return sheet.image


def _bars(
    sheet: Sheet,
    at: tuple[int, int],
    size: tuple[int, int, int],
    attention: Sequence[float],
    mlps: Sequence[float],
) -> None:
    """Two bars per layer, for all its heads and for its MLP, on one scale around a zero line."""
    x, y = at
    width, step, height = size
    label = 104
    middle = x + label + (width - label) / 2
    reach = max([abs(value) for value in (*attention, *mlps)], default=0.0) or 1.0
    sheet.text((x, y - 18), "per layer", 12, FAINT)
    sheet.line((middle, y), (middle, y + len(attention) * step), LINE)
    thick = min(14, height // 2 - 4)
    for row, pair in enumerate(zip(attention, mlps, strict=True)):
        centre = y + row * step + height / 2
        for kind, value, up in (("heads", pair[0], True), ("MLP", pair[1], False)):
            bar = centre - thick - 2 if up else centre + 2
            length = abs(value) / reach * (width - label) / 2
            red, green, blue = (int(level) for level in diverging(np.array(0.6 if value > 0 else -0.6)))
            start = middle if value > 0 else middle - length
            sheet.box((start, bar), (length, thick), (red, green, blue))
            sheet.text((x, bar + thick / 2), f"{kind} {value:+.3f}", 12, INK, "lm")
