"""The library in C++ under each of its instruction sets, on any number of threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from clipfast.kernels import dispatch, native

CORES = os.cpu_count() or 1
THREADS = range(1, CORES + 2)
"""One more than there are cores, too: then they take turns."""


@contextmanager
def capped(isa: str) -> Iterator[bool]:
    """Computes with at most this instruction set; says whether that is the one in use."""
    before = native.isa()
    try:
        yield native.limit(isa) == isa
    finally:
        if before:
            native.limit(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Computes on so many of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable() -> list[str]:
    """The instruction sets that the CPU has, and the library with them."""
    isas = []
    for isa in native.ISAS:
        with capped(isa) as used:
            isas += [isa] if used else []
    return isas


def native_operations() -> set[str]:
    """The operations that the library computes."""
    backend = next(backend for backend in dispatch.BACKENDS if backend.name == "native")
    return set(backend.implementations())
