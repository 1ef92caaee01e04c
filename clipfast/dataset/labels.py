"""Labels of images: from folder names, a CSV file, or members of tar shards.

Every image is looked up by its name, never by its position, and images without a label are reported.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from clipfast.dataset.files import Source
from clipfast.dataset.shards import read_sidecars
from clipfast.dataset.tables import match_rows, some
from clipfast.errors import ImageError, InputError
from clipfast.inputs import printable

FOLDER, PARENT, SHARD = "folder", "parent", "shard"
DEFAULT_COLUMN = "label"
_CAPTION_WORDS = 4
_SHOWN = 3


@dataclass(frozen=True)
class Labels:
    """The labels of images, in the order of the images.

    Attributes:
        values: label of each image, None where it has none.
        groups: group of each image (for worst-group accuracy), None where it has none; None altogether without groups.
        notes: what did not fit together, a sentence each.
        selected: whether the row filter keeps an image; None where there is no filter.
    """

    values: tuple[str | None, ...]
    groups: tuple[str | None, ...] | None = None
    notes: tuple[str, ...] = ()
    selected: tuple[bool, ...] | None = None

    @property
    def classes(self) -> list[str]:
        """Labels that occur, sorted."""
        return sorted({value for value in self.values if value is not None})


@dataclass(frozen=True)
class LabelColumns:
    """Which columns are read.

    Attributes:
        label: the column with labels.
        groups: the columns that form the group together, empty for no groups.
        where: values by column; rows with others are left out.
    """

    label: str
    groups: tuple[str, ...]
    where: Mapping[str, str] = field(default_factory=dict)

    def named(self) -> list[str]:
        """All but the label's."""
        return [*self.groups, *self.where]

    def group(self, row: Mapping[str, str | None]) -> str | None:
        """A row's group: the value of the one column, or ``column=value`` of each."""
        values = [row.get(column) or None for column in self.groups]
        if not values or None in values:
            return None
        if len(values) == 1:
            return values[0]
        return ", ".join(f"{column}={value}" for column, value in zip(self.groups, values, strict=True))

    def keeps(self, row: Mapping[str, str | None]) -> bool:
        """Whether the filter keeps a row."""
        return all(row.get(column) == value for column, value in self.where.items())


def parse_where(conditions: Iterable[str]) -> dict[str, str]:
    """Row filters from ``column=value`` texts.

    Raises:
        InputError: a text without ``=``, or a column that is given twice.
    """
    where: dict[str, str] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals or not column:
            raise InputError(f"{condition!r} is no row filter: expected column=value")
        if column in where:
            raise InputError(f"two row filters name the column {column!r}: only one value can hold")
        where[column] = value
    return where


def read_labels(
    sources: Sequence[Source],
    origin: str,
    *,
    label: str = DEFAULT_COLUMN,
    group: str | Sequence[str] | None = None,
    file_column: str | None = None,
    where: Mapping[str, str] | None = None,
) -> Labels:
    """Looks up the label of every image.

    Args:
        sources: the images.
        origin: where the labels are:

            * ``"folder"``: the first folder below the one that was searched;
            * ``"parent"``: the folder that the image itself is in;
            * ``"shard"``: members beside the image in its tar shard, a ``.json`` member with the columns as keys, or a
              ``.cls`` member, or, in shards without ``.json`` members, a ``.txt`` member;
            * a CSV file, which names images by a path relative to the file itself or to the folder that was searched, a
              shard's key, or a bare file name.
        label: the column with labels; for shards also ``"cls"`` or ``"txt"``, for these members.
        group: the column with groups, or several that are combined; None for no groups.
        file_column: the column of a CSV file that names images; None to choose one that does.
        where: values by column; images with other values have no label.

    Raises:
        InputError: no image has a label, or the labels cannot be read or lack a column.
    """
    groups = (group,) if isinstance(group, str) else tuple(group or ())
    columns = LabelColumns(label, groups, where or {})
    if origin in (FOLDER, PARENT):
        if columns.named():
            raise InputError(f"labels from folders have no column {columns.named()[0]!r}: give a CSV file")
        labels = _folders(sources, origin)
    elif origin == SHARD:
        labels = _shards(sources, columns)
    else:
        labels = _csv(sources, Path(origin), columns, file_column)
    return _checked(sources, origin, labels)


