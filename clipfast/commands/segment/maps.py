"""Maps of patches for a batch of images, by the decomposition and by the methods that it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipfast.analyses.relevance import METHODS as OTHERS
from clipfast.commands.segment.images import Item
from clipfast.contributions import Contributions
from clipfast.errors import InputError
from clipfast.model import Model

OURS = "ours"
METHODS = (OURS, *OTHERS)
TEXTLESS = ("attention", "rollout")
"""Methods that take no text."""


@dataclass(frozen=True)
class Batch:
    """Images with their contributions.

    Attributes:
        items: the images.
        pixels: ``[B, 3, height, width]``, preprocessed.
        contributions: theirs, with maps for all directions.
        truth: labels of their pixels as their masks have them, ``[B, height, width]``; None without masks.
    """

    items: Sequence[Item]
    pixels: Tensor
    contributions: Contributions
    truth: Tensor | None

    def select(self, rows: Sequence[int]) -> "Batch":
        """Some of the images."""
        if list(rows) == list(range(len(self.items))):
            return self
        truth = None if self.truth is None else self.truth[list(rows)]
        items = [self.items[row] for row in rows]
        return replace(
            self,
            items=items,
            pixels=self.pixels[list(rows)],
            contributions=self.contributions.select(rows),
            truth=truth,
        )


def decompose_batch(model: Model, items: Sequence[Item], pixels: Tensor, directions: Tensor) -> Batch:
    """Decomposes prepared images ``[B, 3, height, width]`` with maps for directions ``[T, D]``."""
    pixels = model.prepare(pixels)
    return Batch(items, pixels, model.decompose(pixels, texts=directions), None)


def maps_of_one(method: str, model: Model, batch: Batch, directions: Tensor, targets: Tensor) -> Tensor:
    """Scores of patches for one direction in each image, ``[B, rows, columns]``; for ``targets`` ``[B]``."""
    if method == OURS:
        maps = batch.contributions.patch_maps()
        return maps[torch.arange(len(maps), device=maps.device), :, :, targets.to(maps.device)]
    return OTHERS[method](model.tower, batch.pixels, directions[targets.to(directions.device)])


def maps_of_all(method: str, model: Model, batch: Batch, directions: Tensor) -> Tensor:
    """Scores of patches for all directions, ``[B, rows, columns, T]``."""
    if method == OURS:
        return batch.contributions.patch_maps()
    if method in TEXTLESS:
        return OTHERS[method](model.tower, batch.pixels, directions[0])[..., None].expand(-1, -1, -1, len(directions))
    return torch.stack([OTHERS[method](model.tower, batch.pixels, each) for each in directions], -1)


def not_finite(maps: Mapping[str, Tensor]) -> dict[int, str]:
    """Rows of a batch in which a method's scores are not finite, with that method."""
    methods: dict[int, str] = {}
    for method, scores in maps.items():
        for row in (~scores.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist():
            methods.setdefault(row, method)
    return methods


def parse_methods(text: str | None, multiclass: bool, default: Sequence[str]) -> tuple[str, ...]:
    """Names of methods with commas between, in the order of :data:`METHODS`; the default for None.

    Raises:
        InputError: no such method, or one that takes no text where every pixel gets a label.
    """
    if text is None:
        return tuple(default)
    names = {name.strip().casefold() for name in text.split(",") if name.strip()}
    wrong = sorted(names - set(METHODS))
    if wrong or not names:
        raise InputError(f"--methods is {text!r}: choose from {', '.join(METHODS)}, with commas between")
    if multiclass and names & set(TEXTLESS):
        textless = ", ".join(name for name in TEXTLESS if name in names)
        raise InputError(f"--multiclass needs methods that take texts: leave out {textless}")
    return tuple(name for name in METHODS if name in names)
