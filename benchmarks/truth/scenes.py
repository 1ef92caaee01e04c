"""Scenes with their contributions and their truth, and the zero-shot classifier of every attribute."""

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
        records: what was drawn.
        found: their contributions, with the class token's own part.
    """

    model: clipfast.Model
    records: list[Scene]
    found: clipfast.Contributions

    @classmethod
    def draw(cls, model: clipfast.Model, split: str, count: int, seed: int = 0) -> "Scenes":
        """The first scenes of a split."""
        records = [sample_scene(seed, split, index) for index in range(count)]
        parts = []
        for start in range(0, count, _BATCH):
            pictures = [Image.fromarray(render(scene)) for scene in records[start : start + _BATCH]]
            parts.append(model.decompose(pictures, class_token=True))
        return cls(model, records, clipfast.Contributions.cat(parts))

    @cached_property
    def moments(self) -> clipfast.Moments:
        """Of all of them."""
        moments = clipfast.Moments(self.model)
        moments.update(self.found)
        return moments

    def judged_by(self, attribute: str) -> tuple[list[int], Tensor]:
        """Scenes that have one value of an attribute, and its number: those that the model's own evaluation counts."""
        rows = [
            row
            for row, scene in enumerate(self.records)
            if counts(attribute, scene) and scene.value_of(attribute) is not None
        ]
        values = ATTRIBUTES[attribute]
        return rows, torch.tensor([values.index(str(self.records[row].value_of(attribute))) for row in rows])

    def accuracies(self, features: Tensor) -> dict[str, float]:
        """Zero-shot accuracy of every attribute from features ``[B, D]`` of all scenes."""
        found = {}
        for attribute in ATTRIBUTES:
            rows, labels = self.judged_by(attribute)
            accuracy = Accuracy(classifier(self.model, attribute))
            accuracy.update(features[rows], labels)
            found[attribute] = accuracy.accuracy
        return found

    def ablated(self, terms: clipfast.Terms | str, moments: clipfast.Moments) -> dict[str, float]:
        """:meth:`accuracies` with terms replaced by their mean."""
        return self.accuracies(ablate(self.found, terms, moments))


@cache
def classifier(model: clipfast.Model, attribute: str, values: tuple[str, ...] | None = None) -> Tensor:
    """A unit row per value of an attribute, the mean of its prompts' features, ``[C, D]``."""
    texts = prompts(attribute)
    rows = [model.encode_text(texts[value]).mean(0) for value in values or ATTRIBUTES[attribute]]
    return F.normalize(torch.stack(rows), dim=1)


@dataclass(frozen=True)
class Lookalikes:
    """The two shapes that differ little, on their own background and on the other's: four even groups."""

    scenes: Scenes

    def accuracy(self, features: Tensor) -> Accuracy:
        """Flower against gear, by groups of shape and background."""
        found = Accuracy(classifier(self.scenes.model, "shape", LOOKALIKES))
        shapes = [scene.objects[0].shape for scene in self.scenes.records]
        names = [f"{shape} in {scene.background}" for shape, scene in zip(shapes, self.scenes.records, strict=True)]
        labels = torch.tensor([LOOKALIKES.index(shape) for shape in shapes])
        found.update(features, labels, torch.tensor([sorted(set(names)).index(name) for name in names]))
        return found


Say = Callable[[str], None]


def mean(values: Sequence[float]) -> float:
    """Of one value or more."""
    return sum(values) / len(values)


@dataclass(frozen=True)
class Bar:
    """A promise and what was found.

    Attributes:
        name: what is promised.
        value: what was found.
        limit: the least that is promised.
        percent: whether both are shares.
    """

    name: str
    value: float
    limit: float
    percent: bool = True

    @property
    def met(self) -> bool:
        """Whether it is kept."""
        return self.value >= self.limit

    def cells(self) -> tuple[str, str, str]:
        """Name, what was found, and the promise."""
        shown = [f"{number:.1%}" if self.percent else f"{number:.3g}" for number in (self.value, self.limit)]
        return self.name, shown[0], f"≥ {shown[1]}, {'met' if self.met else '**missed**'}"