def _checked(sources: Sequence[Source], origin: str, labels: Labels) -> Labels:
    """The labels with a note of the images that have none; raises :class:`InputError` where none has any."""
    selected = labels.selected or (True,) * len(sources)
    rows = list(zip(sources, labels.values, selected, strict=True))
    missing = [str(source) for source, value, kept in rows if value is None and kept]
    others = len(sources) - sum(selected)
    notes = list(labels.notes)
    if sources and all(value is None for value in labels.values):
        reason = "; ".join(notes[:1]) or hint(origin)
        raise InputError(f"no image has a label from {printable(origin)}: {reason}")
    if missing:
        notes.append(f"{len(missing)} of {len(sources)} images have no label ({some(missing)}): left out")
    if others:
        notes.append(f"{others} of {len(sources)} images are left out by the row filter")
    return Labels(labels.values, labels.groups, tuple(notes), labels.selected)


def hint(origin: str) -> str:
    """What may be wrong where no image has a label."""
    if origin in (FOLDER, PARENT):
        return "give the folder that holds one folder per class"
    if origin == SHARD:
        return "shards hold a .cls, .txt or .json member beside each image"
    return "no row that is kept has one"


# ------------------------------------------------------------------------------------------------------------- folders


def _folders(sources: Sequence[Source], origin: str) -> Labels:
    folders = [_folders_of(source) for source in sources]
    values = tuple((names[0] if origin == FOLDER else names[-1]) if names else None for names in folders)
    deep = [str(source) for source, names in zip(sources, folders, strict=True) if len(names) > 1]
    notes: tuple[str, ...] = ()
    if origin == FOLDER and deep:
        notes = (
            f"{len(deep)} images lie in folders inside the first one ({some(deep)}): the first is the label, "
            f"{PARENT!r} in place of {FOLDER!r} takes the image's own",
        )
    return Labels(values, notes=notes)


def _folders_of(source: Source) -> tuple[str, ...]:
    """The folders between the one that was searched and the image, those in a shard too."""
    if source.folder is None:
        return ()
    return (*source.path.relative_to(source.folder).parts[:-1], *PurePath(source.key).parts[:-1])


