"""Charts as PNG files: curves and a matrix."""

from collections.abc import Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipfast.commands.figures import write_panel
from clipfast.report.canvas import Sheet, shortened
from clipfast.report.palette import FAINT, INK, LINE, diverging

_COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))
"""Of Okabe and Ito: they differ for every common kind of colour blindness. Names stand at the lines, too."""
_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 56, 56
_THICK = 2


def write_curves(path: Path, title: str, axis: str, ticks: Sequence[str], lines: Mapping[str, Sequence[float]]) -> None:
    """Writes curves of shares from 0 to 1 over numbered positions.

    Args:
        path: of the PNG.
        title: above it.
        axis: below it.
        ticks: a word for every position.
        lines: values by name, each as long as ``ticks`` or shorter; more than six lines repeat colours.

    Raises:
        OSError: the file cannot be written.
    """
    sheet = Sheet(_WIDTH, _HEIGHT)
    sheet.text((_LEFT, 16), shortened(title, 18, _WIDTH - _LEFT - 20), 18, part_of=title)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place(position: int, value: float) -> tuple[float, float]:
        return (
            _LEFT + (right - _LEFT) * position / max(len(ticks) - 1, 1),
            bottom - (bottom - _TOP) * min(max(value, 0), 1),
        )

    for level in (0, 0.25, 0.5, 0.75, 1):
        _, y = place(0, level)
        sheet.line((_LEFT, y), (right, y), LINE)
        sheet.text((_LEFT - 8, y), f"{level:.0%}", 13, FAINT, "rm")
    every = max(1, len(ticks) // 12)
    for position, tick in enumerate(ticks):
        if position % every == 0 or position == len(ticks) - 1:
            sheet.text((place(position, 0)[0], bottom + 8), tick, 13, FAINT, "ma")
    sheet.text(((_LEFT + right) / 2, _HEIGHT - 22), axis, 13, INK, "ma")
    taken: list[float] = []
    for (name, values), colour in zip(lines.items(), cycle(_COLOURS), strict=False):
        points = [place(position, value) for position, value in enumerate(values)]
        for start, end in pairwise(points):
            for shift in range(_THICK):
                sheet.line((start[0], start[1] + shift), (end[0], end[1] + shift), colour)
        for x, y in points:
            sheet.box((x - 2, y - 2), (4, 4), colour)
        y = points[-1][1]
        while any(abs(y - other) < 15 for other in taken):
            y += 15
        taken.append(y)
        sheet.text((right + 10, y), shortened(name, 13, _RIGHT - 16), 13, colour, "lm", part_of=name)
    write_panel(sheet.image, path)


def write_matrix(path: Path, title: str, note: str, values: NDArray[np.floating]) -> None:
    """Writes values ``[rows, columns]`` from −1 to 1 as squares of colour, 0 white.

    Raises:
        OSError: the file cannot be written.
    """
    side = max(2, 480 // max(values.shape))
    colours = diverging(values)
    strength = np.clip(np.abs(values), 0, 1)[..., None]
    pixels = (255 * (1 - strength) + colours * strength).astype(np.uint8)
    picture = Image.fromarray(pixels).resize((values.shape[1] * side, values.shape[0] * side), Image.Resampling.NEAREST)
    sheet = Sheet(max(picture.width + 40, 520), picture.height + 90)
    sheet.text((20, 14), shortened(title, 18, sheet.image.width - 40), 18, part_of=title)
    sheet.text((20, 40), shortened(note, 13, sheet.image.width - 40), 13, FAINT, part_of=note)
    sheet.picture((20, 66), picture)
    write_panel(sheet.image, path)
