"""Arrays of a whole collection with the names of their axes, for xarray. They read what is selected, when it is used.

xarray selects lazily from what its backends give it, a :class:`xarray.backends.BackendArray`. A collection is one.
"""

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import xarray
from xarray.backends import BackendArray
from xarray.core import indexing

from clipfast.dataset.arrays import ARRAYS, Array
from clipfast.dataset.images_table import SCHEMA

if TYPE_CHECKING:
    from clipfast.dataset.opening import Dataset

COORDINATES = ("id", "label", "group", "status", "mean", "std", "norm")
"""Columns of the images' table that label the axis of images."""


class _Lazy(BackendArray):
    """An array of a collection, or a column of its table."""

    def __init__(self, data: "Dataset", name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.data, self.name, self.shape, self.dtype = data, name, shape, dtype

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        support = indexing.IndexingSupport.OUTER
        return indexing.explicit_indexing_adapter(key, self.shape, support, self._read)

    def _read(self, key: tuple[Any, ...]) -> Array:
        """Values at integers, slices and lists of integers, one per axis."""
        whole = [slice(each, each + 1) if isinstance(each, int | np.integer) else each for each in key]
        values = self.data.column(self.name, *whole) if self.name in SCHEMA.names else self.data.at(self.name, whole)
        return values[tuple(0 if isinstance(each, int | np.integer) else slice(None) for each in key)]

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # nothing in it changes


def labelled(data: "Dataset", name: str) -> xarray.DataArray:
    """An array of a collection.

    Args:
        data: the collection.
        name: of the array, which was kept.

    Returns:
        The array with coordinates ``layer``, ``head`` or ``term`` for selecting, and for each image ``id``, ``label``,
        ``group``, ``status``, ``mean``, ``std`` and ``norm``.

    Raises:
        InputError: a file is gone or damaged.
    """
    dims = ARRAYS[name].dims
    coordinates: dict[str, Any] = {
        column: xarray.Variable("image", _lazy(data, column, (len(data),), _dtype(column))) for column in COORDINATES
    }
    coordinates |= {dim: (dim, labels) for dim, labels in data.labels(name).items()}
    values = _lazy(data, name, data.shape(name), data.dtype(name))
    attributes = {"long_name": ARRAYS[name].meaning, "units": "1"}
    return xarray.DataArray(xarray.Variable(dims, values, attributes), coordinates, name=name)


def _lazy(data: "Dataset", name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    return indexing.LazilyIndexedArray(_Lazy(data, name, shape, dtype))


def _dtype(column: str) -> np.dtype[Any]:
    return np.dtype(np.float64) if column in ("mean", "std", "norm") else np.dtype(object)
