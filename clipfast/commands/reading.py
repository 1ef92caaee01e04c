"""The images of a pass, read and prepared while the model computes: for every command that looks at many."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from clipfast.dataset.files import Source
from clipfast.errors import ClipfastError
from clipfast.model import Model
from clipfast.reading import Prepare, Read, read_ahead

Item = TypeVar("Item")
_Row = tuple[Tensor, tuple[int, int]]


@dataclass(frozen=True)
class Prepared(Generic[Item]):
    """The images of a batch that could be read.

    Attributes:
        items: what they belong to.
        pixels: the model's input but for its device and dtype, ``[B, 3, height, width]``.
        sizes: width and height of each before it was prepared.
        failed: how many of the batch could not be read.
    """

    items: list[Item]
    pixels: Tensor
    sizes: list[tuple[int, int]]
    failed: int


@contextmanager
def reading(
    model: Model,
    items: Sequence[Item],
    source: Callable[[Item], Source],
    size: int,
    fail: Callable[[Item, ClipfastError], None],
) -> Iterator[Iterator[Prepared[Item]]]:
    """Images ``size`` at a time, in their order, without those that cannot be read; nothing is read on when it is left.

    Args:
        model: whose preprocessing it is.
        items: what to read.
        source: the image of an item.
        size: files per batch.
        fail: told of every item that cannot be read, and why.
    """
    prepare = Prepare(model.preprocess)

    def read(item: Item) -> _Row:
        picture = source(item).open()
        return prepare(picture), picture.size

    with closing(read_ahead(read, items, size)) as batches:
        yield (_prepared(batch, fail) for batch in batches)


def _prepared(batch: Sequence[Read[Item, _Row]], fail: Callable[[Item, ClipfastError], None]) -> Prepared[Item]:
    items: list[Item] = []
    rows: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    for each in batch:
        if each.error is not None:
            fail(each.item, each.error)
            continue
        row, size = each.result()
        items.append(each.item)
        rows.append(row)
        sizes.append(size)
    return Prepared(items, torch.stack(rows) if rows else torch.empty(0), sizes, len(batch) - len(items))
