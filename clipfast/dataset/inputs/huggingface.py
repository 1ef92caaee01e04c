"""Hugging Face data sets: in memory, or in the folder that ``save_to_disk`` wrote. Images are read encoded."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from clipfast.dataset.inputs.items import Classes, Item, as_image_error
from clipfast.dataset.inputs.rows import Form, Selection, image_column, row_id
from clipfast.dataset.inputs.tables import class_name
from clipfast.errors import ImageError, InputError, MissingExtra
from clipfast.inputs import printable

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_ROWS_AT_ONCE = 16


def is_saved(folder: str) -> bool:
    """Whether a folder is one that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    names = [os.path.join(folder, name) for name in (_STATE, _INFO)]
    return all(map(os.path.isfile, names)) or os.path.isfile(os.path.join(folder, _SPLITS))


def saved_splits(folder: str) -> list[str]:
    """The folders of the data sets that a saved folder holds, relative to it; ``[""]`` for one itself.

    Raises:
        InputError: its description cannot be read.
    """
    path = os.path.join(folder, _SPLITS)
    if not os.path.isfile(path):
        return [""]
    content = _json(path)
    splits = content.get("splits")
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise InputError(f"{printable(path)} is damaged: it names no splits")
    return splits


def _json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as error:
        raise InputError(f"{printable(path)}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{printable(path)} is damaged: it is not JSON") from None
    return content if isinstance(content, dict) else {}


def splits_of(data: Any) -> list[str] | None:
    """The names of the data sets in a ``DatasetDict``; None for anything else."""
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        return [str(split) for split in data]
    return None


class HuggingFaceRows:
    """A data set with a length, in memory or on disk; one on disk is opened in each process by itself.

    Args:
        data: the data set, or the folder it was saved to.
        selection: its columns.
        name: what the user calls it, for messages.

    Attributes:
        path: the folder, empty for none.
    """

    def __init__(self, data: Any, selection: Selection, name: str) -> None:
        self.path = data if isinstance(data, str) else ""
        self._data = None if self.path else data
        self._selection, self._name = selection, name
        self._opened: tuple[Any, _Columns] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def version(self) -> str | None:
        """The fingerprint of its content.

        Raises:
            InputError: it is gone or damaged.
        """
        if self.path:
            return str(_json(os.path.join(self.path, _STATE)).get("_fingerprint"))
        return str(getattr(self._data, "_fingerprint", None))

    def __len__(self) -> int:
        return len(self._open()[0])

    def range(self, start: int, stop: int, *, content: bool) -> Iterator[Item | ImageError]:
        """The items of a range, some at a time."""
        data, columns = self._open()
        if not content:
            data = data.select_columns(columns.few())
        for first in range(start, stop, _ROWS_AT_ONCE):
            end = min(first + _ROWS_AT_ONCE, stop)
            if not data.column_names:
                yield from (Item(b"-", None, {}) for _ in range(first, end))
                continue
            try:
                rows = data[first:end]
            except Exception as error:  # data sets raise what they like
                yield from (as_image_error(error) for _ in range(first, end))
                continue
            for at in range(end - first):
                yield columns.item({name: values[at] for name, values in rows.items()})

    def _open(self) -> "tuple[Any, _Columns]":
        if self._opened is None:
            data = self._data if self._data is not None else _load(self.path, self._name)
            columns = _Columns(data.features, self._selection, self._name)
            self._opened = columns.undecoded(data.with_format(None)), columns
        return self._opened


def _load(folder: str, name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "datasets", "reading a saved data set") from None
    try:
        return datasets.load_from_disk(folder)
    except Exception as error:  # it raises what it likes on damage
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{printable(name)}: the saved data set cannot be read ({reason})") from None


def iterable_parts(data: Any, selection: Selection, name: str) -> tuple[list[Iterable[Any]], Classes]:
    """The shards of a ``datasets.IterableDataset``, with encoded images, and the names of their classes.

    Raises:
        InputError: it has no column with images.
    """
    classes: Classes = {}
    if data.features is not None:
        columns = _Columns(data.features, selection, name)
        data, classes = columns.undecoded(data), columns.classes
    count = data.num_shards
    return [data.shard(count, number) for number in range(count)] if count > 1 else [data], classes


class _Columns:
    """The columns of a Hugging Face data set that are read.

    Raises:
        InputError: no column with images, or none of a name that the user gave.
    """

    def __init__(self, features: Any, selection: Selection, name: str) -> None:
        self._features, self._selection = features, selection
        selection.check(list(features), name)
        forms: dict[str, Form] = {}
        for column, feature in features.items():
            form = _form(feature)
            if form is not None:
                forms[column] = form
        self.image = image_column(forms, list(features), selection.image, name)
        self._form = forms[self.image]
        self.classes = {column: list(each.names) for column, each in features.items() if hasattr(each, "names")}

    def undecoded(self, data: Any) -> Any:
        """The data set with all its images encoded."""
        import datasets

        for column, feature in self._features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
        return data

    def few(self) -> list[str]:
        """The columns that an item's name and path are in."""
        image = [] if self._form == "bytes" else [self.image]
        return list(dict.fromkeys([*image, *([] if self._selection.id is None else [self._selection.id])]))

    def item(self, row: dict[str, Any]) -> Item:
        """The item of a row."""
        name = row_id(row[self._selection.id]) if self._selection.id else None
        beside = {
            column: class_name(value, self.classes.get(column))
            for column, value in row.items()
            if column != self.image and self._selection.keeps(column) and not isinstance(value, list | dict | bytes)
        }
        return Item(row.get(self.image, b"-"), name, beside)


def _form(feature: Any) -> Form | None:
    kind = type(feature).__name__
    if kind == "Image":
        return "image"
    dtype = str(getattr(feature, "dtype", "")) if kind == "Value" else ""
    if "binary" in dtype:
        return "bytes"
    return "path" if "string" in dtype else None
