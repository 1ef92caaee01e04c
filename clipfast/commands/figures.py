"""From the contributions of a batch to the panels of its images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clipfast.contributions import Contributions
from clipfast.files import atomic_write
from clipfast.report.panels import HeadMaps, Maps, TextMaps, heads_panel, text_panel
from clipfast.report.shares import TextShares


def _array(tensor: object) -> Maps:
    return np.asarray(tensor.detach().float().cpu())  # type: ignore[attr-defined]


def about(contributions: Contributions) -> str:
    """Which heads the maps are of, in words."""
    if len(contributions.layers) == contributions.basis.layers:
        return "all heads of all layers"
    return f"all heads of layer{'s'[: len(contributions.layers) > 1]} {', '.join(map(str, contributions.layers))}"


def draw_texts(
    title: str,
    picture: Image.Image,
    contributions: Contributions,
    row: int,
    texts: Sequence[str],
    scores: Sequence[float],
) -> Image.Image:
    """The panel of one image of a batch that has maps, with a map per text."""
    maps = contributions.patch_maps()[row]  # [rows, columns, T] or [L, H, rows, columns, T]
    summed = maps if maps.ndim == 3 else maps.sum((0, 1))
    return text_panel(TextMaps(title, picture, texts, scores, _array(summed), about(contributions)))


def draw_heads(
    title: str, picture: Image.Image, contributions: Contributions, row: int, shares: TextShares, text: int
) -> Image.Image:
    """The panel of one image with a map per head, for the text in column ``text`` of the maps."""
    maps = contributions.patch_maps()[row, ..., text]  # [L, H, rows, columns]
    mlps = [shares.mlps[layer] for layer in shares.layers]
    shown = HeadMaps(title, picture, shares.text, shares.score, shares.layers, shares.heads, mlps, _array(maps))
    return heads_panel(shown)


def write_panel(panel: Image.Image, path: Path) -> None:
    """Writes a PNG, all at once.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, durable=False) as partial:
        panel.save(partial, format="PNG", compress_level=3)
