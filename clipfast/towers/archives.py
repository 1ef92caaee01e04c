"""The weights of a TorchScript archive, read without running any of the code in it.

An archive is a zip of storages, code, and a pickle of module objects. ``torch.jit.load`` compiles the code; an ordinary
unpickler calls whatever the pickle names. Here the pickle is read by an unpickler that knows four things: modules
become plain records of their attributes, storages become numbers of bytes, tensors become records of shape and storage,
and lists of numbers stay lists. Anything else ends the reading. Tensors are made of the records afterwards, each
checked against its storage.
"""

import io
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast.errors import ModelError

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
_LARGEST_PICKLE = 64 << 20  # that of ViT-L-14 has 0.3 MB: it holds no weights
_DEEPEST = 64  # modules inside modules


@dataclass(frozen=True)
class Archive:
    """What a TorchScript archive holds of a model.

    Attributes:
        weights: the tensors among its modules' attributes, by name, as a state dict names them.
        classes: names of its modules' classes.
    """

    weights: dict[str, Tensor]
    classes: frozenset[str]


def is_archive(path: str | Path | None) -> bool:
    """Whether a file is a TorchScript archive: a zip with code in it, which torch.save's zips have not."""
    if path is None or not Path(path).is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def uses_quick_gelu(classes: frozenset[str]) -> bool | None:
    """The activation that classes of modules say: QuickGELU, GELU, or None for neither."""
    return True if "QuickGELU" in classes else False if "GELU" in classes else None


def read(path: str | Path, *, tensors: bool = True) -> Archive:
    """Reads a TorchScript archive's weights; its code is not run.

    Args:
        path: of the archive.
        tensors: read the weights, not the classes alone.

    Raises:
        ModelError: it is damaged, or its pickle holds something else than modules and plain tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive, tensors)
    except _Refused as error:
        raise ModelError(f"the archive {path} is not loaded: {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        text = " ".join(str(error).split())[:160]
        raise ModelError(f"cannot read the archive {path}: damaged ({type(error).__name__}: {text})") from error


class _Refused(Exception):
    """What an archive holds that is not read."""


class _Module:
    """A module object: its attributes."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: Mapping[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            raise _Refused("a module in it has a state of its own kind")
        self.attributes = state


class _Storage(NamedTuple):
    """A tensor's bytes: where they are in the archive."""

    key: str
    dtype: torch.dtype
    numbers: int


class _Tensor:
    """A tensor that is made after the pickle has been read."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: object) -> None:
        sizes = (*shape, *strides, offset)
        if not isinstance(storage, _Storage) or any(type(size) is not int or size < 0 for size in sizes):
            raise _Refused("a tensor in it is none of plain numbers")
        self.storage, self.offset, self.shape, self.strides = storage, offset, tuple(shape), tuple(strides)

    def __setstate__(self, state: object) -> None:
        raise _Refused("a tensor in it has a state of its own kind")


class _Unpickler(pickle.Unpickler):
    """Reads modules and tensors as records and nothing else."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.classes: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name: it is called with what the pickle gives."""
        if module.startswith("__torch__.") or module == "__torch__":
            self.classes.add(name)
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle" and name in (*_LISTS, "restore_type_tag"):
            return lambda items, *_: items
        raise _Refused(f"it holds more than weights ({module}.{name})")

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that the pickle names."""
        kind, dtype, key, _, count = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or type(count) is not int:
            raise _Refused("it names something else than storages")
        return _Storage(key, dtype, count)


def _read(archive: zipfile.ZipFile, tensors: bool) -> Archive:
    names = archive.namelist()
    root = next(name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl"))
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder").decode() != sys.byteorder:
        raise _Refused("it was written on a machine of another byte order")
    if archive.getinfo(f"{root}data.pkl").file_size > _LARGEST_PICKLE:
        raise _Refused(f"its pickle is larger than {_LARGEST_PICKLE >> 20} MB")
    unpickler = _Unpickler(archive.read(f"{root}data.pkl"))
    model = unpickler.load()
    if not isinstance(model, _Module):
        raise _Refused("it holds no module")
    storages: dict[_Storage, Tensor] = {}
    weights = {}
    for name, record in _tensors(model, "") if tensors else ():
        if record.storage not in storages:
            storages[record.storage] = _storage(archive, root, record.storage)
        weights[name] = storages[record.storage].as_strided(record.shape, record.strides, record.offset)
    return Archive(weights, frozenset(unpickler.classes))


def _tensors(module: _Module, prefix: str, depth: int = 0) -> Iterator[tuple[str, _Tensor]]:
    """The tensors among a module's attributes and those of the modules in it, by name."""
    if depth > _DEEPEST:
        raise _Refused("its modules hold each other")
    for name, value in module.attributes.items():
        if isinstance(value, _Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.", depth + 1)


def _storage(archive: zipfile.ZipFile, root: str, storage: _Storage) -> Tensor:
    """The numbers of a storage, one after the other."""
    entry = archive.getinfo(f"{root}data/{storage.key}")
    size = storage.numbers * storage.dtype.itemsize
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size:
        raise _Refused(f"its storage {storage.key} has {entry.file_size} bytes in place of {size}")
    if not size:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(archive.read(entry)), dtype=storage.dtype)
