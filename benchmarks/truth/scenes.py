"""Scenes with contributions and ground truth, and the zero-shot classifier of every attribute."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import clipfast
from clipfast.analyses.ablation import ablate
from clipfast.analyses.accuracy import Accuracy
from clipfast.scenes.captions import prompts
from clipfast.scenes.drawing import render
from clipfast.scenes.evaluate import counts
from clipfast.scenes.scene import Scene, sample_scene
from clipfast.scenes.vocabulary import ATTRIBUTES, LOOKALIKES

_BATCH = 100


@dataclass
class Scenes:
    """Scenes of one split, decomposed.

    Attributes:
        model: the bundled model.
        records: description of every scene.
        contributions: contributions of the scenes, with the class token's part kept.
    """

    model: clipfast.Model
    records: list[Scene]
    contributions: clipfast.Contributions

    @classmethod
    def draw(cls, model: clipfast.Model, split: str, count: int, seed: int = 0) -> "Scenes":
        """Draws and decomposes the first ``count`` scenes of a split."""
        records = [sample_scene(seed, split, index) for index in range(count)]
        parts = []
        for start in range(0, count, _BATCH):
            pictures = [Image.fromarray(render(scene)) for scene in records[start : start + _BATCH]]
            parts.append(model.decompose(pictures, class_token=True))
        return cls(model, records, clipfast.Contributions.cat(parts))

    @cached_property
    def moments(self) -> clipfast.Moments:
        """Moments of all scenes."""
        moments = clipfast.Moments(self.model)
        moments.update(self.contributions)
        return moments

    def labelled(self, attribute: str) -> tuple[list[int], Tensor]:
        """Rows and class indices of the scenes that count for an attribute and have one value of it."""
        rows = [
            row
            for row, scene in enumerate(self.records)
            if counts(attribute, scene) and scene.value_of(attribute) is not None
        ]
        values = ATTRIBUTES[attribute]
        return rows, torch.tensor([values.index(str(self.records[row].value_of(attribute))) for row in rows])

    def accuracies(self, features: Tensor) -> dict[str, float]:
        """Zero-shot accuracy of every attribute from features ``[B, D]`` of all scenes."""
        accuracies = {}
        for attribute in ATTRIBUTES:
            rows, labels = self.labelled(attribute)
            accuracy = Accuracy(classifier(self.model, attribute))
            accuracy.update(features[rows], labels)
            accuracies[attribute] = accuracy.accuracy
        return accuracies

    def ablated(self, terms: clipfast.Terms | str, moments: clipfast.Moments) -> dict[str, float]:
        """:meth:`accuracies` with terms replaced by their mean."""
        return self.accuracies(ablate(self.contributions, terms, moments))


@cache
def classifier(model: clipfast.Model, attribute: str, values: tuple[str, ...] | None = None) -> Tensor:
    """One unit row per value of an attribute: the normalised mean of its prompts' features, ``[C, D]``."""
    texts = prompts(attribute)
    rows = [model.encode_text(texts[value]).mean(0) for value in values or ATTRIBUTES[attribute]]
    return F.normalize(torch.stack(rows), dim=1)


@dataclass(frozen=True)
class Lookalikes:
    """Two similar shapes, each on its usual background and on the other's: four groups of equal size."""

    scenes: Scenes

    def accuracy(self, features: Tensor) -> Accuracy:
        """Accuracy of flower against gear, by groups of shape and background."""
        accuracy = Accuracy(classifier(self.scenes.model, "shape", LOOKALIKES))
        shapes = [scene.objects[0].shape for scene in self.scenes.records]
        names = [f"{shape} in {scene.background}" for shape, scene in zip(shapes, self.scenes.records, strict=True)]
        labels = torch.tensor([LOOKALIKES.index(shape) for shape in shapes])
        accuracy.update(features, labels, torch.tensor([sorted(set(names)).index(name) for name in names]))
        return accuracy


Say = Callable[[str], None]


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class Bar:
    """A bar: a promised value and the measured one.

    Attributes:
        name: what is measured.
        value: the measured value.
        limit: the least promised value.
        percent: whether to print both as percentages.
    """

    name: str
    value: float
    limit: float
    percent: bool = True

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.value >= self.limit

    def cells(self) -> tuple[str, str, str]:
        """Name, measured value and bar, as table cells."""
        texts = [f"{number:.1%}" if self.percent else f"{number:.3g}" for number in (self.value, self.limit)]
        return self.name, texts[0], f"≥ {texts[1]}, {'met' if self.met else '**missed**'}"
