"""The library in C++ (``csrc/``): where it is, whether it can be used here, and if not, why.

It is built with the package (``setup.py``) and is no Python module: a shared library of C functions on raw pointers,
so one file serves every Python and every torch that clipfast supports. It computes on torch's own threads, through
``torch_parallel_for`` of torch's stable C interface; a second pool beside torch's would fight it for the cores.

``CLIPFAST_NATIVE_ISA`` caps the instruction set (``generic``, ``avx2``, ``avx512``, ``avx512_bf16``); the best that the
CPU has is taken otherwise. ``CLIPFAST_NATIVE_LIBRARY`` is the path of another build of the same sources; ``make
sanitize`` tests one that checks itself as it runs.
"""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "_native.so"
FAILURE = HERE / "_native_failed.txt"
"""What setup.py writes where the build failed: the reason, one line."""

ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
"""Instruction sets in ascending order, numbered as in ``csrc/isa.h``."""
VARIABLE = "CLIPFAST_NATIVE_ISA"
OTHER = "CLIPFAST_NATIVE_LIBRARY"

_STATUS = {1: "not enough memory", 2: "torch's thread pool failed"}
_INT, _SIZE, _DOUBLE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_ARGUMENTS: dict[str, list[type]] = {
    "clipfast_use_pool": [_POINTER],
    "clipfast_isa": [],
    "clipfast_limit_isa": [_INT],
    "clipfast_span": [_INT, _POINTER, *[_SIZE] * 3, _POINTER, *[_SIZE] * 4, _DOUBLE, *[_POINTER] * 3],
    "clipfast_activation": [_INT, _POINTER, _SIZE, _POINTER, *[_SIZE] * 2, _INT, _INT, _POINTER, _SIZE],
    "clipfast_activation_turned": [_POINTER, _SIZE, _POINTER, *[_SIZE] * 2, _INT, _INT, _POINTER, _SIZE],
    "clipfast_pairs_everywhere": [_INT],
    "clipfast_attention": [_INT, _POINTER, *[_SIZE] * 8, _DOUBLE, *[_POINTER] * 2, _INT],
    "clipfast_layer_norm": [_INT, _POINTER, *[_SIZE] * 5, *[_POINTER] * 3, _DOUBLE, _POINTER],
    "clipfast_query_row": [
        *[_INT, _POINTER],
        *[_POINTER, _SIZE, _SIZE, _SIZE] * 2,
        *[_SIZE] * 4,
        _DOUBLE,
        *[_POINTER] * 2,
    ],
    "clipfast_text_maps": [
        *[_INT, _POINTER, *[_SIZE] * 3],
        *[_POINTER, *[_SIZE] * 3],
        *[_POINTER] * 2,
        *[_SIZE] * 6,
        _POINTER,
    ],
    "clipfast_moments": [_INT, _POINTER, *[_SIZE] * 3, _POINTER, *[_SIZE] * 2, _POINTER, *[_SIZE] * 4, *[_POINTER] * 2],
}


@dataclass(frozen=True)
class Loaded:
    """The library, or the reason why there is none.

    Attributes:
        library: ready to be called.
        reason: one line, empty where there is a library.
    """

    library: ctypes.CDLL | None
    reason: str = ""


def path() -> Path:
    """The file that is loaded: the package's own, or the one that ``CLIPFAST_NATIVE_LIBRARY`` names."""
    return Path(os.environ.get(OTHER) or LIBRARY).absolute()  # a name alone would be looked for on the system


def _missing() -> str:
    if path() != LIBRARY:
        return f"{OTHER} is {str(path())!r}, and there is no such file"
    if FAILURE.is_file():
        return f"its build failed: {FAILURE.read_text(encoding='utf-8').strip()}"
    return f"{LIBRARY.name} was not built: install the package (pip install -e . in a checkout)"


def _outdated() -> bool:
    """Whether this is a checkout whose sources are newer than what was built from them."""
    built = path().stat().st_mtime
    return any(source.stat().st_mtime > built for source in (HERE.parent / "csrc").glob("*.*"))


def _pool() -> int:
    """Address of ``torch_parallel_for``."""
    folder = Path(torch.__file__).parent / "lib"
    found = next((path for path in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib") if path.exists()), None)
    if found is None:
        raise OSError(f"no libtorch_cpu in {folder}")
    try:
        function = ctypes.CDLL(str(found)).torch_parallel_for  # the one that is loaded already
    except AttributeError:
        raise OSError(f"torch {torch.__version__} has no torch_parallel_for") from None
    return ctypes.cast(function, ctypes.c_void_p).value or 0


@cache
def load() -> Loaded:
    """Loads the library once."""
    file = path()
    if not file.is_file():
        return Loaded(None, _missing())
    if _outdated():
        again = "pip install -e ." if file == LIBRARY else str(file)
        return Loaded(None, f"csrc/ was changed after the build: build again ({again})")
    wanted = os.environ.get(VARIABLE, ISAS[-1])
    if wanted not in ISAS:
        return Loaded(None, f"{VARIABLE} is {wanted!r}: choose one of {', '.join(ISAS)}")
    try:
        library = ctypes.CDLL(str(file))
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.clipfast_use_pool.restype = None
        library.clipfast_use_pool(_pool())
    except (OSError, AttributeError) as error:  # AttributeError: a library of another version
        return Loaded(None, f"{file.name} cannot be loaded ({type(error).__name__}: {error})")
    library.clipfast_limit_isa(ISAS.index(wanted))
    return Loaded(library)


def refusals() -> list[str]:
    """Why the library cannot be used on this machine, empty when it can."""
    reason = load().reason
    return [reason] if reason else []


def limit(isa: str) -> str:
    """Caps the instruction set from now on, for tests of each; returns the one taken.

    Args:
        isa: one of :data:`ISAS`; what the CPU lacks comes down to what it has.
    """
    library = load().library
    return ISAS[library.clipfast_limit_isa(ISAS.index(isa))] if library is not None else ""


def isa() -> str:
    """The instruction set in use, empty without the library."""
    library = load().library
    if library is None:
        return ""
    return ISAS[library.clipfast_isa()]


def pairs_everywhere(wanted: bool) -> bool:
    """Whether attention of bfloat16 multiplies pairs on every instruction set from now on, for tests of that kernel.

    AVX512-BF16 has instructions for it and always does. On the others they are emulated: slow, but the same arithmetic.

    Returns:
        What was so before.
    """
    library = load().library
    return library is not None and bool(library.clipfast_pairs_everywhere(wanted))


def call(name: str, *arguments: object) -> None:
    """Calls a function of the library.

    Args:
        name: without the prefix ``clipfast_``.
        arguments: as in ``csrc/``; a tensor stands for the address of its first element.

    Raises:
        MemoryError: no memory for what it needs besides its arguments.
        RuntimeError: the thread pool failed.
    """
    plain = [given.data_ptr() if isinstance(given, torch.Tensor) else given for given in arguments]
    status = getattr(load().library, f"clipfast_{name}")(*plain)
    if status:
        raise (MemoryError if status == 1 else RuntimeError)(f"{name}: {_STATUS[status]}")
