"""Data sets of Python as inputs: Hugging Face's, torch's, sequences, and anything that can be iterated.

A data set with a length whose items have numbers is divided into ranges, which are read in any order. Its item must be
the same whenever it is asked for: random augmentations would give other results after an interruption.

An iterable cannot be divided: reading a unit goes through all items before it. Units that are read in order are read in
one pass; going back begins anew. An iterable without a length is one unit. A generator can be read once, in this
process, so it cannot be read again after an interruption: give the function that makes it instead.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterable

from clipfast.dataset.inputs.files import fetched
from clipfast.dataset.inputs.huggingface import HuggingFaceRows, iterable_parts, splits_of
from clipfast.dataset.inputs.items import LABEL, Classes, Item, Style, as_image_error, read_item
from clipfast.dataset.inputs.reading import Reading, Samples
from clipfast.dataset.inputs.rows import Place, Selection
from clipfast.dataset.plan import Input, Unit, UnitError
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.errors import ImageError, InputError
from clipfast.inputs import printable

Outcome = Item | ImageError


def from_object(
    data: Any,
    *,
    name: str | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    columns: Iterable[str] | None = None,
    length: int | None = None,
) -> Input:
    """An input for a data set of Python.

    Args:
        data: one of

            * a ``datasets.Dataset`` or ``datasets.IterableDataset``;
            * a torch ``Dataset`` whose items are an image, ``(image, label)``, or a mapping by column;
            * a sequence or any iterable of ``(id, image)``, ``(id, image, columns)``, or mappings by column;
            * a function that returns such an iterable.

            An image is a PIL image, encoded bytes, a path or URL, a uint8 tensor ``[3, height, width]``, or a uint8
            array ``[height, width, 3]``.
        name: what ids begin with where items have none, and messages; default the name of its type.
        image_column: the column with images; None to choose one by its usual names.
        id_column: the column with a name for each image; None for its number.
        columns: the other columns that are given with each image; None for all.
        length: how many items an iterable gives, where ``len`` does not tell.

    Raises:
        InputError: none of these, or its images are of no kind that can be read.
    """
    selection = Selection(image_column, id_column, None if columns is None else frozenset(columns))
    kind = type(data).__name__
    name = name or kind
    if isinstance(data, DataLoader):
        raise InputError("a DataLoader gives batches, not images: give its data set")
    if isinstance(data, str | bytes | os.PathLike):
        raise InputError(f"a value of type {kind} is no data set: paths and URLs are opened by their name")
    splits = splits_of(data)
    if splits is not None:
        raise InputError(f"a {kind} has several data sets: give one of {', '.join(map(repr, splits))}")
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(data, datasets.Dataset):
        return IndexedInput(name, HuggingFaceRows(data, selection, name))
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        parts, classes = iterable_parts(data, selection, name)
        return PartsInput(name, tuple(parts), selection, classes)
    if isinstance(data, TorchDataset) and not isinstance(data, TorchIterable):
        return IndexedInput(name, _Items(data, "torch", selection))
    if isinstance(data, Sequence):
        return IndexedInput(name, _Items(data, "pairs", selection))
    if isinstance(data, Iterable) or callable(data):
        style: Style = "torch" if isinstance(data, TorchIterable) else "pairs"
        return IterableInput(name, data, _length(data) if length is None else length, style, selection)
    raise InputError(f"a value of type {kind} is no data set: give one that has items or can be iterated")


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


# ------------------------------------------------------------------------------------------------- items with numbers


class Rows(Protocol):
    """A data set whose items have numbers. It can be pickled."""

    @property
    def path(self) -> str:
        """The folder it is in, empty for none."""

    def version(self) -> str | None:
        """What changes with its content, None where that is not known."""

    def __len__(self) -> int: ...

    def range(self, start: int, stop: int, *, content: bool) -> Iterator[Outcome]:
        """The items of a range, or why one cannot be read."""


@dataclass(frozen=True)
class _Items:
    """A torch data set or a sequence, item by item."""

    data: Any
    style: Style
    selection: Selection
    path: str = ""

    def version(self) -> str | None:
        return None

    def __len__(self) -> int:
        count = _length(self.data)
        if count is None:
            raise InputError(f"a {type(self.data).__name__} has no length: give it a __len__, or make it an iterable")
        return count

    def range(self, start: int, stop: int, *, content: bool) -> Iterator[Outcome]:
        names = getattr(self.data, "classes", None)  # torchvision's data sets have names of classes there
        is_names = isinstance(names, Sequence) and all(isinstance(each, str) for each in names)
        classes = {LABEL: list(names)} if names and is_names else {}
        for number in range(start, stop):
            try:
                yield read_item(self.data[number], self.style, self.selection, classes)
            except Exception as error:  # data sets raise what they like
                yield as_image_error(error)


@dataclass(frozen=True)
class IndexedInput:
    """A data set whose items have numbers.

    Attributes:
        name: what ids begin with where items have none.
        rows: the data set.
        working: the folder that relative paths are looked up in.
    """

    name: str
    rows: Rows
    working: str = field(default_factory=os.getcwd)

    def units(self, size: int) -> Iterator[Unit]:
        """Ranges of at most ``size`` items.

        Raises:
            InputError: its first item has no image that can be read.
        """
        count = len(self.rows)
        for first in self.rows.range(0, min(count, 1), content=True):
            error = first if isinstance(first, ImageError) else first.image
            if isinstance(error, ImageError) and error.status == "no_image":
                raise InputError(f"{printable(self.name)}: item 0: {error}")
        for start in range(0, count, size):
            stop = min(start + size, count)
            yield Unit("items", self.rows.path, start, stop, version=self.rows.version())

    def read(self, unit: Unit) -> Reading:
        """The images of a range of items.

        Raises:
            UnitError: the data set is gone or was changed.
        """
        return Reading(lambda _: self._samples(unit, content=True))

    def names(self, unit: Unit) -> Reading:
        """The same samples without images and columns."""
        return Reading(lambda _: self._samples(unit, content=False))

    def _samples(self, unit: Unit, *, content: bool) -> Samples:
        try:
            if unit.version != self.rows.version() or len(self.rows) < unit.stop:
                raise UnitError("damaged", f"{printable(self.name)}: it was changed after the pass was planned")
            outcomes = self.rows.range(unit.start, unit.stop, content=content)
        except InputError as error:
            raise UnitError("unreadable", str(error)) from None
        place = Place("", self.name, self.working)
        samples = (sample_of(place, unit.start + at, each, content) for at, each in enumerate(outcomes))
        yield from fetched(samples) if content else samples


def sample_of(place: Place, number: int, outcome: Outcome, content: bool) -> Sample:
    """The sample of an item."""
    item = Item(outcome, None, {}) if isinstance(outcome, ImageError) else outcome
    columns = item.columns if content else {}
    if not isinstance(item.image, ImageError):
        return place.sample(number, item.image, item.id, columns, content=content)
    sample = place.sample(number, b"-", item.id, columns, content=False)
    return sample.failed(Failure(Status(item.image.status), f"{printable(sample.id)}: {item.image}"))


# ------------------------------------------------------------------------------------------------------------ iterables


class IterableInput:
    """An iterable, or a function that returns one; see the module for what that means.

    Attributes:
        name: what ids begin with where items have none.
    """

    def __init__(
        self,
        name: str,
        data: Iterable[Any] | Callable[[], Iterable[Any]],
        length: int | None,
        style: Style,
        selection: Selection,
        classes: Classes | None = None,
    ) -> None:
        self.name, self._working, self._classes = name, os.getcwd(), classes or {}
        self._data, self._length, self._style, self._selection = data, length, style, selection
        self._iterator: Iterator[Any] | None = None
        self._position = 0
        self._begun = False

    @property
    def once(self) -> bool:
        """Whether it can be read once only: it is its own iterator."""
        return isinstance(self._data, Iterator)

    def units(self, size: int) -> Iterator[Unit]:
        """Ranges of at most ``size`` items; one unit where the length is not known."""
        if self._length is None:
            yield Unit("items", "")
            return
        for start in range(0, self._length, size):
            yield Unit("items", "", start, min(start + size, self._length))

    def read(self, unit: Unit) -> Reading:
        """The images of a range. All items before them are passed over, unless the last reading ended there.

        Raises:
            UnitError: it cannot be read again, it failed, or it has more or fewer items than its length.
        """
        return Reading(lambda _: self._samples(unit, content=True))

    def names(self, unit: Unit) -> Reading:
        """The same samples without images and columns.

        Raises:
            InputError: it can be read once only.
        """
        if self.once:
            raise InputError(f"{printable(self.name)}: labels by name need its names first, and {self._remedy()}")
        return Reading(lambda _: self._samples(unit, content=False))

    def _samples(self, unit: Unit, *, content: bool) -> Samples:
        place = Place("", self.name, self._working)
        samples = (sample_of(place, number, each, content) for number, each in self._outcomes(unit))
        yield from fetched(samples) if content else samples

    def _outcomes(self, unit: Unit) -> Iterator[tuple[int, Outcome]]:
        self._go_to(unit.start)
        whole = self._length is None
        while whole or self._position < unit.stop:
            number, item = self._position, self._next()
            if item is _END:
                if whole:
                    return
                raise UnitError("damaged", f"{printable(self.name)}: it ended after {number} of {self._length} items")
            try:
                yield number, read_item(item, self._style, self._selection, self._classes)
            except ImageError as error:
                yield number, error
        if self._position == self._length and self._next() is not _END:
            raise UnitError("damaged", f"{printable(self.name)}: it has more items than its length, {self._length}")

    def _go_to(self, position: int) -> None:
        if self._iterator is None or self._position > position:
            if self._begun and self.once:
                raise UnitError("unreadable", f"{printable(self.name)}: {self._remedy()}")
            data = self._data if isinstance(self._data, Iterable) else self._data()
            self._iterator, self._position, self._begun = iter(data), 0, True
        while self._position < position and self._next() is not _END:
            pass

    def _next(self) -> Any:
        assert self._iterator is not None
        try:
            item = next(self._iterator, _END)
        except Exception as error:  # data sets raise what they like
            self._iterator = None
            text = " ".join(str(error).split())[:200]
            reason = f"it failed after {self._position} items ({type(error).__name__}: {text})"
            raise UnitError("unreadable", f"{printable(self.name)}: {reason}") from None
        if item is not _END:
            self._position += 1
        return item

    def _remedy(self) -> str:
        return "it can be read only once: give a list, or the function that makes it"

    def __getstate__(self) -> dict[str, Any]:
        if self.once:
            raise InputError(f"{printable(self.name)} cannot be given to other processes, {self._remedy()}")
        return {**self.__dict__, "_iterator": None, "_position": 0, "_begun": False}


_END = object()


@dataclass(frozen=True)
class PartsInput:
    """A data set in parts that can be iterated one by one, such as the shards of a ``datasets.IterableDataset``.

    Attributes:
        name: what ids begin with.
        parts: iterables of mappings by column, a unit each.
        selection: their columns.
        classes: names of classes by column.
    """

    name: str
    parts: tuple[Iterable[Any], ...]
    selection: Selection
    classes: Classes

    def units(self, size: int) -> Iterator[Unit]:
        """A unit for each part, whatever its size: ``start`` is its number."""
        return (Unit("items", "", number) for number in range(len(self.parts)))

    def read(self, unit: Unit) -> Reading:
        """The images of a part.

        Raises:
            UnitError: it failed.
        """
        return self._part(unit).read(replace(unit, start=0))

    def names(self, unit: Unit) -> Reading:
        """The same samples without images and columns."""
        return self._part(unit).names(replace(unit, start=0))

    def _part(self, unit: Unit) -> IterableInput:
        name = f"{self.name}:{unit.start}" if len(self.parts) > 1 else self.name
        return IterableInput(name, self.parts[unit.start], None, "torch", self.selection, self.classes)