# -------------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class _Sidecar:
    """What stands beside an image in its shard.

    Attributes:
        texts: the ``cls`` and ``txt`` members.
        row: the ``json`` member, values as texts; None where there is none.
        problem: why something could not be read; None where all could.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    row: Mapping[str, str | None] | None = None
    problem: str | None = None


def _shards(sources: Sequence[Source], columns: LabelColumns) -> Labels:
    sidecars = [_sidecar(source, (columns.label, *columns.named())) for source in sources]
    keys = list(dict.fromkeys(key for sidecar in sidecars for key in sidecar.row or ()))
    members = [ending for ending in ("cls", "txt") if any(ending in sidecar.texts for sidecar in sidecars)]
    for column in columns.named():
        if column not in keys:
            raise InputError(f"no .json member has the column {column!r}: {having(keys, members)}")
    endings = _label_members(columns.label, keys, members)
    values, groups, selected = [], [], []
    for sidecar in sidecars:
        row = sidecar.row or {}
        texts = (row.get(columns.label), *(sidecar.texts.get(ending) for ending in endings))
        kept = columns.keeps(row)
        values.append(next((text for text in texts if text), None) if kept else None)
        groups.append(columns.group(row) if kept else None)
        selected.append(kept)
    if "txt" in endings and columns.label == DEFAULT_COLUMN:
        refuse_captions([sidecar.texts["txt"] for sidecar in sidecars if "txt" in sidecar.texts])
    problems = [
        f"{printable(str(source))}: {sidecar.problem}"
        for source, sidecar in zip(sources, sidecars, strict=True)
        if sidecar.problem is not None
    ]
    if len(problems) > _SHOWN:
        problems[_SHOWN:] = [f"{len(problems) - _SHOWN} more images have labels that cannot be read"]
    return Labels(
        tuple(values),
        tuple(groups) if columns.groups else None,
        tuple(problems),
        tuple(selected) if columns.where else None,
    )


def _label_members(label: str, keys: Sequence[str], members: Sequence[str]) -> list[str]:
    """The members that give a label where the ``.json`` member does not.

    Captions lie in ``.txt`` members of shards that have ``.json`` members, so those are labels only when named.

    Raises:
        InputError: no member has this column.
    """
    if label in members and label not in keys:
        return [label]
    if label == DEFAULT_COLUMN:
        endings = [ending for ending in members if ending == "cls" or not keys]
        if endings or label in keys or not (keys or members):
            return endings
    elif label in keys or not (keys or members):
        return []
    raise InputError(f"no member beside an image has the label column {label!r}: {having(keys, members)}")


def having(keys: Sequence[str], members: Sequence[str]) -> str:
    """The columns that stand beside images, for a message."""
    have = [*keys, *(f"{ending} (the .{ending} members)" for ending in members)]
    return f"there are {', '.join(map(printable, have))}" if have else "there are none"


def refuse_captions(texts: Sequence[str]) -> None:
    """Raises :class:`InputError` where texts are long and nearly all different: captions rather than class names."""
    words = sum(len(text.split()) for text in texts)
    if len(texts) > 1 and 2 * len(set(texts)) > len(texts) and words > _CAPTION_WORDS * len(texts):
        raise InputError(
            f"the .txt members look like captions, not labels ({printable(texts[0])[:60]!r}, …): "
            "name txt as the label column if they are labels"
        )


def _sidecar(source: Source, columns: Iterable[str]) -> _Sidecar:
    if not source.key:
        return _Sidecar()
    try:
        texts = read_sidecars(source.path, source.members)
    except ImageError as error:
        return _Sidecar(problem=str(error))
    document = texts.pop("json", None)
    if document is None:
        return _Sidecar(texts)
    try:
        row = json.loads(document)
    except (ValueError, RecursionError):
        return _Sidecar(texts, problem=f"its .json member is not JSON: {document[:40]!r}")
    if not isinstance(row, dict):
        return _Sidecar(texts, problem="its .json member is no object with columns as keys")
    problem = next((text for key in columns if (text := _not_a_label(row.get(key), key)) is not None), None)
    return _Sidecar(texts, {key: _text(value) for key, value in row.items()}, problem)


def _text(value: object) -> str | None:
    """A JSON value as a label, None where it is none."""
    if value is None or _not_a_label(value, "") is not None:
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)


def _not_a_label(value: object, column: str) -> str | None:
    """Why a JSON value cannot be a label."""
    if isinstance(value, list | dict):
        return f"its {column!r} is a {type(value).__name__}, not a text or a number"
    if isinstance(value, str) and not _is_unicode(value):
        return f"its {column!r} is not valid Unicode: {printable(value)[:40]}"
    return None


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


# ----------------------------------------------------------------------------------------------------------------- CSV


def _csv(sources: Sequence[Source], file: Path, columns: LabelColumns, file_column: str | None) -> Labels:
    table = match_rows(sources, file, (columns.label, *columns.named()), file_column)
    kept = [row is not None and columns.keeps(row) for row in table.rows]
    rows = [row if row is not None and keep else {} for row, keep in zip(table.rows, kept, strict=True)]
    unused = [name for name, row in table.unused if columns.keeps(row)]
    notes: tuple[str, ...] = ()
    if all(row is None for row in table.rows):
        notes = (f"its column {table.file_column!r} names none of these images",)
    elif unused:
        notes = (f"{len(unused)} rows of {printable(file)} name no image here ({some(unused)})",)
    return Labels(
        tuple(row.get(columns.label) or None for row in rows),
        tuple(columns.group(row) for row in rows) if columns.groups else None,
        notes,
        tuple(kept) if columns.where else None,
    )
