"""Results on disk: one safetensors file with a header and a checksum for every part of it.

The metadata has one entry, because safetensors writes several in no fixed order: the checksum of the header, then the
header as JSON. The header holds a checksum of every tensor: of its dtype, its shape and its bytes. So the checksum of
the header identifies the whole file (:func:`file_checksum`).

Checksums are xxh3_128, at 14.6 GB/s on one core of the machine where clipfast is developed, against 2.6 for zlib.crc32
and 0.5 for blake2b (copying memory there: 2.6 GB/s). They find damage, not forgery.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clipfast.errors import InputError
from clipfast.files import atomic_write

_ENTRY = "clipfast"
_CHECKSUMS = "checksums"
_DIGITS = 32  # of a checksum in hexadecimal


def write(path: str | PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors with a header that names its ``format``; the same contents give the same bytes.

    The file is replaced as a whole: see :func:`clipfast.files.atomic_write`.

    Raises:
        OSError: the file cannot be written.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**header, _CHECKSUMS: {name: _tensor_checksum(tensor) for name, tensor in on_cpu.items()}})
    with atomic_write(path) as partial:
        try:
            save_file(on_cpu, partial, metadata={_ENTRY: checksum(text.encode()) + text})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error


def read(
    path: str | PathLike[str], kind: str, writer: str, device: str | torch.device = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that :func:`write` wrote, after checking every checksum.

    Args:
        path: the file.
        kind: the ``format`` that its header must name.
        writer: the function that writes such files, for the message.
        device: where the tensors go.

    Raises:
        InputError: not such a file, damaged, or written by a version without checksums.
        FileNotFoundError: no such file.
    """
    with _opened(path) as file:
        text = _header_text(path, file)
        if text is None:
            raise InputError(f"{path} is a safetensors file, but not one that {writer} wrote")
        header = _parsed(path, text)
        if header.get("format") != kind:
            raise InputError(f"{path} is a safetensors file, but not one that {writer} wrote")
        expected = header.pop(_CHECKSUMS, None)
        names = set(file.keys())
        if not isinstance(expected, dict) or set(expected) != names:
            raise InputError(f"{path} is damaged: its tensors are not those of its header")
        tensors = {}
        for name in sorted(names):
            tensor = file.get_tensor(name)
            if _tensor_checksum(tensor) != expected[name]:
                raise InputError(f"{path} is damaged: the checksum of {name} does not match")
            tensors[name] = tensor.to(device)
        return header, tensors


def file_checksum(path: str | PathLike[str]) -> str:
    """The checksum of a file's header, which holds those of its tensors; reads the header alone.

    Raises:
        InputError: a file that :func:`write` did not write, or with a damaged header.
        FileNotFoundError: no such file.
    """
    with _opened(path) as file:
        text = _header_text(path, file)
        if text is None:
            raise InputError(f"{path} is a safetensors file, but not one that clipfast wrote")
        return checksum(text.encode())


def checksum(data: bytes) -> str:
    """The checksum of some bytes, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


@contextlib.contextmanager
def as_damage(path: str | PathLike[str]) -> Iterator[None]:
    """Around code that uses a header: what it raises about a missing or unfit entry becomes an :class:`InputError`."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged: its header does not fit its tensors ({error!r})") from error


def _tensor_checksum(tensor: Tensor) -> str:
    state = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


@contextlib.contextmanager
def _opened(path: str | PathLike[str]) -> Iterator[Any]:
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder, not a file")
    if Path(path).exists() and not Path(path).is_file():
        raise InputError(f"{path} is not a regular file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file ({error})") from error


def _header_text(path: str | PathLike[str], file: Any) -> str | None:
    """The header's JSON with its checksum checked; None where the file has no header of ours."""
    entry = (file.metadata() or {}).get(_ENTRY)
    if entry is None:
        return None
    if entry.startswith("{"):
        raise InputError(f"{path} was written by an older version of clipfast, without checksums: write it again")
    text = str(entry[_DIGITS:])
    if checksum(text.encode()) != entry[:_DIGITS]:
        raise InputError(f"{path} is damaged: the checksum of its header does not match")
    return text


def _parsed(path: str | PathLike[str], text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise InputError(f"{path} is damaged: its header is not a JSON object")
    return header
