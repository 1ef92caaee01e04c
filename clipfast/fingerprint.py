"""Which weights a vision tower has: a fingerprint of every byte, and checks that are cheap enough for every call.

torch counts a version for every tensor, which grows when it is changed in place, but not when it is written to through
``.data``. What is computed from weights and kept, a basis above all, is therefore kept by the weights' bytes.

XXH3 hashes as fast as memory is read: the 350 MB of ViT-B-32 take 13 ms (28 GB/s on two cores of an AMD EPYC), where
SHA-256 takes 340 ms, CRC-32 170 ms and BLAKE2b 560 ms. It is no signature: it tells weights apart that differ by
accident, not those made to collide.
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from clipfast.errors import InputError
from clipfast.towers.tower import Tower, weights_version

SECONDS_BETWEEN_CHECKS = 1.0
"""How often bytes on a GPU are read, which waits for it. On the CPU they are read at every call."""
_SAMPLES = 16
"""Elements of a tensor that :class:`Weights` compares where reading all would take too long."""


def fingerprint(tower: Tower) -> str:
    """A digest of a vision tower: the name, dtype, shape and bytes of every weight, and what else it computes with.

    Equal on every device and for every number of threads; another dtype, activation or pooling gives another one.

    Args:
        tower: the model.

    Returns:
        32 hexadecimal digits (XXH3-128).

    Raises:
        InputError: weights on the meta device, which have no values.
    """
    digest = xxhash.xxh3_128()
    _update(digest, "tower", tower)
    return digest.hexdigest()


def _update(digest: Any, name: str, part: object) -> None:
    """Adds a tower, a part of one, or a setting to a digest."""
    if isinstance(part, Tensor):
        digest.update(f"{name} {str(part.dtype).removeprefix('torch.')} {list(part.shape)}\n".encode())
        digest.update(tensor_bytes(part))
    elif is_dataclass(part):
        for field in fields(part):
            value = getattr(part, field.name)
            is_default = not isinstance(value, Tensor) and value == field.default  # in no tower before there was one
            if field.name not in ("run", "sources") and not is_default:
                _update(digest, f"{name}.{field.name}", value)
    elif isinstance(part, tuple) and any(is_dataclass(item) or isinstance(item, Tensor) for item in part):
        for index, item in enumerate(part):
            _update(digest, f"{name}.{index}", item)
    else:
        digest.update(f"{name} {json.dumps(part)}\n".encode())


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's bytes as a buffer, in the order of its elements; without a copy where it lies so on the CPU.

    Raises:
        InputError: a tensor on the meta device.
    """
    _refuse_meta(tensor)
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _refuse_meta(tensor: Tensor) -> None:
    if tensor.device.type == "meta":
        raise InputError("the weights are on the meta device and have no values: load them first")


def checksum(tensors: Iterable[Tensor]) -> int:
    """A 64-bit number that changes with any byte of the tensors, computed on their device."""
    listed = [tensor.detach() for tensor in tensors]
    if all(tensor.device.type == "cpu" for tensor in listed):
        digest = xxhash.xxh3_64()
        for tensor in listed:
            digest.update(tensor_bytes(tensor))
        return digest.intdigest()
    return hash(tuple(torch.stack([_weighted_sum(tensor) for tensor in listed]).tolist()))


def _weighted_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's words, each times an odd number that depends on its position; stays on the device."""
    _refuse_meta(tensor)
    words = tensor.contiguous().reshape(-1).view(_WORDS[tensor.element_size()]).long()
    return (words * (2 * torch.arange(len(words), device=words.device) + 1)).sum()


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def basis_checksum(tower: Tower) -> int:
    """:func:`checksum` of the weights that a basis is made of: 30 MB of ViT-B-32's, read in 0.8 ms."""
    return checksum(basis_weights(tower))


def basis_weights(tower: Tower) -> list[Tensor]:
    """The weights that a basis is made of."""
    frame = [part for part in (tower.projection, tower.projection_bias) if part is not None]
    for part in (tower.ln_post, tower.pool):
        frame += [] if part is None else part.tensors()
    return [*frame, *(tensor for block in tower.blocks for tensor in block.output().tensors())]


def _is_plain(tensor: Tensor) -> bool:
    """Whether its bytes can be read where they are."""
    return tensor.is_contiguous() and not tensor.is_neg()


class Weights:
    """Numbers that change when weights do, for caches that are looked up at every call.

    Weights are noticed that were replaced, moved, changed in place, or written to through ``.data``. On a GPU, writes
    through ``.data`` are looked for once a second, since that waits for the GPU.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[int, float, int]] = {}  # use → version, time, checksum
        self._views: tuple[int, list[Any]] | None = None  # version, and a view of a few elements of every tensor
        self._basis_bytes: tuple[int, list[Any]] | None = None  # version, and the memory of every tensor of a basis

    def of_tower(self, tower: Tower) -> tuple[int, int]:
        """Changes with any byte of the weights that a basis is made of; and :meth:`all` of a tower's tensors."""
        return self._now(tower) if tower.device.type == "cpu" else self._once_a_second(tower)

    def _now(self, tower: Tower) -> tuple[int, int]:
        version = tower.version()
        if self._basis_bytes is None or self._basis_bytes[0] != version:
            self._basis_bytes = version, [tensor_bytes(tensor) for tensor in basis_weights(tower) if _is_plain(tensor)]
        digest = xxhash.xxh3_64()
        for part in self._basis_bytes[1]:
            digest.update(part)
        for tensor in basis_weights(tower):
            if not _is_plain(tensor):
                digest.update(tensor_bytes(tensor))
        return hash((tower.dtype, digest.intdigest())), self._sampled(tower.tensors(), version)

    def _once_a_second(self, tower: Tower) -> tuple[int, int]:
        version = tower.version()
        basis = self._seldom("basis", version, lambda: basis_checksum(tower))
        return basis, self._seldom("all", version, lambda: checksum(map(_sample, tower.tensors())))

    def all(self, tensors: Iterable[Tensor]) -> int:
        """Changes when any tensor does, except for single elements that are written through ``.data``.

        Compares the version and a few elements of every tensor; :func:`fingerprint` reads all bytes.
        """
        listed = list(tensors)
        version = weights_version(listed)
        if any(tensor.device.type != "cpu" for tensor in listed):
            return self._seldom("all", version, lambda: checksum([_sample(tensor) for tensor in listed]))
        return self._sampled(listed, version)

    def _sampled(self, tensors: Iterable[Tensor], version: int) -> int:
        """For tensors on the CPU, of that version."""
        if self._views is None or self._views[0] != version:
            self._views = version, [_sample_view(tensor) for tensor in tensors if tensor.is_contiguous()]
        return hash((version, *(view.tobytes() for view in self._views[1])))

    def _seldom(self, use: str, version: int, read: Callable[[], int]) -> int:
        last = self._read.get(use)
        now = time.monotonic()
        if last is None or last[0] != version or now - last[1] >= SECONDS_BETWEEN_CHECKS:
            self._read[use] = last = version, now, read()
        return hash((version, last[2]))


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES)]


def _sample_view(tensor: Tensor) -> Any:
    """A few elements of a contiguous tensor on the CPU as a numpy array that shares its memory."""
    words = tensor.detach().view(-1).view(_WORDS[tensor.element_size()]).numpy()
    return words[:: max(1, len(words) // _SAMPLES)]
