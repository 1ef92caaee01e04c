"""Runs the library in C++ with each of its instruction sets, on any number of threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from clipfast.kernels import dispatch, native

CORES = os.cpu_count() or 1
THREADS = range(1, CORES + 2)
"""Up to one more than there are cores: then they take turns."""


@contextmanager
def capped(isa: str) -> Iterator[bool]:
    """Caps the instruction set; yields whether the CPU has this one, so that it is in use."""
    before = native.isa()
    try:
        yield native.limit(isa) == isa
    finally:
        if before:
            native.limit(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Computes on this number of torch's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usable() -> list[str]:
    """The instruction sets that the CPU has and the library uses."""
    isas = []
    for isa in native.ISAS:
        with capped(isa) as used:
            isas += [isa] if used else []
    return isas


def isa_parameters() -> list[Any]:
    """Every instruction set as a parameter, ``avx512`` as a slow one where the CPU has AVX512-BF16.

    There both run the same code but for attention in bfloat16, so most of what one of them shows the other shows, too.
    """
    return [pytest.param(isa, marks=[pytest.mark.slow] if is_repetition(isa) else []) for isa in native.ISAS]


def is_repetition(isa: str) -> bool:
    """Whether another instruction set that the CPU has runs nearly the same code."""
    return isa == "avx512" and "avx512_bf16" in usable()


def native_operations() -> set[str]:
    """The operations that the library computes."""
    backend = next(backend for backend in dispatch.BACKENDS if backend.name == "native")
    return set(backend.implementations())
