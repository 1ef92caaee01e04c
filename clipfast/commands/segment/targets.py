"""What is looked for in images: classes or single texts, and what they have to stand out from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from clipfast import descriptions
from clipfast.commands import console
from clipfast.commands.options import ClassOptions
from clipfast.commands.zeroshot import Classes, read_all_templates, read_class_texts, read_classes
from clipfast.dataset.collection import Entry
from clipfast.errors import InputError
from clipfast.model import Model


@dataclass(frozen=True)
class Wanted:
    """What to look for, and against what, in words.

    Attributes:
        subjects: labels with their texts, or each text under its own name.
        labelled: whether the subjects are the labels of the images.
        others: further texts; those with one label count as one.
        contrast: whether a subject has to stand out, from ``others`` or else from all subjects.
    """

    subjects: Classes
    labelled: bool
    others: Mapping[str, Sequence[str]]
    contrast: bool

    @property
    def against(self) -> str:
        """What subjects have to stand out from, in words."""
        if not self.contrast:
            return "nothing"
        return f"the mean over {len(self.others)} background texts" if self.others else "the mean over all classes"


def read_wanted(
    entries: Sequence[Entry],
    texts: Sequence[str],
    zeroshot: ClassOptions,
    background: str | None,
    contrast: bool,
) -> Wanted:
    """What to look for in images.

    Args:
        entries: the images.
        texts: single texts, in place of classes.
        zeroshot: where the texts of the classes are.
        background: a pool's name or a file: see :func:`read_others`.
        contrast: whether subjects have to stand out.

    Raises:
        InputError: options that exclude each other, files that cannot be read, nothing to look for, or a single text
            that has nothing to stand out from.
    """
    others = {} if background is None else read_others(background)
    labelled = any(entry.label is not None for entry in entries)
    if texts:
        if zeroshot.given():
            raise InputError(
                "--texts and the texts of classes are both given: leave out --classes, --prompt and --templates"
            )
        named = tuple(dict.fromkeys(text.strip() for text in texts))
        if not all(named):
            raise InputError("one of --texts is empty")
        subjects, labelled = Classes(named, tuple((text,) for text in named)), False
    elif labelled:
        subjects = read_classes(entries, zeroshot)
    elif zeroshot.classes is not None:
        read = read_class_texts(zeroshot.classes)
        if not read:
            raise InputError(f"{zeroshot.classes} has no classes")
        subjects = Classes.of(read, read_all_templates(zeroshot))
    else:
        raise InputError("nothing to look for: give --texts, --labels with the classes of the images, or --classes")
    if contrast and not others and len(subjects.labels) < 2:
        raise InputError(
            f"{subjects.labels[0]!r} has nothing to stand out from: give another text, --background-texts or "
            "--no-contrast"
        )
    return Wanted(subjects, labelled, others, contrast)


def read_others(where: str) -> dict[str, list[str]]:
    """Texts of a pool by name, of a file with one per line, or of a CSV file with columns ``label`` and ``text``.

    Raises:
        InputError: neither a pool nor a readable file of texts.
    """
    if where in descriptions.POOLS:
        return {text: [text] for text in descriptions.pool(where)}
    file = Path(where)
    if not file.exists():
        known = ", ".join(descriptions.POOLS)
        raise InputError(f"--background-texts is {where!r}: neither a file nor one of {known}")
    if file.suffix.lower() == ".csv":
        found = read_class_texts(file)
        if not found:
            raise InputError(f"{file} has no texts")
        return found
    read = descriptions.read(file)
    for note in read.notes:
        console.warn(note)
    return {text: [text] for text in read.texts}


@dataclass(frozen=True)
class Directions:
    """What to look for, as features.

    Attributes:
        features: ``[C, D]``, a unit row per subject.
        others: ``[O, D]``, a unit row per background text.
        scale: the model's logit scale.
        contrast: whether a subject has to stand out.
    """

    features: Tensor
    others: Tensor
    scale: float
    contrast: bool

    @classmethod
    def of(cls, model: Model, wanted: Wanted) -> "Directions":
        """Encodes the texts.

        Raises:
            InputError: a text that is too long, or a model without a text encoder.
        """
        features = wanted.subjects.classifier(model)
        others = Classes.of(wanted.others).classifier(model) if wanted.others else features[:0]
        scale = float(cast(Any, model.module).logit_scale.detach().exp())
        return cls(features, others, scale, wanted.contrast)

    def single(self) -> Tensor:
        """For one subject in each image, ``[C, D]``: less the mean over the others, or over all subjects without any.

        Times the logit scale: it says how long a direction is, and one method of :mod:`clipfast.analyses.relevance`
        depends on that. All methods get these same directions.
        """
        mean = (self.others if len(self.others) else self.features).mean(0)
        return self.scale * (self.features - mean if self.contrast else self.features)

    def all_at_once(self) -> Tensor:
        """For a label per pixel, ``[C + O, D]``: subjects and others less the mean over all."""
        every = torch.cat([self.features, self.others])
        return self.scale * (every - every.mean(0) if self.contrast else every)
