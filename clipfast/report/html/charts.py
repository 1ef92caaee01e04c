"""Figures as inline SVG. Colours are classes of the page's style sheet, so that they follow its light and dark theme.

A table beside each figure gives the same numbers, so nothing depends on colour or length alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from clipfast.analyses.variance import Shares
from clipfast.report.canvas import printable
from clipfast.report.html.content import Judged, Overlaps

WIDTH = 540
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 40, 46
_STYLES = ("one", "two")
_NAMES = 74  # right margin of a figure with labelled rules
_LETTER = 8.2  # width of a letter of the legend on a narrow screen


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend.
        values: at 0, 1, … of the horizontal axis.
    """

    name: str
    values: Sequence[float]


def percent(value: float, digits: int = 1) -> str:
    """``12.3 %``, with a real minus sign and no negative zero."""
    text = f"{100 * value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−") + " %"


class Drawing:
    """An SVG element.

    Args:
        height: in its own coordinates; the width is :data:`WIDTH`.
        label: text for screen readers.
    """

    def __init__(self, height: float, label: str) -> None:
        box = {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "aria-label": label, "class": "chart"}
        self.root = ElementTree.Element("svg", box)

    def _add(self, kind: str, place: dict[str, float], style: str, title: str = "") -> ElementTree.Element:
        named = {name: f"{value:.1f}" for name, value in place.items()}
        made = ElementTree.SubElement(self.root, kind, {**named, "class": style})
        if title:
            ElementTree.SubElement(made, "title").text = printable(title)
        return made

    def box(self, x: float, y: float, width: float, height: float, style: str, title: str = "") -> None:
        """Fills a rectangle."""
        self._add("rect", {"x": x, "y": y, "width": width, "height": height}, style, title)

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """Draws a line."""
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2}, style)

    def dot(self, x: float, y: float, style: str, title: str) -> None:
        """Draws a point with its value as a tooltip."""
        self._add("circle", {"cx": x, "cy": y, "r": 3.2}, style, title)

    def path(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Draws a line through points."""
        at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        ElementTree.SubElement(self.root, "polyline", {"points": at, "class": style})

    def text(self, x: float, y: float, text: str, style: str = "tick", anchor: str = "middle") -> None:
        """Draws one line of text."""
        made = self._add("text", {"x": x, "y": y}, style)
        made.set("text-anchor", anchor)
        made.text = printable(text)

    def picture(self, x: float, y: float, side: float, source: str) -> None:
        """Draws an image without smoothing."""
        self._add("image", {"x": x, "y": y, "width": side, "height": side}, "pixels").set("href", source)

    def legend(self, names: Sequence[str], styles: Sequence[str]) -> None:
        """A legend along the upper edge."""
        x = float(_LEFT)
        for name, style in zip(names, styles, strict=True):
            self.box(x, 9, 12, 12, style)
            self.text(x + 17, 19, name, "tick", "start")
            x += 17 + _LETTER * len(name) + 22

    def __str__(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode", short_empty_elements=False)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most ``low`` to at least ``high``, four to nine of them."""
    rough = max(high - low, 1e-9) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _vertical(drawing: Drawing, low: float, high: float, bottom: float, right: float) -> Callable[[float], float]:
    """Draws a vertical axis in per cent with lines to ``right``; returns the function from a value to its position."""
    marks = ticks(low, high)
    span = marks[-1] - marks[0]

    def down(value: float) -> float:
        return bottom - (value - marks[0]) / span * (bottom - _TOP)

    for mark in marks:
        drawing.line(_LEFT, down(mark), right, down(mark), "axis" if abs(mark) < 1e-12 else "grid")
        drawing.text(_LEFT - 7, down(mark) + 4, f"{100 * mark:.3g} %".replace("-", "−"), "tick", "end")
    return down


def _every(count: int, width: float) -> int:
    """The step between labels on an axis of ``count`` numbers, such that labels have room: 1, 2, 5, …"""
    fitting = (step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if count / step * 26 <= width)
    return next(fitting, max(count, 1))


def layer_shares(shares: Shares) -> str:
    """Bars of every layer's attention and MLP."""
    values = dict(zip(shares.layers, shares.attention, strict=True))
    height, bottom = 300.0, 300.0 - _BOTTOM
    drawing = Drawing(height, "Share of the embedding's variance by layer, attention and MLP")
    every = [*shares.attention, *shares.mlps]
    down = _vertical(drawing, min(0.0, *every), max(0.0, *every), bottom, WIDTH - _RIGHT)
    step = (WIDTH - _LEFT - _RIGHT) / len(shares.mlps)
    thick, labelled = min(step * 0.4, 22), _every(len(shares.mlps), WIDTH - _LEFT - _RIGHT)
    for layer, mlp in enumerate(shares.mlps):
        middle = _LEFT + (layer + 0.5) * step
        kinds = (("attention", values.get(layer), "one", -thick), ("MLP", mlp, "two", 0.0))
        for kind, value, style, off in kinds:
            if value is not None:
                top, foot = sorted((down(value), down(0)))
                text = f"layer {layer}, {kind}: {percent(value)}"
                drawing.box(middle + off, top, thick - 0.5, max(foot - top, 0.4), f"fill-{style}", text)
        if layer % labelled == 0:
            drawing.text(middle, bottom + 18, str(layer))
    drawing.text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 38, "layer", "label")
    drawing.legend(("attention", "MLP"), ("fill-one", "fill-two"))
    return str(drawing)


