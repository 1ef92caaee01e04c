"""Sheets of tiles: pictures side by side with a few words under each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipfast.report.canvas import Sheet, shortened, wrapped
from clipfast.report.palette import ACCENT, FAINT, INK, LINE, greyed, overlay

TILE = 168
GAP = 14
MARGIN = 20
_LINE = 17
_HEAD = 52


@dataclass(frozen=True)
class Tile:
    """One picture.

    Attributes:
        picture: of any size, None where it is gone.
        lines: what stands under it.
        marked: whether its first line is set off.
        text: what stands in place of a picture.
    """

    picture: Image.Image | None
    lines: Sequence[str]
    marked: bool = False
    text: str = "the image is gone"


def sheet(title: str, note: str, tiles: Sequence[Tile], columns: int) -> Image.Image:
    """Tiles in rows under a title."""
    lines = max((len(tile.lines) for tile in tiles), default=0)
    cell = TILE + lines * _LINE + GAP
    rows = -(-len(tiles) // columns)
    width = 2 * MARGIN + max(min(columns, len(tiles)) * (TILE + GAP) - GAP, 3 * TILE)
    drawn = Sheet(width, MARGIN + _HEAD + rows * cell + MARGIN - GAP)
    drawn.text((MARGIN, MARGIN - 6), shortened(title, 18, width - 2 * MARGIN), 18, part_of=title)
    drawn.text((MARGIN, MARGIN + 20), shortened(note, 13, width - 2 * MARGIN), 13, FAINT, part_of=note)
    for place, tile in enumerate(tiles):
        x = MARGIN + place % columns * (TILE + GAP)
        y = MARGIN + _HEAD + place // columns * cell
        if tile.picture is None:
            drawn.box((x, y), (TILE - 1, TILE - 1), LINE)
            for row, line in enumerate(wrapped(tile.text, 13, TILE - 16, 3)):
                drawn.text((x + TILE / 2, y + TILE / 2 + (row - 1) * _LINE), line, 13, INK, "ma", part_of=tile.text)
        else:
            fitted = _fitted(tile.picture)
            drawn.picture((x + (TILE - fitted.width) // 2, y + (TILE - fitted.height) // 2), fitted)
        for row, line in enumerate(tile.lines):
            colour = ACCENT if tile.marked and not row else FAINT if row else INK
            drawn.text((x, y + TILE + 4 + row * _LINE), shortened(line, 13, TILE), 13, colour, part_of=line)
    return drawn.image


def hot(picture: Image.Image, heat: NDArray[np.floating]) -> Image.Image:
    """A picture under its heat from 0 to 1, both of the same height and width."""
    return Image.fromarray(overlay(greyed(picture), heat))


def _fitted(picture: Image.Image) -> Image.Image:
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)
