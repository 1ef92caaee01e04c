"""Zero-shot classification: the texts that stand for each label, and the classifier made of their features."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.ablation import Batch
from clipfast.commands.options import ClassOptions
from clipfast.commands.tables import read_rows
from clipfast.commands.text_features import encode_texts
from clipfast.dataset.collection import Collection, Entry
from clipfast.descriptions.templates import check_template, fill, read_templates
from clipfast.errors import InputError
from clipfast.model import Model

PROMPT = "a photo of a {}."


@dataclass(frozen=True)
class Classes:
    """Labels, sorted, with the texts that stand for each.

    Attributes:
        labels: as they are in the data.
        texts: for each label at least one.
    """

    labels: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, names: Mapping[str, Sequence[str]], templates: Sequence[str] = ()) -> Self:
        """Classes from names by label: every name is put into every template, or is a text itself without templates."""
        texts = names
        if templates:
            texts = {
                label: list(dict.fromkeys(fill(template, name) for name in some for template in templates))
                for label, some in names.items()
            }
        return cls(tuple(texts), tuple(map(tuple, texts.values())))

    def classifier(self, model: Model) -> Tensor:
        """A unit row per label: the mean of the unit features of its texts, normalised, ``[C, D]``.

        Raises:
            InputError: a text that is too long, or a model without a text encoder.
        """
        texts = [text for some in self.texts for text in some]
        features = encode_texts(model, texts).split([len(some) for some in self.texts])
        return torch.stack([F.normalize(rows.mean(0), dim=0) for rows in features])

    def index(self, entries: Sequence[Entry]) -> Tensor:
        """Classes of labelled images, ``[B]``."""
        return torch.tensor([self.labels.index(str(entry.label)) for entry in entries], dtype=torch.long)


def read_classes(entries: Sequence[Entry], options: ClassOptions) -> Classes:
    """The classes of labelled images.

    The names of a class are the texts that ``--classes`` has for its label, or else the label itself with ``_`` as a
    space. Each of its names is put into each template. Without templates the texts of ``--classes`` are taken as they
    are, and a label is put into ``a photo of a {}.``

    Args:
        entries: the images; those without a label do not count.
        options: where names and templates come from.

    Raises:
        InputError: no labels, fewer than two classes, a label without texts, or a template without ``{}``.
    """
    labels = sorted({entry.label for entry in entries if entry.label is not None})
    if not labels:
        raise InputError("the images have no labels: give --labels folder, --labels shard or --labels FILE.csv")
    templates = read_all_templates(options)
    if options.classes is None:
        names = {label: [label.replace("_", " ")] for label in labels}
        templates = templates or (PROMPT,)
    else:
        names = read_class_texts(options.classes)
        lacking = [label for label in labels if label not in names]
        if lacking:
            known = ", ".join(list(names)[:10])
            raise InputError(f"{options.classes} has no text for the label {lacking[0]!r}: it has {known}")
    if len(names) < 2:
        raise InputError(f"all images have the label {labels[0]!r}: zero-shot accuracy needs two classes or more")
    return Classes.of(names, templates)


def read_all_templates(options: ClassOptions) -> tuple[str, ...]:
    """The templates of ``--prompt`` and ``--templates`` together, each once; none where neither is given.

    Raises:
        InputError: a template without exactly one ``{}``, or a set that does not exist.
    """
    templates = [check_template(template, "--prompt") for template in options.prompt]
    for name in options.templates:
        templates += read_templates(name)
    return tuple(dict.fromkeys(templates))


def read_class_texts(file: Path) -> dict[str, list[str]]:
    """The texts of every label of a CSV file with columns ``label`` and ``text``, labels sorted.

    Raises:
        InputError: a file that cannot be read, lacks a column, or has an empty label or text.
    """
    texts: dict[str, list[str]] = {}
    for place, row in read_rows(file, ("label", "text"), "classes"):
        if not row["label"] or not row["text"]:
            raise InputError(f"{place}: a label or a text is empty")
        texts.setdefault(row["label"], []).append(row["text"])
    return dict(sorted(texts.items()))


@dataclass(frozen=True)
class Groups:
    """Groups of images, sorted, as numbers.

    Attributes:
        names: as they are in the data; empty where images have none.
    """

    names: tuple[str, ...]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Groups":
        """Groups that labelled images have; every one or none must."""
        labels = [entry for entry in entries if entry.label is not None]
        names = sorted({entry.group for entry in labels if entry.group is not None})
        lacking = [entry.file for entry in labels if entry.group is None]
        if names and lacking:
            raise InputError(f"{len(lacking)} labelled images have no group, {lacking[0]} the first: give each one")
        return cls(tuple(names))

    def index(self, entries: Sequence[Entry]) -> Tensor | None:
        """Groups of images, ``[B]``; None where there are none."""
        if not self.names:
            return None
        return torch.tensor([self.names.index(str(entry.group)) for entry in entries], dtype=torch.long)


def labelled_batches(collection: Collection, classes: Classes, groups: Groups) -> Iterator[Batch]:
    """The labelled images of a collection, a file at a time, as the analyses take them.

    Raises:
        InputError: only moments were kept, or a file is gone or damaged.
    """
    for entries, contributions in collection.batches():
        rows = [row for row, entry in enumerate(entries) if entry.label is not None]
        if rows:
            kept = [entries[row] for row in rows]
            part = contributions if len(rows) == len(entries) else contributions.select(rows)
            numbers = groups.index(kept)
            yield (part, classes.index(kept)) if numbers is None else (part, classes.index(kept), numbers)


@dataclass(frozen=True)
class Labelled:
    """Images with labels and the classifier that judges them.

    Attributes:
        collection: the images.
        model: which decomposed them.
        classes: their labels.
        groups: their groups.
        classifier: ``[C, D]``.
    """

    collection: Collection
    model: Model
    classes: Classes
    groups: Groups
    classifier: Tensor

    @classmethod
    def of(cls, collection: Collection, model: Model, options: ClassOptions) -> Self:
        """Labelled images as :func:`read_classes` says; raises as it does."""
        classes = read_classes(collection.entries, options)
        return cls(collection, model, classes, Groups.of(collection.entries), classes.classifier(model))

    def batches(self) -> Iterator[Batch]:
        """As :func:`labelled_batches`."""
        return labelled_batches(self.collection, self.classes, self.groups)
