"""Labels as classes: what each is called in words, and the classifier that the words make."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.ablation import Batch
from clipfast.commands.loading import encode_texts
from clipfast.commands.outcome import memory_for
from clipfast.dataset.collection import Collection, Entry
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

    def classifier(self, model: Model) -> Tensor:
        """A unit row per label, the mean of its texts' features, ``[C, D]``.

        Raises:
            InputError: a text that is too long, or a model without a text encoder.
        """
        every = [text for texts in self.texts for text in texts]
        with memory_for(len(every), str(model.device), "texts"):
            features = encode_texts(model, every).split([len(texts) for texts in self.texts])
        return torch.stack([F.normalize(each.mean(0), dim=0) for each in features])

    def index(self, entries: Sequence[Entry]) -> Tensor:
        """Classes of labelled images, ``[B]``."""
        return torch.tensor([self.labels.index(str(entry.label)) for entry in entries], dtype=torch.long)


def read_classes(entries: Sequence[Entry], file: Path | None, prompts: Sequence[str]) -> Classes:
    """The classes of labelled images.

    Args:
        entries: the images; those without a label do not count.
        file: a CSV file with columns ``label`` and ``text``, a row for each text of a class; its labels are the
            classes. None to make the texts from the labels that occur.
        prompts: templates with ``{}`` where the label goes, with ``_`` as a space; ``a photo of a {}.`` if none.

    Raises:
        InputError: no labels, fewer than two classes, a label without texts, a prompt without ``{}``, or both a file
            and prompts.
    """
    found = sorted({entry.label for entry in entries if entry.label is not None})
    if not found:
        raise InputError("the images have no labels: give --labels folder, --labels shard or --labels FILE.csv")
    if file is not None and prompts:
        raise InputError("--classes and --prompt are both given: the file has the texts already")
    for prompt in prompts:
        if prompt.count("{}") != 1:
            raise InputError(f"--prompt is {prompt!r}: it needs one {{}} where the class goes")
    if file is None:
        templates = prompts or (PROMPT,)
        texts = {label: [each.format(label.replace("_", " ")) for each in templates] for label in found}
    else:
        texts = read_class_texts(file)
        lacking = [label for label in found if label not in texts]
        if lacking:
            raise InputError(f"{file} has no text for the label {lacking[0]!r}: it has {', '.join(list(texts)[:10])}")
    if len(texts) < 2:
        raise InputError(f"all images have the label {found[0]!r}: zero-shot accuracy needs two classes or more")
    return Classes(tuple(texts), tuple(map(tuple, texts.values())))


def read_class_texts(file: Path) -> dict[str, list[str]]:
    """The texts of every label of a CSV file with columns ``label`` and ``text``, labels sorted.

    Raises:
        InputError: a file that cannot be read, lacks a column, or has an empty label or text.
    """
    texts: dict[str, list[str]] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            reader = csv.DictReader(opened)
            if not {"label", "text"} <= set(reader.fieldnames or ()):
                raise InputError(
                    f"{file} needs the columns label and text: it has {', '.join(reader.fieldnames or ())}"
                )
            for row in reader:
                if not row["label"] or not (row["text"] or "").strip():
                    raise InputError(f"{file}:{reader.line_num}: a label or a text is empty")
                texts.setdefault(row["label"], []).append(row["text"].strip())
    except OSError as error:
        raise InputError(f"cannot read the classes in {file}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read the classes in {file}: not a CSV file in UTF-8 ({error})") from None
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
    for entries, found in collection.batches():
        rows = [row for row, entry in enumerate(entries) if entry.label is not None]
        if rows:
            kept = [entries[row] for row in rows]
            some, numbers = (found if len(rows) == len(entries) else found.select(rows)), groups.index(kept)
            yield (some, classes.index(kept)) if numbers is None else (some, classes.index(kept), numbers)


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
    def of(cls, collection: Collection, model: Model, file: Path | None, prompts: Sequence[str]) -> Self:
        """Labelled images as :func:`read_classes` says; raises as it does."""
        classes = read_classes(collection.entries, file, prompts)
        return cls(collection, model, classes, Groups.of(collection.entries), classes.classifier(model))

    def batches(self) -> Iterator[Batch]:
        """As :func:`labelled_batches`."""
        return labelled_batches(self.collection, self.classes, self.groups)
