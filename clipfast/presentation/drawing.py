"""Contributions as a picture: the direct effect of every head and MLP, and text maps where they were kept.

Drawn with Pillow, in the colours of :mod:`clipfast.report.palette`: orange raises a score, blue lowers it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from clipfast.contributions import Contributions, Scores
from clipfast.errors import InputError
from clipfast.presentation.effects import check_features, shares
from clipfast.presentation.labelled import as_numpy
from clipfast.report.canvas import Sheet, width_of, wrapped
from clipfast.report.palette import FAINT, INK, enlarged, greyed, limit, overlay
from clipfast.report.shares import MOST_TEXTS, best_texts

Values = npt.NDArray[np.float64]

MARGIN = 20
TILE = 150
COLUMNS = 4
GAP = 12
_WITH_NUMBERS = 44  # pixels of a cell from which its number fits in it
_GREY = 145.0  # as in the legend
_EMPTY = 235.0  # of a cell that adds nothing
_HEADER = 50
_FOOTER = 62


@dataclass(frozen=True)
class Effects:
    """Direct effects of the terms, for one image or averaged over images.

    Attributes:
        heads: ``[L, H]`` of the layers kept.
        mlps: ``[layers of the model]``.
        start: of the start of the residual stream.
        rest: of the attention of the layers that were not kept.
    """

    heads: Values
    mlps: Values
    start: float
    rest: float

    @classmethod
    def of(cls, scores: Scores) -> "Effects":
        """The mean over images of scores for one text."""
        start, heads, mlps, rest = (as_numpy(part)[..., 0].astype(np.float64).mean(0) for part in scores)
        return cls(heads, mlps, float(start), float(rest))

    @property
    def limit(self) -> float:
        """The value at which the palette saturates."""
        return limit(np.concatenate([self.heads.ravel(), self.mlps]))


def plot(
    contributions: Contributions,
    text_features: Tensor | None,
    text: str | None,
    image: int | None,
    picture: Image.Image | None,
) -> Image.Image:
    """See :meth:`.Contributions.plot`."""
    if not len(contributions):
        raise InputError("there are no images to plot")
    part = contributions if image is None else contributions[image]
    ends = "lowers the score", "raises it"
    if text_features is None:
        if text is not None:
            raise InputError("text names text_features: give text_features, too")
        scores = shares(part)
        headline = "what each term adds to the normalised embedding, as a share of it"
        ends = "takes away", "adds"
    else:
        scores = part.scores(check_features(text_features))
        if scores.start.shape[1] != 1:
            raise InputError(f"text_features has {scores.start.shape[1]} rows: plot shows one text, [1, embed_dim]")
        headline = "what each term adds to the score of " + ("the text" if text is None else f'"{text}"')
    if image is None:
        headline += f", mean of {len(part)} images"
    has_maps = image is not None and "maps" in part.kept
    if picture is not None and not has_maps:
        raise InputError("there are no maps to draw on the picture: decompose with texts=…, and choose an image")
    sheet = _heat(part, Effects.of(scores), headline, ends)
    return _below(sheet, _maps(part, picture)) if has_maps else sheet


def small(contributions: Contributions) -> Image.Image:
    """Shares of heads and, in the last column, MLPs, mean over images: 10 pixels per cell, a row per layer."""
    effects = Effects.of(shares(contributions))
    layers, heads = len(effects.mlps), effects.heads.shape[1]
    cells = np.zeros((layers, heads + 2))
    cells[list(contributions.layers), :heads] = effects.heads
    cells[:, -1] = effects.mlps
    colours = overlay(np.full(cells.shape, _EMPTY), np.nan_to_num(cells) / effects.limit)
    colours[:, heads] = 255
    return Image.fromarray(colours).resize((cells.shape[1] * 10, layers * 10), Image.Resampling.NEAREST)


def _heat(contributions: Contributions, effects: Effects, headline: str, ends: tuple[str, str]) -> Image.Image:
    """Layers × heads, a column of MLPs beside them, the sums of each kind and what the ends of the palette mean."""
    layers, heads = len(effects.mlps), effects.heads.shape[1]
    cell = int(np.clip(560 // heads, 16, 52))
    height = min(cell, 26)
    labels = 62
    left, top = MARGIN + labels, MARGIN + _HEADER
    mlps = left + heads * cell + GAP
    sums = [("start", effects.start), ("heads", float(effects.heads.sum())), ("MLPs", float(effects.mlps.sum()))]
    if contributions.terms[-1] == "rest":
        sums.append(("rest", effects.rest))
    total = sum(value for _, value in sums)
    line = " + ".join(f"{name} {value:.3f}" for name, value in sums) + f" = {total:.3f}"
    bottom = top + layers * height + 10
    width = max(mlps + 60 + MARGIN, 2 * MARGIN + max(width_of(line, 13), width_of(headline, 14)), 480)
    sheet = Sheet(min(width, 1200), bottom + 22 + _FOOTER)
    for row, words in enumerate(wrapped(headline, 14, sheet.image.width - 2 * MARGIN, 1)):
        sheet.text((MARGIN, MARGIN - 4 + 18 * row), words, 14, INK, part_of=headline)
    scale = effects.limit
    every = 1 if cell >= 26 else 4
    for head in range(0, heads, every):
        name = f"head {head}" if cell >= _WITH_NUMBERS else str(head)
        sheet.text((left + head * cell + cell / 2, top - 18), name, 11, FAINT, "ma")
    sheet.text((mlps + 30, top - 18), "MLP", 11, FAINT, "ma")
    is_pool = contributions.depth == "pool"
    for layer in range(layers):
        y = top + layer * height
        sheet.text((left - 10, y + height / 2), "pool" if is_pool else f"layer {layer}", 12, INK, "rm")
        cells = [(mlps, 60, float(effects.mlps[layer]))]
        if layer in contributions.layers:
            values = effects.heads[contributions.layers.index(layer)].tolist()
            cells += [(left + head * cell, cell, value) for head, value in enumerate(values)]
        for x, size, value in cells:
            colour = overlay(np.full((1, 1), _EMPTY), np.array([[np.nan_to_num(value) / scale]]))[0, 0]
            red, green, blue = (int(level) for level in colour)
            sheet.box((x, y), (size - 2, height - 2), (red, green, blue))
            if size >= _WITH_NUMBERS and height >= 18:
                ink = (255, 255, 255) if abs(value) > 0.6 * scale else INK
                sheet.text((x + size / 2 - 1, y + height / 2 - 1), _signed(value), 11, ink, "mm")
    sheet.text((MARGIN, bottom), line, 13, INK)
    sheet.legend((MARGIN, bottom + 22), scale, ends=ends)
    return sheet.image


def _maps(contributions: Contributions, picture: Image.Image | None) -> Image.Image:
    """Maps of one image, summed over the heads kept, the texts with the highest sums first where there are many."""
    maps = as_numpy(contributions.patch_maps())[0].astype(np.float64)
    totals = as_numpy(contributions.maps)[0].astype(np.float64)
    if maps.ndim == 5:
        maps, totals = maps.sum((0, 1)), totals.sum((0, 1))
    scores = totals.sum(0)  # [T]
    order = best_texts(scores.tolist(), MOST_TEXTS)
    names = contributions.texts or tuple(f"text {number}" for number in range(len(scores)))
    rows, columns = contributions.grid
    size = (TILE, round(TILE * rows / columns))
    if picture is not None:
        picture = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    ground = np.full((size[1], size[0]), _GREY) if picture is None else greyed(picture)
    scale = limit(maps[..., order])
    tiles = len(order) + (picture is not None)
    step = size[1] + 56 + GAP
    lines = -(-tiles // COLUMNS)
    sheet = Sheet(2 * MARGIN + max(min(tiles, COLUMNS) * (TILE + GAP) - GAP, 440), 24 + lines * step + _FOOTER)
    heading = "what each patch adds to the score of a text, through all heads kept"
    sheet.text((MARGIN, 0), heading, 14, INK)
    for place in range(tiles):
        x, y = MARGIN + place % COLUMNS * (TILE + GAP), 24 + place // COLUMNS * step
        if picture is not None and place == 0:
            sheet.text((x, y + 36), "the picture", 12, FAINT)
            sheet.picture((x, y + 54), picture)
            continue
        text = order[place - (picture is not None)]
        title = wrapped(names[text], 13, TILE, 2)
        for row, words in enumerate(title):
            sheet.text((x, y + 16 * (2 - len(title) + row)), words, 13, INK, part_of=names[text])
        sheet.text((x, y + 36), f"sum over tokens {_signed(scores[text])}", 12, FAINT)
        sheet.picture((x, y + 54), overlay(ground, np.nan_to_num(enlarged(maps[..., text] / scale, size))))
    sheet.legend((MARGIN, 24 + lines * step), scale)
    return sheet.image


def _signed(value: float) -> str:
    """Three decimals with a sign, and zero without one."""
    words = f"{value:+.3f}"
    return "0.000" if words in ("+0.000", "-0.000") else words


def _below(first: Image.Image, second: Image.Image) -> Image.Image:
    """Two sheets as one."""
    sheet = Sheet(max(first.width, second.width), first.height + second.height)
    sheet.picture((0, 0), first)
    sheet.picture((0, first.height), second)
    return sheet.image
