"""Tables with an image in each row: Parquet, Arrow IPC and Feather files, on this machine or at a URL.

A unit is a range of rows. Of a Parquet file only the row groups and columns of the range are read, some rows at a time.
Ranges end where row groups end, as far as their size allows: a range that begins inside a row group is read from its
group's beginning. Arrow files are mapped into memory where they are files of this machine.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa

from clipfast.dataset.inputs.files import fetched
from clipfast.dataset.inputs.locations import version
from clipfast.dataset.inputs.reading import Reading, Samples
from clipfast.dataset.inputs.rows import Form, Place, Selection, image_column, row_id
from clipfast.dataset.inputs.sidecars import Columns, as_text
from clipfast.dataset.inputs.table_files import guarded, open_table
from clipfast.dataset.plan import Unit, UnitError
from clipfast.errors import InputError
from clipfast.inputs import printable


@dataclass(frozen=True)
class TableInput:
    """A table with an image in each row.

    Attributes:
        name: what the user called it.
        path: its absolute path or URL.
        working: the folder that relative paths are looked up in where they are not beside the table.
        selection: its columns.
        folder: the folder that was searched, None for a table that was named itself.
    """

    name: str
    path: str
    working: str
    selection: Selection = field(default_factory=Selection)
    folder: str | None = None

    def units(self, size: int) -> Iterator[Unit]:
        """Ranges of at most ``size`` rows.

        Raises:
            InputError: it cannot be read, or has no column with images.
        """
        have = version(self.path)
        try:
            with ExitStack() as stack:
                table = open_table(self.path, self.name, stack)
                chosen_columns(table.schema, self.selection, self.name)
                ranges = list(_ranges(guarded(table.groups(), self.name), size))
        except UnitError as error:
            raise InputError(str(error)) from None
        for start, stop in ranges:
            yield Unit("table", self.path, start, stop, size=have.size, version=have.version, folder=self.folder)

    def read(self, unit: Unit) -> Reading:
        """The images of a range of rows.

        Raises:
            UnitError: the table is missing, cannot be read or is damaged; samples given before count.
        """
        return Reading(lambda reading: self._samples(unit, reading, content=True))

    def names(self, unit: Unit) -> Reading:
        """The same samples without bytes and columns; columns with bytes are not read."""
        return Reading(lambda reading: self._samples(unit, reading, content=False))

    def _samples(self, unit: Unit, reading: Reading, *, content: bool) -> Samples:
        have = version(unit.path)
        place = Place(unit.path, self.name, self.working, unit.folder, have.size, have.modified_ns)
        with ExitStack() as stack:
            table = open_table(unit.path, self.name, stack)
            try:
                columns = chosen_columns(table.schema, self.selection, self.name)
            except InputError as error:
                raise UnitError("damaged", str(error)) from None
            wanted = columns.names(content=content)
            rows = (
                sample
                for first, batch in guarded(table.rows(unit.start, unit.stop, wanted), self.name)
                for sample in _batch_samples(first, batch, columns, place, content)
            )
            yield from fetched(rows) if content else rows
            reading.read_from = {
                "path": unit.path,
                "size": have.size,
                "version": have.version,
                "checksum": None,
            }


# ------------------------------------------------------------------------------------------------------------- columns


class ChosenColumns(NamedTuple):
    """The columns that are read.

    Attributes:
        image: the one with images.
        form: what it holds.
        id: the one with ids, None for none.
        beside: those that are given with each image.
        classes: names of classes by column, where the table has them: Hugging Face's ``ClassLabel``.
    """

    image: str
    form: Form
    id: str | None
    beside: list[str]
    classes: dict[str, list[str]]

    def names(self, *, content: bool) -> list[str]:
        """What has to be read; without ``content`` neither bytes nor what stands beside."""
        image = [self.image] if content or self.form != "bytes" else []
        beside = self.beside if content else []
        return list(dict.fromkeys([*image, *([] if self.id is None else [self.id]), *beside]))


def chosen_columns(schema: Any, selection: Selection, name: str) -> ChosenColumns:
    """The columns of a table that are read.

    Raises:
        InputError: no column with images, or none of a name that the user gave.
    """
    repeated = sorted({column for column in schema.names if schema.names.count(column) > 1})
    if repeated:
        raise InputError(f"{printable(name)} has several columns of the name {printable(repeated[0])!r}")
    selection.check(schema.names, name)
    forms: dict[str, Form] = {}
    for each in schema:
        form = _form(each.type)
        if form is not None:
            forms[each.name] = form
    image = image_column(forms, schema.names, selection.image, name)
    beside = [
        each.name for each in schema if each.name != image and selection.keeps(each.name) and _is_scalar(each.type)
    ]
    return ChosenColumns(image, forms[image], selection.id, beside, _class_names(schema))


def form_of(path: str, name: str, selection: Selection) -> Form:
    """What the image column of a table holds.

    Raises:
        InputError: it has none.
        UnitError: the table cannot be read.
    """
    with ExitStack() as stack:
        return chosen_columns(open_table(path, name, stack).schema, Selection(selection.image), name).form


def _form(kind: Any) -> Form | None:
    if pa.types.is_struct(kind):
        names = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
        return "image" if "bytes" in names and _is_binary(names["bytes"]) else None
    if _is_binary(kind):
        return "bytes"
    return "path" if _is_text(kind) else None


def _is_binary(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_scalar(kind: Any) -> bool:
    return not (pa.types.is_nested(kind) or _is_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Names of classes by column, from what Hugging Face's datasets write into a schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: list(each["names"])
            for column, each in features.items()
            if isinstance(each, dict) and each.get("_type") == "ClassLabel" and each.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def class_name(value: Any, names: Sequence[str] | None) -> str | None:
    """A value as text: the name of its class where it is the number of one."""
    if names and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return names[value]
    return as_text(value)


def _batch_samples(first: int, batch: Any, chosen: ChosenColumns, place: Place, content: bool) -> Samples:
    columns = {name: batch.column(name) for name in batch.schema.names}
    for at in range(batch.num_rows):
        values = {name: _value(column[at]) for name, column in columns.items()}
        beside: Columns = {}
        if content:
            beside = {name: class_name(values[name], chosen.classes.get(name)) for name in chosen.beside}
        image = values.get(chosen.image, b"-")
        name = row_id(values[chosen.id]) if chosen.id else None
        yield place.sample(first + at, image, name, beside, content=content)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    except (ValueError, OverflowError, ArithmeticError):  # a date that Python has not
        return None


def _ranges(groups: Iterator[int], size: int) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``size`` rows: of whole groups where they fit, of a part of one where it is larger."""
    start = end = 0
    for count in groups:
        if end + count - start > size and end > start:
            yield start, end
            start = end
        end += count
        while end - start > size:
            yield start, start + size
            start += size
    if end > start:
        yield start, end
