"""Labels for images that pass by one at a time, from folders, from what stands beside each image, or from a CSV file.

The label of an image depends on the image and the :class:`Labeller`, not on other images, so that a unit of a pass has
the same labels whoever computes it. What depends on the data as a whole is settled before the pass: the columns there
are (:meth:`Labeller.check`), and the rows of a CSV file (:meth:`Labeller.prepare`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Self, cast

from clipfast.dataset.inputs.reading import Reading
from clipfast.dataset.label_table import LabelTable, match_table
from clipfast.dataset.labels import (
    DEFAULT_COLUMN,
    FOLDER,
    PARENT,
    SHARD,
    LabelColumns,
    having,
    hint,
    refuse_captions,
)
from clipfast.dataset.notes import Notes
from clipfast.dataset.plan import Input, Plan, UnitError
from clipfast.dataset.samples import Sample
from clipfast.errors import InputError
from clipfast.inputs import printable

COLUMNS = "columns"
_MEMBERS = ("cls", "txt")
_UNREADABLE = "labels that cannot be read"
_NO_LABEL, _FILTERED, _DEEP = "no label", "left out", "deep"


@dataclass
class LabelNotes:
    """What did not fit together in a part of the data: counts and a few names, which can be merged.

    Attributes:
        images: how many images were looked up.
        notes: how many had no label, were left out by the filter, and so on, by reason.
    """

    images: int = 0
    notes: Notes = field(default_factory=Notes)

    def merge(self, other: "LabelNotes") -> None:
        """Adds those of another part, after those of this one."""
        self.images += other.images
        self.notes.merge(other.notes)

    @property
    def labelled(self) -> int:
        """How many images have a label."""
        return self.images - self.notes.counts[_NO_LABEL] - self.notes.counts[_FILTERED]

    def lines(self) -> list[str]:
        """A sentence for each reason."""
        lines = []
        for reason, count in self.notes.counts.items():
            if reason not in (_NO_LABEL, _FILTERED, _DEEP):
                lines.append(f"{_UNREADABLE}: {reason}: {count} ({self.notes.examples(reason)})")
        if count := self.notes.counts[_DEEP]:
            lines.append(
                f"{count} images lie in folders inside the first one ({self.notes.examples(_DEEP)}): the first is the "
                f"label, {PARENT!r} in place of {FOLDER!r} takes the image's own"
            )
        if count := self.notes.counts[_NO_LABEL]:
            some = self.notes.examples(_NO_LABEL)
            lines.append(f"{count} of {self.images} images have no label ({some}): left out")
        if count := self.notes.counts[_FILTERED]:
            lines.append(f"{count} of {self.images} images are left out by the row filter")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As values of JSON."""
        return {"images": self.images, "notes": self.notes.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What :meth:`to_json` gave."""
        return cls(content["images"], Notes.from_json(content["notes"]))


class Labeller:
    """Gives images their labels and groups. It can be pickled; a copy has no notes.

    Args:
        origin: where the labels are:

            * ``"folder"``: the first folder below the one that was searched;
            * ``"parent"``: the folder that the image itself is in;
            * ``"shard"``: members beside the image in its tar shard, a ``.json`` member with the columns as keys, or a
              ``.cls`` member, or, in shards without ``.json`` members, a ``.txt`` member;
            * ``"columns"``: the columns of the table, the list or the data set that the image is in;
            * a CSV file, which names images by their id, a path relative to the file itself or to the folder that was
              searched, a shard's key, or a bare file name; see :mod:`clipfast.dataset.label_table` for names that
              several images have.
        label: the column with labels; for shards also ``"cls"`` or ``"txt"``, for these members.
        group: the column with groups, or several that are combined; None for no groups.
        file_column: the column of a CSV file that names images; None to choose one that does.
        where: values by column; images with other values are left out.

    Raises:
        InputError: options that do not fit together.
    """

    def __init__(
        self,
        origin: str,
        *,
        label: str = DEFAULT_COLUMN,
        group: str | Sequence[str] | None = None,
        file_column: str | None = None,
        where: Mapping[str, str] | None = None,
    ) -> None:
        groups = (group,) if isinstance(group, str) else tuple(group or ())
        self.origin = origin
        self._columns = LabelColumns(label, groups, dict(where or {}))
        self._file_column = file_column
        self._table: LabelTable | None = None
        self._members: tuple[str, ...] = _MEMBERS if label == DEFAULT_COLUMN else ()
        self._seen = LabelNotes()
        if origin in (FOLDER, PARENT) and self._columns.named():
            raise InputError(f"labels from folders have no column {self._columns.named()[0]!r}: give a CSV file")
        if file_column is not None and not self.needs_names:
            raise InputError(f"labels from {origin!r} have no file column {file_column!r}: give a CSV file")

    @property
    def needs_names(self) -> bool:
        """Whether labels come from a CSV file, so that :meth:`prepare` has to be called."""
        return self.origin not in (FOLDER, PARENT, SHARD, COLUMNS)

    def prepare(self, names: Callable[[], Iterable[Sample]]) -> None:
        """Finds the rows of a CSV file that belong to images.

        Args:
            names: gives all images of the pass, without content (:func:`all_names`); it is called twice.

        Raises:
            InputError: the file cannot be read, lacks a column, names an image twice, or gives no image a label.
        """
        self._table = match_table(Path(self.origin), self._columns, self._file_column, names)

    def check(self, samples: Sequence[Sample]) -> None:
        """Settles where labels are, from some images (:func:`peek`), so that a mistake is found before the pass.

        Raises:
            InputError: none of them has a label, a column that none has, or captions in place of labels.
        """
        if self.needs_names:
            return
        samples = [sample for sample in samples if sample.failure is None or sample.columns]
        if self.origin in (SHARD, COLUMNS):
            self._check_columns(samples)
        before, self._seen = self._seen, LabelNotes()
        labelled = [self.apply(sample) for sample in samples]
        seen, self._seen = self._seen, before
        kept = [sample for sample in labelled if sample is not None]
        if kept and all(sample.label is None for sample in kept):
            unreadable = [line for line in seen.lines() if line.startswith(_UNREADABLE)]
            raise InputError(f"no image has a label from {printable(self.origin)}: {[*unreadable, self._hint()][0]}")

    def _hint(self) -> str:
        return "no row of the first ones has one" if self.origin == COLUMNS else hint(self.origin)

    def _check_columns(self, samples: Sequence[Sample]) -> None:
        is_shard = self.origin == SHARD
        names = list(dict.fromkeys(column for sample in samples for column in sample.columns))
        members = [name for name in _MEMBERS if name in names] if is_shard else []
        keys = [name for name in names if name not in members]
        label = self._columns.label
        for column in self._columns.named():
            if samples and column not in names:
                where = "no .json member has" if is_shard else "no image has"
                raise InputError(f"{where} the column {column!r}: {having(keys, members)}")
        endings = [name for name in members if name == "cls" or not keys] if label == DEFAULT_COLUMN else []
        self._members = tuple(endings)
        if names and label not in names and not endings:
            where = "no member beside an image has" if is_shard else "no image has"
            raise InputError(f"{where} the label column {label!r}: {having(keys, members)}")
        if "txt" in endings:
            refuse_captions([text for sample in samples if (text := sample.columns.get("txt")) is not None])

    def apply(self, sample: Sample) -> Sample | None:
        """The image with its label and group; None where the filter leaves it out.

        An image that failed is looked up as far as it is known, and counts in no note.
        """
        label, group, kept = self._look_up(sample)
        if not kept:
            if sample.failure is not None and not sample.columns:
                return sample  # it is not known what it would have had
            self._count(sample, _FILTERED)
            return None
        if sample.failure is None:
            self._count(sample, None if label is not None else _NO_LABEL)
        return replace(sample, label=label, group=group)

    def _count(self, sample: Sample, reason: str | None) -> None:
        self._seen.images += 1
        if reason is not None:
            self._seen.notes.add(reason, sample.id)

    def _look_up(self, sample: Sample) -> tuple[str | None, str | None, bool]:
        """An image's label, its group, and whether the filter keeps it."""
        if self.origin in (FOLDER, PARENT):
            return self._folder(sample), None, True
        if self.needs_names:
            if self._table is None:
                raise InputError(f"the labels in {printable(self.origin)} are not matched with images: prepare them")
            row = self._table.row(sample)
            if row is None:
                return None, None, not self._columns.where
            return row if row[2] else (None, None, False)
        if not self._columns.keeps(sample.columns):
            return None, None, False
        return self._column(sample), self._columns.group(sample.columns), True

    def _column(self, sample: Sample) -> str | None:
        columns, name = sample.columns, self._columns.label
        has_json = any(key not in _MEMBERS for key in columns)
        texts = [columns.get(name)]
        if self.origin == SHARD:
            texts += [columns.get(ending) for ending in self._members if ending == "cls" or not has_json]
        if self.origin == SHARD and sample.failure is None:
            for column in (name, *self._columns.named()):
                if column in columns and columns[column] is None:
                    self._seen.notes.add(f"its {column!r} is not a text or a number", sample.id)
        return next((text for text in texts if text), None)

    def _folder(self, sample: Sample) -> str | None:
        if sample.folder is None:
            return None
        path = PurePath(sample.path)
        if not path.is_relative_to(sample.folder):  # an image that a table in the folder names
            return None
        inside = path.relative_to(sample.folder).parts[:-1]
        names = (*inside, *PurePosixPath(sample.key).parts[:-1])
        if self.origin == FOLDER and len(names) > 1 and sample.failure is None:
            self._seen.notes.add(_DEEP, sample.id)
        if not names:
            return None
        return names[0] if self.origin == FOLDER else names[-1]

    def take(self) -> LabelNotes:
        """What did not fit together since the last call; forgets it."""
        seen, self._seen = self._seen, LabelNotes()
        return seen

    def notes(self) -> list[str]:
        """What did not fit together, a sentence each: of the CSV file, and of the images since :meth:`take`."""
        return [*(self._table.notes if self._table is not None else ()), *self._seen.lines()]

    def settings(self) -> dict[str, Any]:
        """All that labels depend on, as values of JSON: two labellers with the same give the same labels."""
        return {
            "origin": self.origin,
            "label": self._columns.label,
            "group": list(self._columns.groups),
            "where": dict(self._columns.where),
            "file_column": self._table.file_column if self._table is not None else self._file_column,
            "members": list(self._members),
            "rows": None if self._table is None else self._table.digest(),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _seen=LabelNotes())


def all_names(inputs: Sequence[Input], plan: Plan) -> Callable[[], Iterable[Sample]]:
    """What :meth:`Labeller.prepare` needs: gives all images of a pass without content, as far as they can be read.

    Of files, lists and tables that reads their names alone, of local uncompressed tar shards the headers; other shards
    are read as a whole.
    """

    def names() -> Iterable[Sample]:
        for unit in plan.units():
            try:
                yield from inputs[unit.input].names(unit)
            except UnitError:
                continue  # reading it in the pass gives the reason

    return names


def peek(inputs: Sequence[Input], plan: Plan, units: int = 8, images: int = 32) -> list[Sample]:
    """The first images of some units from all over a plan; none of an input that can be read once only."""
    numbers = sorted({number * plan.count // units for number in range(units)} - {plan.count})
    samples: list[Sample] = []
    for unit in plan.units(numbers):
        source = inputs[unit.input]
        if getattr(source, "once", False):
            continue  # what is read of it now would be missing later
        with suppress(UnitError), closing(cast(Reading, source.read(unit))) as reading:
            samples += (replace(sample, content=None) for sample in islice(reading, images))
    return samples
