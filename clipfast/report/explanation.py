"""The picture of an explanation: the choice, the groups of patches behind it, and the texts that both sides share."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clipfast.analyses.concepts import VisualConcept
from clipfast.analyses.explaining import Explanation
from clipfast.report.canvas import Sheet, printable, shortened, wrapped
from clipfast.report.palette import ACCENT, FAINT, INK, LINE, Pixels, diverging, greyed

TILE = 216
GAP = 14
MARGIN = 22
COLUMNS = 6

_LINE = 17
_CLASSES = 8
_TEXTS = 3
_BAR = 240
_UNDER = 7 * _LINE
_FADED = 0.75  # how much white covers the patches that are not in a group


def explanation_panel(title: str, picture: Image.Image, explanation: Explanation) -> Image.Image:
    """The explanation of one image.

    Args:
        title: the image's name.
        picture: as the model sees it.
        explanation: what is shown.
    """
    shown, title = _fitted(picture), printable(title)
    groups = explanation.groups()
    columns = min(COLUMNS, max(len(groups), 3))
    lines = -(-len(groups) // columns)
    cell = shown.height + _UNDER + GAP
    width = 2 * MARGIN + columns * (TILE + GAP) - GAP
    head = MARGIN + 30
    top = head + max(shown.height, (_CLASSES + 2) * _LINE) + 2 * GAP
    bottom = top + 24 + lines * cell
    rows = [*((printable(explanation.pool[concept.text]), concept.share) for concept in explanation.texts)]
    rows.append(("what they leave", explanation.unexplained))
    sheet = Sheet(width, bottom + 30 + len(rows) * (_LINE + 3) + MARGIN)
    sheet.text((MARGIN, MARGIN - 6), shortened(title, 20, width - 2 * MARGIN), 20, part_of=title)
    sheet.picture((MARGIN, head), shown)
    _classes(sheet, (MARGIN + TILE + 2 * GAP, head), width, explanation)
    sheet.text((MARGIN, top), "groups of patches that point the same way, and what each adds to the margin", 13, FAINT)
    reach = max([abs(group.score) for _, group in groups], default=0.0) or 1.0
    for place, (name, group) in enumerate(groups):
        x = MARGIN + place % columns * (TILE + GAP)
        y = top + 24 + place // columns * cell
        sheet.picture((x, y), _only(shown, group))
        _under(sheet, (x, y + shown.height + 4), name, group, explanation, reach)
    sheet.text((MARGIN, bottom), "texts near to the image and to the classes' difference", 13, FAINT)
    reach = max(abs(share) for _, share in rows) or 1.0
    middle = width - MARGIN - _BAR / 2
    for row, (text, share) in enumerate(rows):
        y = bottom + 24 + row * (_LINE + 3)
        colour = INK if row < len(rows) - 1 else FAINT
        room = round(middle - _BAR / 2 - 70 - MARGIN)
        sheet.text((MARGIN, y), shortened(text, 14, room), 14, colour, part_of=text)
        sheet.text((middle - _BAR / 2 - 10, y), f"{share:+.3f}", 13, colour, "ra")
        _bar(sheet, (middle, y + 3), share / reach * _BAR / 2, 10)
    sheet.line((middle, bottom + 22), (middle, bottom + 24 + len(rows) * (_LINE + 3)), LINE)
    return sheet.image


def _classes(sheet: Sheet, at: tuple[int, int], width: int, explanation: Explanation) -> None:
    x, y = at
    headline = printable(explanation.headline())
    for row, line in enumerate(wrapped(headline, 16, width - MARGIN - x, 2)):
        sheet.text((x, y + row * (_LINE + 2)), line, 16, ACCENT, part_of=headline)
    for row, (label, score, probability) in enumerate(explanation.class_rows()[:_CLASSES]):
        below = y + (row + 2) * _LINE + 10
        colour = INK if label in (explanation.target, explanation.rival) else FAINT
        name = printable(label)
        sheet.text((x, below), f"{score}  {probability:>6}", 13, colour)
        sheet.text((x + 110, below), shortened(name, 13, width - MARGIN - x - 110), 13, colour, part_of=name)


def _under(
    sheet: Sheet,
    at: tuple[int, int],
    name: str,
    group: VisualConcept,
    explanation: Explanation,
    reach: float,
) -> None:
    """What stands under a group: its letter and score, its heads, its texts."""
    x, y = at
    sheet.text((x, y), f"{name}  {group.score:+.3f}", 14, INK)
    _bar(sheet, (x + 150, y + 3), group.score / reach * 60, 10)
    heads = " ".join(f"L{layer}.H{head} {score:+.2f}" for layer, head, score in group.heads[:2])
    sheet.text((x, y + _LINE + 2), shortened(heads, 12, TILE), 12, FAINT)
    for row, (text, _) in enumerate(group.texts[:_TEXTS]):
        label = printable(explanation.pool[text])
        sheet.text((x, y + (row + 2) * _LINE + 4), shortened(label, 13, TILE), 13, INK, part_of=label)


def _bar(sheet: Sheet, at: tuple[float, float], length: float, thick: int) -> None:
    """A bar to the right of a point for a positive length, to the left for a negative one."""
    red, green, blue = (int(level) for level in diverging(np.array(0.6 if length > 0 else -0.6)))
    sheet.box((at[0] + min(length, 0.0), at[1]), (abs(length), thick), (red, green, blue))


def _only(picture: Image.Image, group: VisualConcept) -> Pixels:
    """The picture in the group's patches, grey and faded elsewhere."""
    mask = Image.fromarray(group.mask.numpy().astype(np.uint8) * 255)
    inside: NDArray[np.bool_] = np.asarray(mask.resize(picture.size, Image.Resampling.NEAREST)) > 0
    faded = greyed(picture) * (1 - _FADED) + 255 * _FADED
    pixels = np.where(inside[..., None], np.asarray(picture.convert("RGB"), dtype=np.float64), faded[..., None])
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def _fitted(picture: Image.Image) -> Image.Image:
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC)
