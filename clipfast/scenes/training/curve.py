"""Plots the log of the training as SVG."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import Final

from clipfast.files import write_text

_WIDTH: Final = 760
_PANEL: Final = 220
_LEFT: Final = 50
_RIGHT: Final = 130
_GAP: Final = 44
_INKS: Final = ("#1f6fb4", "#d9541e", "#2a9d4b", "#8a4fbf", "#c2185b", "#00838f", "#8d6e63", "#616161", "#f2a900")
_LOSS_NAMES: Final = ("whole", "dense", "pairs", "prompts")
_ACCURACY_NAMES: Final = (
    "shape", "colour", "texture", "position", "count", "background", "lookalike_average", "lookalike_worst",
)  # fmt: skip

Series = list[tuple[float, float]]


def write_curve(log: Path, path: Path) -> None:
    """Plot losses and held-out accuracies over the samples, from the CSV log to an SVG file."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"{log}: the log has no lines")
    losses = {name: _series(rows, name) for name in _LOSS_NAMES}
    accuracies = {name: _series(rows, name) for name in _ACCURACY_NAMES}
    last = float(rows[-1]["samples"])
    starts = [float(b["samples"]) for a, b in pairwise(rows) if a["stage"] != b["stage"]]
    top = max((y for series in losses.values() for _, y in series), default=1.0)
    height = 2 * (_PANEL + _GAP) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        *_panel("training loss", losses, 30, last, top, starts),
        *_panel("accuracy on held-out scenes", accuracies, 30 + _PANEL + _GAP, last, 1.0, starts),
        "</svg>",
    ]
    write_text(path, "\n".join(parts) + "\n")


def _series(rows: list[dict[str, str]], name: str) -> Series:
    """(samples, value) of a column, without empty and NaN values."""
    points = [(float(row["samples"]), float(row[name])) for row in rows if row.get(name)]
    return [(x, y) for x, y in points if y == y]


def _panel(
    title: str, lines: dict[str, Series], top: float, last: float, high: float, starts: list[float]
) -> list[str]:
    wide = _WIDTH - _LEFT - _RIGHT
    high = high or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + wide * x / max(last, 1.0), top + _PANEL * (1 - y / high)

    parts = [f'<text x="{_LEFT}" y="{top - 8:.0f}" font-size="13">{title}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = at(share * last, share * high)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_LEFT + wide}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * high:.2f}</text>')
        label = f"{share * last / 1000:.0f}k"
        parts.append(f'<text x="{x:.1f}" y="{top + _PANEL + 15:.0f}" text-anchor="middle">{label}</text>')
    for start in starts:
        x, _ = at(start, 0)
        parts.append(f'<path d="M{x:.1f} {top}v{_PANEL}" stroke="#999999" stroke-dasharray="3 3"/>')
    plotted = {name: series for name, series in lines.items() if series}
    for index, (name, series) in enumerate(plotted.items()):
        ink = _INKS[index % len(_INKS)]
        points = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in series)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="1.6"/>')
        label = name.replace("_", " ")
        parts.append(f'<text x="{_LEFT + wide + 8}" y="{top + 12 + 16 * index:.0f}" fill="{ink}">{label}</text>')
    return parts
