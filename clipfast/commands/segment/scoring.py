"""Scores of maps against true masks, for one class or for all classes at once; pictures where there are no masks.

Every class here takes batches of maps by method, and has the rows of a table in the end.
"""

import colorsys
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.analyses.segmentation import IGNORE, ClassScores, Scores, classes, masks, normalise
from clipfast.commands.figures import write_panel
from clipfast.commands.segment.maps import Batch
from clipfast.commands.sheets import Tile, hot, sheet
from clipfast.report.pictures import Denormalizer
from clipfast.report.shares import rounded

Threshold = float | Literal["mean"]
Maps = Mapping[str, Tensor]


def number(value: float) -> float | None:
    """A score for JSON; None where it is not finite."""
    return rounded(value) if isfinite(value) else None


@dataclass
class Panels:
    """Writes sheets of the first images.

    Attributes:
        folder: where to.
        most: how many.
        denormalizer: turns the model's input into pictures.
        written: names of the files, from the folder above.
    """

    folder: Path
    most: int
    denormalizer: Denormalizer
    written: list[str] = field(default_factory=list)

    def pending(self, batch: Batch) -> list[tuple[int, Image.Image]]:
        """Rows of a batch for which a sheet is still to be written, with their pictures."""
        count = max(self.most - len(self.written), 0)
        return list(enumerate(self.denormalizer.pictures(batch.pixels[:count]))) if count else []

    def write(self, name: str, title: str, note: str, tiles: Sequence[Tile]) -> None:
        """Writes a sheet.

        Raises:
            OSError: it cannot be written.
        """
        path = self.folder / f"{name}.png"
        write_panel(sheet(title, note, tiles, 4), path)
        self.written.append(f"{self.folder.name}/{path.name}")


# ------------------------------------------------------------------------------------------------- one class per image


class Binary:
    """Foreground against background: each image's target class, by every method.

    Args:
        methods: their names.
        threshold: of the heat.
        names: of the subjects.
        values: values in masks by name; None where all but 0 are foreground.
        size: height and width of the model's input.
        panels: gets the first images.
    """

    def __init__(
        self,
        methods: Sequence[str],
        threshold: Threshold,
        names: Sequence[str],
        values: Mapping[str, frozenset[int]] | None,
        size: tuple[int, int],
        panels: Panels,
    ) -> None:
        self.scores = {method: Scores(threshold) for method in methods}
        self._threshold: Threshold = threshold
        self._names, self._values, self._size, self._panels = names, values, size, panels

    def foreground(self, truth: Tensor, target: int) -> Tensor:
        """One image's mask as 1 and 0, and :data:`IGNORE` as it is."""
        if self._values is None:
            foreground = truth != 0
        else:
            foreground = torch.isin(truth, torch.tensor(sorted(self._values[self._names[target]])))
        return foreground.long().masked_fill(truth == IGNORE, IGNORE)

    def update(self, batch: Batch, maps: Maps, targets: Tensor) -> None:
        """Scores a batch of maps ``[B, rows, columns]`` for targets ``[B]``."""
        assert batch.truth is not None
        pairs = zip(batch.truth, targets.tolist(), strict=True)
        truth = torch.stack([self.foreground(mask, target) for mask, target in pairs])
        heats = {method: normalise(scores, self._size).cpu() for method, scores in maps.items()}
        for method, heat in heats.items():
            self.scores[method].update(heat, truth)
        for row, picture in self._panels.pending(batch):
            entry = batch.items[row][1]
            tiles = [Tile(picture, ["image"]), Tile(_truth(picture, truth[row]), ["truth"])]
            for method, heat in heats.items():
                cut = masks(heat[row : row + 1], self._threshold)[0]
                tiles.append(Tile(hot(picture, heat[row].numpy()), [method, _iou(cut, truth[row])], marked=True))
            name = self._names[int(targets[row])]
            self._panels.write(entry.name, entry.file, f"heat for {name!r}", tiles)

    @property
    def images(self) -> int:
        """Images scored."""
        return min(scores.images for scores in self.scores.values())

    def rows(self) -> list[dict[str, Any]]:
        """What the JSON says of every method."""
        return [
            {
                "method": method,
                "accuracy": number(scores.accuracy),
                "mIoU": number(scores.mean_iou),
                "mAP": number(scores.mean_ap),
                "mAP_both": number(scores.mean_ap_both),
                "images": scores.images,
            }
            for method, scores in self.scores.items()
        ]


def _iou(cut: Tensor, truth: Tensor) -> str:
    kept = truth != IGNORE
    both, either = (int(pixels[kept].sum()) for pixels in (cut & (truth == 1), cut | (truth == 1)))
    return f"IoU {both / either:.0%}" if either else "nothing there"


def _truth(picture: Image.Image, truth: Tensor) -> Image.Image:
    pixels = np.asarray(hot(picture, (truth == 1).double().numpy())).copy()
    pixels[(truth == IGNORE).numpy()] = 255
    return Image.fromarray(pixels)


# --------------------------------------------------------------------------------------------------- a label per pixel


