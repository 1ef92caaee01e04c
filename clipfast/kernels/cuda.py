"""The CUDA library (``csrc/cuda``): where it is, and whether it can be used here or why not.

Like :mod:`clipfast.kernels.native` a shared library of C functions on raw pointers. ``setup.py`` builds it where it
finds ``nvcc``, or is asked to with ``CLIPFAST_CUDA=1``; no GPU is needed for that, and torch is not. It brings CUDA's
runtime along and shares with torch what belongs to the process: memory, and streams.
"""

import ctypes
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from clipfast.kernels import manifest
from clipfast.kernels.native import HERE, Loaded

LIBRARY = HERE / "_cuda.so"
FAILURE = HERE / "_cuda_failed.txt"
"""What setup.py writes where the build failed: the reason, one line."""

CAPABILITY = 90
"""Compute capability that it is compiled for, 9.0: machine code for Hopper alone."""
DEVICE = "cuda"
"""Where tensors must be; tests that run the kernels' threads on the CPU put that here."""
MOST_BLOCKS = 16
"""Blocks of a cluster: 8 anywhere, 16 on Hopper."""

_INT, _SIZE, _DOUBLE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_RESULT = ctypes.POINTER(_INT)
_ARGUMENTS: dict[str, list[type]] = {
    "clipfast_cuda_error": [_INT],
    "clipfast_cuda_capability": [_INT, _RESULT],
    "clipfast_cuda_span_clusters": [_INT, _INT, *[_SIZE] * 2, _INT, _RESULT],
    "clipfast_cuda_span": [
        *[_INT, _POINTER, _INT, _POINTER],
        *[*[_SIZE] * 3, _POINTER, *[_SIZE] * 4, _DOUBLE],
        *[*[_POINTER] * 3, _INT],
    ],
}


def _missing() -> str:
    if FAILURE.is_file():
        return f"its build failed: {FAILURE.read_text(encoding='utf-8').strip()}"
    return f"{LIBRARY.name} was not built: install the package where nvcc is on the PATH or in CUDA_HOME"


@cache
def load() -> Loaded[ctypes.CDLL]:
    """Loads the library once, after its record was checked."""
    if not LIBRARY.is_file():
        return Loaded(None, _missing())
    problem = manifest.problem(LIBRARY, HERE.parents[1] / "csrc" / "cuda")
    if problem:
        return Loaded(None, f"{problem}: install the package again (pip install -e . in a checkout)")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, arguments in _ARGUMENTS.items():
            getattr(library, name).argtypes = arguments
        library.clipfast_cuda_error.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:  # AttributeError: a library of another version
        return Loaded(None, f"{LIBRARY.name} cannot be loaded ({type(error).__name__}: {error})")
    return Loaded(library)


def _current(device: int) -> AbstractContextManager[object]:
    """Makes a device torch's current one; the library makes it its own runtime's and leaves it so."""
    return torch.cuda.device(device) if DEVICE == "cuda" else nullcontext()


class CudaError(RuntimeError):
    """CUDA reported an error."""


def _call(name: str, *arguments: object) -> None:
    library = load().library
    status = getattr(library, f"clipfast_cuda_{name}")(*arguments)
    if status:
        assert library is not None
        raise CudaError(f"{name}: {library.clipfast_cuda_error(status).decode(errors='replace')}")


def _query(name: str, *arguments: object) -> int:
    result = _INT(0)
    _call(name, *arguments, ctypes.byref(result))
    return result.value


@cache
def unsupported_reasons() -> list[str]:
    """Why the library cannot be used on this machine, empty when it can on at least one of its GPUs."""
    reason = load().reason
    if DEVICE == "cuda" and not torch.cuda.is_available():
        return ["no GPU", reason] if FAILURE.is_file() else ["no GPU"]  # without a GPU the library is not needed
    if reason:
        return [reason]
    try:
        capabilities = [_query("capability", device) for device in range(_query("capability", -1))]
    except CudaError as error:
        return [str(error)]
    if CAPABILITY in capabilities:
        return []
    others = ", ".join(str(capability / 10) for capability in capabilities)
    return [f"compiled for GPUs of compute capability {CAPABILITY / 10}: found [{others}]"]


@cache
def capability(device: int) -> int:
    """Compute capability of a device, 90 for 9.0."""
    return _query("capability", device)


@cache
def clusters(device: int, stored: torch.dtype, texts: int, rank: int) -> dict[int, int]:
    """How many heads' TEXTSPAN a device works on at once, by blocks of a cluster; none where their texts are too many.

    Args:
        device: its index.
        stored: dtype of the texts.
        texts: of a head.
        rank: of the texts.
    """
    at_once = {}
    for blocks in range(1, MOST_BLOCKS + 1):
        try:
            with _current(device):
                heads = _query("span_clusters", device, stored == torch.float64, texts, rank, blocks)
        except CudaError:  # a size that this device does not launch
            continue
        if heads:
            at_once[blocks] = heads
    return at_once


def call(name: str, device: torch.device, *arguments: object) -> None:
    """Queues a function of the library on a device's current stream.

    Args:
        name: without the prefix ``clipfast_cuda_``.
        device: of all tensors.
        arguments: as in ``csrc/cuda``, after the stream; a tensor stands for the address of its first element.

    Raises:
        CudaError: the launch failed.
    """
    plain = [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    with _current(device.index or 0):
        stream = torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else None
        _call(name, device.index or 0, stream, *plain)


def forget() -> None:
    """Clears what is cached about the library and its devices."""
    for function in (load, unsupported_reasons, capability, clusters):
        function.cache_clear()
