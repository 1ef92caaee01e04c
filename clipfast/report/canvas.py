"""A sheet to draw on: pictures, labels and the legend of the palette."""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clipfast.report.palette import FAINT, INK, LINE, PAPER, Pixels, overlay

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Colour = tuple[int, int, int]

_WIDER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")


@lru_cache(maxsize=64)
def font(size: int, plain: bool = True) -> Font:
    """Pillow's own font, the same on every machine, or a system font for characters beyond ASCII."""
    if not plain:
        for name in _WIDER_FONTS:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)


def _font_for(text: str, size: int) -> Font:
    return font(size, plain=text.isascii())


def width_of(text: str, size: int) -> int:
    """Width of a line in pixels."""
    return round(_font_for(text, size).getlength(text))


def shortened(text: str, size: int, width: int) -> str:
    """A line cut with an ellipsis to fit ``width`` pixels."""
    if width_of(text, size) <= width:
        return text
    while text and width_of(text + "...", size) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def wrapped(text: str, size: int, width: int, lines: int) -> list[str]:
    """A text wrapped between words into at most ``lines`` lines of ``width`` pixels; the last line is truncated."""
    rows: list[str] = []
    words = text.split()
    while words and len(rows) < lines - 1:
        row = words.pop(0)
        while words and width_of(f"{row} {words[0]}", size) <= width:
            row += " " + words.pop(0)
        rows.append(shortened(row, size, width))
    if words:
        rows.append(shortened(" ".join(words), size, width))
    return rows


def printable(text: str) -> str:
    """A text without characters that no font can draw: control characters and undecodable bytes of file names."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else " " for letter in clean)


class Sheet:
    """A white sheet of ``width × height`` pixels; positions are (x to the right, y down) of the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self,
        at: tuple[float, float],
        text: str,
        size: int = 14,
        colour: Colour = INK,
        anchor: str = "la",
        part_of: str = "",
    ) -> None:
        """Draws one line; ``anchor`` as in Pillow (``la``: upper left, ``mm``: middle).

        A line that is ``part_of`` a longer text uses the font of that text.
        """
        clean = printable(text)
        self._draw.text(at, clean, fill=colour, font=_font_for(clean + part_of, size), anchor=anchor)

    def picture(self, at: tuple[int, int], pixels: Pixels | Image.Image) -> None:
        """Draws a picture."""
        self.image.paste(pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels), at)

    def box(self, at: tuple[float, float], size: tuple[float, float], fill: Colour) -> None:
        """Fills a rectangle of ``size`` (width, height)."""
        x, y = at
        self._draw.rectangle((x, y, x + size[0], y + size[1]), fill=fill)

    def line(self, start: tuple[float, float], end: tuple[float, float], colour: Colour = LINE) -> None:
        """Draws a thin line."""
        self._draw.line((*start, *end), fill=colour)

    def legend(
        self,
        at: tuple[int, int],
        top: float,
        width: int = 220,
        ends: tuple[str, str] = ("lowers the score", "raises it"),
    ) -> None:
        """The palette from ``-top`` to ``top`` on medium grey, with labels at its ends."""
        x, y = at
        values = np.broadcast_to(np.linspace(-1, 1, width), (12, width))
        self.text((x, y), ends[0], 12, FAINT)
        self.text((x + width, y), ends[1], 12, FAINT, "ra")
        self.picture((x, y + 17), overlay(np.full((12, width), 145.0), values))
        for value, place, anchor in ((-top, x, "la"), (0.0, x + width / 2, "ma"), (top, x + width, "ra")):
            self.text((place, y + 33), f"{value:+.2g}" if value else "0", 12, FAINT, anchor)