def curves(lines: Sequence[Line], rules: Sequence[tuple[str, float]], across: str, label: str) -> str:
    """One or two curves over integers, with horizontal rules that are labelled at the right edge."""
    height, bottom = 300.0, 300.0 - _BOTTOM
    drawing = Drawing(height, label)
    every = [value for line in lines for value in line.values] + [value for _, value in rules]
    right = WIDTH - _NAMES
    down = _vertical(drawing, 0.0, max(every), bottom, right)
    last = max(len(line.values) for line in lines) - 1
    step = (right - _LEFT - 12) / max(last, 1)
    labelled = _every(last + 1, right - _LEFT)
    for index in range(0, last + 1, labelled):
        drawing.text(_LEFT + 6 + index * step, bottom + 18, str(index))
    free = _TOP - 6.0
    for name, value in sorted(rules, key=lambda rule: -rule[1]):
        drawing.line(_LEFT, down(value), right, down(value), "rule")
        at = max(down(value) - 3, free)  # below the one above
        drawing.text(right + 6, at, name, "tick", "start")
        drawing.text(right + 6, at + 16, percent(value), "tick", "start")
        free = at + 34
    for line, style in zip(lines, _STYLES, strict=False):
        points = [(_LEFT + 6 + at * step, down(value)) for at, value in enumerate(line.values)]
        drawing.path(points, f"line-{style}")
        for at, (x, y) in enumerate(points):
            drawing.dot(x, y, f"fill-{style}", f"{line.name}, {at}: {percent(line.values[at])}")
    drawing.text((_LEFT + right) / 2, bottom + 38, across, "label")
    drawing.legend([line.name for line in lines], [f"fill-{style}" for style in _STYLES[: len(lines)]])
    return str(drawing)


def bars(rows: Sequence[Judged], rules: Sequence[tuple[str, float]], label: str) -> str:
    """A horizontal bar per row, and one for its worst group if there are groups."""
    groups = any(row.worst is not None for row in rows)
    step, thick = (54, 17) if groups else (40, 22)
    left, top = 150.0, 40.0
    bottom = top + step * len(rows)
    drawing = Drawing(bottom + 30, label)
    marks = ticks(0, max([row.accuracy for row in rows] + [value for _, value in rules]))
    wide = WIDTH - left - 62

    def along(value: float) -> float:
        return left + wide * value / marks[-1]

    for mark in marks:
        drawing.line(along(mark), top, along(mark), bottom, "grid" if mark else "axis")
        drawing.text(along(mark), bottom + 18, f"{100 * mark:.3g} %")
    for index, row in enumerate(rows):
        y = top + step * index + 8
        drawing.text(left - 10, y + (thick + 2 if groups else thick / 2 + 4), row.name, "name", "end")
        parts = [("all images", row.accuracy, "one")]
        parts += [("worst group", row.worst, "two")] if row.worst is not None else []
        for place, (kind, value, style) in enumerate(parts):
            at = y + place * (thick + 2)
            drawing.box(left, at, along(value) - left, thick, f"fill-{style}", f"{row.name}, {kind}: {percent(value)}")
            drawing.text(along(value) + 6, at + thick / 2 + 4, percent(value), "tick", "start")
    for _, value in rules:
        drawing.line(along(value), top - 4, along(value), bottom, "rule")
    names = [("all images", "fill-one"), *([("worst group", "fill-two")] if groups else [])]
    drawing.legend([name for name, _ in names], [style for _, style in names])
    for name, value in rules:
        drawing.text(WIDTH - 4, 19, f"dashed: {name}, {percent(value)}", "tick", "end")
    return str(drawing)


def overlaps(matrix: Overlaps) -> str:
    """The matrix of overlaps of all pairs of heads, with lines between layers."""
    count, side = len(matrix.heads), WIDTH - 60.0
    drawing = Drawing(side + 44, "Overlap of the outputs of every pair of heads")
    drawing.box(44, 8, side, side, "frame")
    drawing.picture(44, 8, side, matrix.picture)
    at, labelled = 0, _every(len(matrix.layers), side)
    for number, (layer, heads) in enumerate(matrix.layers):
        edge, middle = side * at / count, side * (at + heads / 2) / count
        if at:
            drawing.line(44 + edge, 8, 44 + edge, 8 + side, "grid")
            drawing.line(44, 8 + edge, 44 + side, 8 + edge, "grid")
        if number % labelled == 0:
            drawing.text(38, 8 + middle + 4, f"L{layer}", "tick", "end")
            drawing.text(44 + middle, side + 26, f"L{layer}")
        at += heads
    return str(drawing)
