"""Items of data sets in memory: what an item's image, id and columns are."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image

from clipfast.dataset.inputs.rows import IMAGE_COLUMNS, PATH_COLUMNS, Selection, row_id
from clipfast.dataset.inputs.sidecars import Columns, as_text
from clipfast.dataset.inputs.tables import class_name
from clipfast.errors import ClipfastError, ImageError, is_out_of_memory
from clipfast.images import SUFFIXES, decoding

LABEL = "label"
_KEY = "__key__"
"""What webdataset calls the id of a sample."""

Classes = Mapping[str, Sequence[str]]
"""Names of classes by column."""
Style = Literal["pairs", "torch"]
"""``(id, image)`` or ``(id, image, columns)``; or as torch's data sets give items: an image, or ``(image, label)``."""


class Item(NamedTuple):
    """An item of a data set.

    Attributes:
        image: encoded bytes, a path or URL, a decoded image, or a Hugging Face image; None for none; an error where it
            cannot be read.
        id: its name, None for its number.
        columns: what stands beside it.
    """

    image: Any
    id: str | None
    columns: Columns


def read_item(item: Any, style: Style, selection: Selection, classes: Classes) -> Item:
    """The parts of an item.

    Args:
        item: as the data set gives it: a mapping by column, or as ``style`` says.
        style: what an item is that is no mapping.
        selection: which keys of a mapping are used.
        classes: names of classes by column and number.

    Raises:
        ImageError: it is none.
    """
    if isinstance(item, Mapping) and not ({"bytes", "path"} >= set(item) and item):
        return _mapping(item, selection, classes)
    if style == "torch":
        image, label = (item[0], item[1:2]) if isinstance(item, tuple | list) and item else (item, ())
        columns = [(LABEL, class_name(scalar(each), classes.get(LABEL))) for each in label]
        return Item(_image(image), None, dict(columns))
    if not isinstance(item, tuple | list) or not 2 <= len(item) <= 3:
        raise ImageError(f"{_what(item)}: expected (id, image) or (id, image, columns)", "no_image")
    name = row_id(scalar(item[0]))
    if name is None:
        raise ImageError(f"its id is {_what(item[0])}: expected a text or a number", "no_image")
    beside = item[2] if len(item) == 3 else {}
    values = beside if isinstance(beside, Mapping) else {LABEL: beside}
    texts = {str(column): as_text(scalar(value)) for column, value in values.items() if selection.keeps(str(column))}
    return Item(_image(item[1]), name, texts)


def _mapping(item: Mapping[Any, Any], selection: Selection, classes: Classes) -> Item:
    usual = (*IMAGE_COLUMNS, *(suffix[1:] for suffix in sorted(SUFFIXES)), *PATH_COLUMNS)
    column = selection.image or next((name for name in usual if item.get(name) is not None), None)
    if column not in item:
        keys = ", ".join(str(key) for key in list(item)[:20])
        raise ImageError(f"no image among its keys {keys}: name the image column", "no_image")
    name = item.get(selection.id or _KEY)
    texts = {
        str(key): class_name(scalar(value), classes.get(str(key)))
        for key, value in item.items()
        if key != column and not str(key).startswith("__") and selection.keeps(str(key)) and _is_scalar(value)
    }
    return Item(_image(item[column]), None if name is None else row_id(scalar(name)), texts)


def _is_scalar(value: Any) -> bool:
    return value is None or as_text(scalar(value)) is not None


def scalar(value: Any) -> Any:
    """The Python value of a number of numpy or torch."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray | torch.Tensor) and value.ndim == 0):
        return value.item()
    return value


def _image(value: Any) -> Any:
    try:
        return as_image(value)
    except ImageError as error:
        return error


def as_image(value: Any) -> Any:
    """An image in one of the forms that rows have; pixels become a PIL image.

    Args:
        value: encoded bytes, a path or URL, a Hugging Face image ``{bytes, path}``, a PIL image, or 8-bit pixels: a
            tensor ``[3, height, width]`` or an array ``[height, width, 3]``, of one channel too.

    Raises:
        ImageError: another kind of value, or an image that cannot be decoded.
    """
    if value is None or isinstance(value, str | bytes | os.PathLike | Mapping):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Image.Image):
        try:
            with decoding():
                value.load()  # here: two images may read from one file
        except Exception as error:  # decoders raise what they like on damage
            raise as_image_error(error) from None
        return value
    pixels = value
    if isinstance(pixels, torch.Tensor):
        pixels = pixels.detach().cpu().numpy()
        if pixels.ndim == 3 and pixels.dtype == np.uint8 and pixels.shape[0] in (1, 3):
            return _picture(np.moveaxis(pixels, 0, -1))
    elif isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8:
        if pixels.ndim == 2:
            return _picture(pixels[:, :, None])
        if pixels.ndim == 3 and pixels.shape[2] in (1, 3):
            return _picture(pixels)
    raise ImageError(
        f"its image is {_what(value)}: expected a PIL image, bytes, a path, "
        "a uint8 tensor [3, height, width] or a uint8 array [height, width, 3]",
        "no_image",
    )


def _picture(pixels: Any) -> Image.Image:
    if 0 in pixels.shape:
        raise ImageError(f"its image has no pixels: {list(pixels.shape)}", "no_image")
    return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))


def as_image_error(error: Exception) -> ImageError:
    """What an exception of a data set says about an item."""
    if isinstance(error, ImageError):
        return error
    if is_out_of_memory(error):
        return ImageError("not enough memory to read it", "out_of_memory")
    text = " ".join(str(error).split())[:200]
    reason = text if isinstance(error, ClipfastError) else f"{type(error).__name__}: {text}"
    if isinstance(error, FileNotFoundError):
        return ImageError(reason, "missing")
    return ImageError(f"damaged, or its data set failed ({reason})", "decode_error")


def _what(value: Any) -> str:
    """A value's type, and its shape where it has one, for a message."""
    if isinstance(value, np.ndarray | torch.Tensor):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"
