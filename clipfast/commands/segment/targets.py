"""What to find in images: classes or single texts, and what they have to stand out from."""

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
class Targets:
    """What to find in images, and what it has to stand out from, as texts.

    Attributes:
        subjects: labels with their texts, or each text under its own name.
        labelled: whether the subjects are the labels of the images.
        background: other texts, by label; those of one label count as one text.
        contrast: whether a subject has to stand out, from ``background`` or else from all subjects.
    """

    subjects: Classes
    labelled: bool
    background: Mapping[str, Sequence[str]]
    contrast: bool

    @property
    def against(self) -> str:
        """What subjects have to stand out from, for people to read."""
        if not self.contrast:
            return "nothing"
        return (
            f"the mean over {len(self.background)} background texts" if self.background else "the mean over all classes"
        )


def read_targets(
    entries: Sequence[Entry],
    texts: Sequence[str],
    zeroshot: ClassOptions,
    background_texts: str | None,
    contrast: bool,
) -> Targets:
    """Reads what to find in images.

    Args:
        entries: the images.
        texts: single texts, in place of classes.
        zeroshot: where the texts of the classes are.
        background_texts: a pool's name or a file: see :func:`read_background`.
        contrast: whether subjects have to stand out.

    Raises:
        InputError: options that exclude each other, files that cannot be read, nothing to look for, or a single text
            that has nothing to stand out from.
    """
    background = {} if background_texts is None else read_background(background_texts)
    labelled = any(entry.label is not None for entry in entries)
    if texts:
        if zeroshot.is_set():
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
        raise InputError("nothing to find: give --texts, --labels with the classes of the images, or --classes")
    if contrast and not background and len(subjects.labels) < 2:
        raise InputError(
            f"{subjects.labels[0]!r} has nothing to stand out from: give another text, --background-texts or "
            "--no-contrast"
        )
    return Targets(subjects, labelled, background, contrast)


def read_background(where: str) -> dict[str, list[str]]:
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
        texts = read_class_texts(file)
        if not texts:
            raise InputError(f"{file} has no texts")
        return texts
    read = descriptions.read(file)
    for note in read.notes:
        console.warn(note)
    return {text: [text] for text in read.texts}


@dataclass(frozen=True)
class Directions:
    """The targets as features.

    Attributes:
        features: ``[C, D]``, a unit row per subject.
        background: ``[O, D]``, a unit row per background text.
        scale: the model's logit scale.
        contrast: whether a subject has to stand out.
    """

    features: Tensor
    background: Tensor
    scale: float
    contrast: bool

    @classmethod
    def of(cls, model: Model, targets: Targets) -> "Directions":
        """Encodes the texts.

        Raises:
            InputError: a text that is too long, or a model without a text encoder.
        """
        features = targets.subjects.classifier(model)
        background = Classes.of(targets.background).classifier(model) if targets.background else features[:0]
        scale = float(cast(Any, model.module).logit_scale.detach().exp())
        return cls(features, background, scale, targets.contrast)

    def single(self) -> Tensor:
        """Directions for one subject in each image, ``[C, D]``.

        With ``contrast`` the mean over the background texts is subtracted, or the mean over all subjects where there
        are none. All methods get the same directions. They are multiplied by the logit scale, because one method of
        :mod:`clipfast.analyses.relevance` depends on their length.
        """
        mean = (self.background if len(self.background) else self.features).mean(0)
        return self.scale * (self.features - mean if self.contrast else self.features)

    def all_at_once(self) -> Tensor:
        """Directions for a label per pixel, ``[C + O, D]``: all features, less their mean with ``contrast``."""
        features = torch.cat([self.features, self.background])
        return self.scale * (features - features.mean(0) if self.contrast else features)
