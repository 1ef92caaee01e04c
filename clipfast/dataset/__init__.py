"""Data sets: images in files, folders and tar shards, their labels, and what is collected from them.

>>> clipfast.dataset.collect("shards/{0000..0099}.tar", "collection", model)
>>> data = clipfast.dataset.open("collection")

Importing the package imports nothing else: names below are loaded at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "Dataset": "clipfast.dataset.opening",
    "collect": "clipfast.dataset.api",
    "export": "clipfast.dataset.exporting",
    "open": "clipfast.dataset.opening",
    "validate": "clipfast.dataset.validating",
}

__all__ = ["Dataset", "collect", "export", "open", "validate"]

if TYPE_CHECKING:
    from clipfast.dataset.api import collect
    from clipfast.dataset.exporting import export
    from clipfast.dataset.opening import Dataset, open
    from clipfast.dataset.validating import validate


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clipfast.dataset' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