class Multiclass:
    """A label for every pixel, by every method.

    Args:
        methods: their names.
        names: of the classes.
        values: values in masks by class.
        threshold: of the winner's heat, below which a pixel is background; None for none.
        size: height and width of the model's input.
        panels: gets the first images.

    Attributes:
        count: classes, without the background.
        with_background: whether the background is a class of its own; if not, its pixels count for nothing.
    """

    def __init__(
        self,
        methods: Sequence[str],
        names: Sequence[str],
        values: Mapping[str, frozenset[int]],
        threshold: float | None,
        background_texts: bool,
        size: tuple[int, int],
        panels: Panels,
    ) -> None:
        self.count = len(names)
        self.with_background = threshold is not None or background_texts
        self.scores = {method: ClassScores(self.count + self.with_background) for method in methods}
        self.images = 0
        self._names, self._threshold, self._size, self._panels = [*names, "background"], threshold, size, panels
        self._of = {value: index for index, name in enumerate(names) for value in values[name]}

    def unknown(self, truth: Tensor) -> list[int]:
        """Values of a mask that stand for no class; 0 is the background then."""
        known = {IGNORE, 0, *self._of}
        return [value for value in truth.unique().tolist() if value not in known]

    def update(self, batch: Batch, maps: Maps, targets: Tensor) -> None:
        """Scores a batch of maps ``[B, rows, columns, T]``; columns beyond the classes are background."""
        assert batch.truth is not None
        truth = torch.full_like(batch.truth, IGNORE)
        if self.with_background:
            truth[batch.truth == 0] = self.count
        for value, index in self._of.items():
            truth[batch.truth == value] = index
        predictions = {
            method: classes(scores, self._size, self._threshold).clamp_max(self.count).cpu()
            for method, scores in maps.items()
        }
        for method, labels in predictions.items():
            self.scores[method].update(labels, truth)
        self.images += len(truth)
        for row, picture in self._panels.pending(batch):
            entry = batch.items[row][1]
            tiles = [Tile(picture, ["image"]), self._tile("truth", truth[row])]
            tiles += [self._tile(method, labels[row]) for method, labels in predictions.items()]
            self._panels.write(entry.name, entry.file, "a label for every pixel", tiles)

    def _tile(self, name: str, labels: Tensor) -> Tile:
        """Labels in colours, the most common ones by name."""
        colours = np.array([*(_colour(index) for index in range(self.count)), (70, 74, 82), (255, 255, 255)])
        pixels = colours[labels.masked_fill(labels == IGNORE, self.count + 1).numpy()].astype(np.uint8)
        counts = torch.bincount(labels[labels != IGNORE], minlength=self.count + 1)
        common = [self._names[index] for index in counts.argsort(descending=True).tolist() if counts[index]]
        return Tile(Image.fromarray(pixels), [name, ", ".join(common[:3])], marked=name != "truth")

    def rows(self) -> list[dict[str, Any]]:
        """What the JSON says of every method."""
        return [
            {
                "method": method,
                "accuracy": number(scores.accuracy),
                "mIoU": number(scores.mean_iou),
                "images": self.images,
                "IoU": {
                    name: number(value) for name, value in zip(self._names, scores.iou.tolist(), strict=False)
                },  # the background, last of the names, may be no class
            }
            for method, scores in self.scores.items()
        ]


def _colour(index: int) -> tuple[int, int, int]:
    """Colours of which neighbours differ much: hues a golden section apart."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.75, 0.95 - 0.25 * (index % 2))
    return round(255 * red), round(255 * green), round(255 * blue)


# ------------------------------------------------------------------------------------------------------- without masks


class Drawn:
    """Heat and masks as pictures, as large as the model's input, for images without known masks.

    Args:
        out: gets ``heat/NAME/`` and ``masks/NAME/``.
        names: of the subjects.
        threshold: of the heat.
        size: height and width of the model's input.
        denormalizer: turns the model's input into pictures.

    Attributes:
        images: images drawn.
        entries: what the JSON says of every image.
    """

    def __init__(
        self, out: Path, names: Sequence[str], threshold: Threshold, size: tuple[int, int], denormalizer: Denormalizer
    ) -> None:
        self.images = 0
        self.entries: list[dict[str, Any]] = []
        self._out, self._names, self._threshold, self._size, self._denormalizer = (
            out,
            names,
            threshold,
            size,
            denormalizer,
        )

    def update(self, batch: Batch, maps: Maps, subjects: Sequence[Sequence[int]]) -> None:
        """Draws maps ``[B, rows, columns, K]`` of the ``K`` subjects that each image has.

        Raises:
            OSError: a picture cannot be written.
        """
        heats = {
            method: torch.stack([normalise(each, self._size).cpu() for each in scores.unbind(-1)], 1)
            for method, scores in maps.items()
        }  # [B, K, height, width]
        cuts = {
            method: torch.stack([masks(each, self._threshold) for each in heat.unbind(1)], 1)
            for method, heat in heats.items()
        }
        for row, picture in enumerate(self._denormalizer.pictures(batch.pixels)):
            entry = batch.items[row][1]
            drawn = []
            for place, subject in enumerate(subjects[row]):
                for method in maps:
                    name = f"{entry.name}/{subject:03}-{slug(self._names[subject])}-{method}.png"
                    write_panel(hot(picture, heats[method][row, place].numpy()), self._out / "heat" / name)
                    cut = cuts[method][row, place].numpy()
                    write_panel(Image.fromarray((255 * cut).astype(np.uint8)), self._out / "masks" / name)
                    drawn.append(
                        {
                            "text": self._names[subject],
                            "method": method,
                            "share": rounded(float(cut.mean())),
                            "heat": f"heat/{name}",
                            "mask": f"masks/{name}",
                        }
                    )
            self.entries.append({"file": entry.file, "name": entry.name, "label": entry.label, "maps": drawn})
            self.images += 1


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^0-9a-z]+", "-", text.casefold()).strip("-")[:40] or "text"
