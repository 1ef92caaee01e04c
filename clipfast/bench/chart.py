"""A result file as an SVG bar chart of images per second relative to the plain forward.

The document is the only input. Every bar has a label beside it, so colours carry no information of their own; they are
those of Okabe and Ito, which differ for every common kind of colour blindness.
"""

import math
import textwrap
from collections.abc import Callable, Sequence
from itertools import groupby
from xml.etree import ElementTree

from clipfast.bench.document import Document, Factor, Row, provenance, rows
from clipfast.report.palette import FAINT, INK, LINE, PAPER

_COLOURS = {
    "plain": "#7a7a7a",
    "heads": "#0072b2",
    "attention": "#56b4e9",
    "maps": "#009e73",
    "tokens": "#e69f00",
    "plain compiled": "#cc79a7",
    "naive heads": "#d55e00",
    "naive tokens": "#d55e00",
}
_OTHER = "#000000"
_WIDTH, _LEFT, _RIGHT, _TOP = 960, 130, 180, 92
_FACTORS, _SPEEDS = _WIDTH - 100, _WIDTH - 20
"""Right edges of the columns of numbers."""
_BAR, _STEP, _CASE, _GAP = 14, 20, 26, 14
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _clean(text: str) -> str:
    """Text without the characters that XML cannot represent."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _ticks(top: float) -> list[float]:
    """Round numbers from 0 to at least ``top``, five to ten of them."""
    rough = top / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough)
    return [index * step for index in range(math.ceil(top / step) + 1)]


class _Drawing:
    """An SVG document under construction."""

    def __init__(self, height: float, label: str) -> None:
        size = {"width": str(_WIDTH), "height": f"{height:g}", "viewBox": f"0 0 {_WIDTH} {height:g}"}
        root = {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "font-family": _FONT, "font-size": "12"}
        self.root = ElementTree.Element("svg", {**root, **size})
        ElementTree.SubElement(self.root, "title").text = label
        self.box(0, 0, _WIDTH, height, _hex(PAPER))

    def box(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
        ElementTree.SubElement(self.root, "rect", {**place, "fill": fill})

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, dash: str | None = None) -> None:
        ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}", "stroke": stroke}
        ElementTree.SubElement(self.root, "line", {**ends, **({"stroke-dasharray": dash} if dash else {})})

    def text(self, x: float, y: float, caption: str, anchor: str = "start", **style: str) -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": _hex(INK)}
        named = {key.replace("_", "-"): value for key, value in style.items()}
        ElementTree.SubElement(self.root, "text", {**place, **named}).text = _clean(caption)


def svg(document: Document) -> str:
    """The chart of a result file."""
    measured = rows(document)
    cases = [(case, list(group)) for case, group in groupby(measured, lambda row: row.case)]
    factors = [factor for row in measured if (factor := row.against.get("plain"))]
    ticks = _ticks(max([1.0, *(max(factor.median, factor.q90) for factor in factors)]))
    wide = _WIDTH - _LEFT - _RIGHT

    def across(value: float) -> float:
        return _LEFT + wide * value / ticks[-1]

    bottom = _TOP + sum(_CASE + _STEP * len(group) + _GAP for _, group in cases)
    drawing = _Drawing(bottom + 56, "Images per second relative to the plain forward")
    drawing.text(16, 26, "Images per second relative to the plain forward", font_size="17", font_weight="600")
    for index, line in enumerate(textwrap.wrap(provenance(document), 150)[:2]):
        drawing.text(16, 46 + 15 * index, line, font_size="11", fill=_hex(FAINT))
    drawing.text(_FACTORS, _TOP - 10, "× plain", "end", fill=_hex(FAINT))
    drawing.text(_SPEEDS, _TOP - 10, "images/s", "end", fill=_hex(FAINT))
    _axis(drawing, ticks, [across(tick) for tick in ticks], bottom)
    y: float = _TOP
    for case, group in cases:
        drawing.text(16, y + 14, case, font_weight="600")
        y += _CASE
        for row in group:
            _bar(drawing, row, y, across(0), across)
            y += _STEP
        y += _GAP
    drawing.line(across(1), _TOP - 6, across(1), bottom, _hex(INK), "4 3")
    ElementTree.indent(drawing.root)
    return ElementTree.tostring(drawing.root, encoding="unicode", xml_declaration=False) + "\n"


def _axis(drawing: _Drawing, ticks: Sequence[float], places: Sequence[float], bottom: float) -> None:
    for tick, x in zip(ticks, places, strict=True):
        drawing.line(x, _TOP - 6, x, bottom, _hex(LINE))
        drawing.text(x, bottom + 18, f"{tick:g}", "middle")
    middle = (places[0] + places[-1]) / 2
    caption = (
        "times as fast as the plain forward (dashed); median of the pairs, whiskers from the 10 % to the 90 % quantile"
    )
    drawing.text(middle, bottom + 40, caption, "middle", fill=_hex(FAINT))


def _bar(drawing: _Drawing, row: Row, y: float, left: float, across: Callable[[float], float]) -> None:
    middle = y + _BAR / 2
    drawing.text(left - 8, middle + 4, row.output, "end")
    factor = row.against.get("plain")
    if factor is None or row.images_per_second is None:
        caption = textwrap.shorten(f"not measured: {row.failed}", 110, placeholder=" …")
        drawing.text(left + 6, middle + 4, caption, fill=_hex(FAINT), font_style="italic")
        return
    drawing.box(left, y, across(factor.median) - left, _BAR, _COLOURS.get(row.output, _OTHER))
    _whisker(drawing, factor, middle, across)
    drawing.text(_FACTORS, middle + 4, f"{factor.median:.3g}", "end")
    drawing.text(_SPEEDS, middle + 4, f"{row.images_per_second:.4g}", "end")


def _whisker(drawing: _Drawing, factor: Factor, y: float, across: Callable[[float], float]) -> None:
    low, high, ink = across(factor.q10), across(factor.q90), _hex(INK)
    drawing.line(low, y, high, y, ink)
    for x in (low, high):
        drawing.line(x, y - 3, x, y + 3, ink)
