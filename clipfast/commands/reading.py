"""Reading and preparing the images of a pass while the model computes, for every command that takes many images."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from clipfast.dataset.files import Source
from clipfast.errors import ClipfastError
from clipfast.images import with_memory
from clipfast.model import Model
from clipfast.preprocessing import Prepare
from clipfast.reading import Read, read_ahead

Item = TypeVar("Item")
_Row = tuple[Tensor, tuple[int, int]]


@dataclass(frozen=True)
class Prepared(Generic[Item]):
    """The images of a batch that could be read.

    Attributes:
        items: the items of these images.
        pixels: the model's input, ``[B, 3, height, width]``, float32 on the CPU.
        sizes: width and height of each image before it was prepared.
        failed: number of images in the batch that could not be read.
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
    """Batches of images in their order, without those that cannot be read; reading stops at the end of the block.

    Args:
        model: the model whose preprocessing is used.
        items: what to read.
        source: returns the image of an item.
        size: items per batch.
        fail: called with every item that cannot be read, and the reason.
    """
    prepare = Prepare(model.preprocess)

    def read(item: Item) -> _Row:
        image = source(item)
        name = str(image)

        def read_image() -> _Row:
            picture = image.open()
            return prepare(picture, name), picture.size

        return with_memory(read_image, name)

    with closing(read_ahead(read, items, size)) as batches:
        yield (_prepared(batch, fail) for batch in batches)


def _prepared(batch: Sequence[Read[Item, _Row]], fail: Callable[[Item, ClipfastError], None]) -> Prepared[Item]:
    items: list[Item] = []
    rows: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    for read in batch:
        if read.error is not None:
            fail(read.item, read.error)
            continue
        row, size = read.result()
        items.append(read.item)
        rows.append(row)
        sizes.append(size)
    return Prepared(items, torch.stack(rows) if rows else torch.empty(0), sizes, len(batch) - len(items))
