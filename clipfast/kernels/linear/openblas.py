"""Products of OpenBLAS, from the package ``scipy-openblas32`` (``pip install clipfast[openblas]``).

The package is a shared library and its headers; it needs no Fortran. Each part of the result is one ``cblas_sgemm`` on
one of torch's threads (``csrc/product.cpp``), so OpenBLAS's own threads never run beside them. The parts, and with them
the bits, depend on the shape alone. Bias and activation are applied to a part while it is in the cache.

``OPENBLAS_CORETYPE`` chooses OpenBLAS's kernels, else they are those of the CPU.
"""

import ctypes
import importlib
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from clipfast.kernels import buffers, native
from clipfast.kernels.native import Loaded
from clipfast.kernels.reference import Activation

PACKAGE = "scipy_openblas32"
_PREFIX = "scipy_"  # of every symbol, so that the library stands beside another BLAS
PARTS, SMALL_PARTS = (768, 768), (384, 192)
"""Rows and columns of a part, about. Small ones occupy more threads, and take 3 to 8 % longer to multiply."""
LARGEST_STRIDE = 2**31 - 1
"""OpenBLAS's integers have 32 bits."""
_THREADS = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True)
class OpenBlas:
    """The library as it was loaded.

    Attributes:
        version: as its configuration says, ``"0.3.34"``.
        core: whose kernels it runs, ``"SkylakeX"``, ``"Haswell"``, ….
        handle: for calls through ctypes.
    """

    version: str
    core: str
    handle: ctypes.CDLL


def _open(file: Path) -> ctypes.CDLL:
    """Opens the library without threads of its own: it starts them when it is loaded, as many as there are cores."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "1"
    try:
        return ctypes.CDLL(str(file))
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before


@cache
def load() -> Loaded[OpenBlas]:
    """Loads OpenBLAS once and hands its functions to the library in C++."""
    reasons = native.unsupported_reasons()
    if reasons:
        return Loaded(None, f"its products are called from the library in C++: {reasons[0]}")
    if importlib.util.find_spec(PACKAGE) is None:
        return Loaded(None, f"{PACKAGE} is not installed (pip install clipfast[openblas])")
    try:
        package = importlib.import_module(PACKAGE)
        handle = _open(Path(package.get_lib_dir(), package.get_library(fullname=True)))
        text = {}
        for name in ("config", "corename"):
            function = handle[f"{_PREFIX}openblas_get_{name}"]
            function.restype = ctypes.c_char_p
            text[name] = function().decode()
        if "USE64BITINT" in text["config"]:
            return Loaded(None, f"{PACKAGE} has 64-bit integers")
        names = ("cblas_sgemm", "openblas_get_num_threads", "openblas_set_num_threads")
        addresses = [ctypes.cast(handle[_PREFIX + name], ctypes.c_void_p).value or 0 for name in names]
    except (OSError, ImportError, AttributeError, StopIteration) as error:
        return Loaded(None, f"{PACKAGE} cannot be used ({type(error).__name__}: {error})")
    native.library().use_blas(*addresses)
    return Loaded(OpenBlas(text["config"].split()[1], text["corename"], handle))


def unsupported_reasons() -> list[str]:
    """Why OpenBLAS cannot be used here, empty when it can."""
    reason = load().reason
    return [reason] if reason else []


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: Activation | None,
    parts: tuple[int, int] = PARTS,
) -> Tensor:
    """``f(x Wᵀ + b)`` in float32.

    Args:
        x: ``[..., K]``, ``K`` at least 1.
        weight: ``[M, K]`` with contiguous rows.
        bias: ``[M]``, or None.
        activation: its name, None for none.
        parts: rows and columns of the parts that threads compute, about.

    Returns:
        ``[..., M]``, in the buffer pool where one is open.
    """
    columns, depth = weight.shape
    out = buffers.empty(x, *x.shape[:-1], columns)
    rows = x.reshape(-1, depth)
    if rows.stride(1) != 1 or not depth <= rows.stride(0) <= LARGEST_STRIDE:
        rows = rows.contiguous()
    shift = None if bias is None else bias.contiguous()
    native.library().product(rows, weight, shift, activation, out.view(-1, columns), *parts)
    return out


def product_in_small_parts(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
    """:func:`product` in parts enough for many threads."""
    return product(x, weight, bias, activation, SMALL_PARTS)
