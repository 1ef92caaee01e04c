"""The library in C++ (``csrc/``): where it is, whether it can be used here, and if not, why.

``setup.py`` builds it with pybind11 as the extension module ``_native``, for one version of Python and any torch that
clipfast supports: it contains nothing of torch. It reads tensors through torch's DLPack table of C functions and
computes on torch's own threads, through ``torch_parallel_for`` of torch's stable C interface; a second pool of threads
would compete with torch's for the cores.

``CLIPFAST_NATIVE_ISA`` caps the instruction set (``generic``, ``avx2``, ``avx512``, ``avx512_bf16``); the default is
the best that the CPU has. ``CLIPFAST_NATIVE_LIBRARY`` is the path of another build of the same sources: ``make
sanitize`` tests one that checks itself as it runs.
"""

import ctypes
import importlib.util
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from clipfast.kernels import manifest

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / f"_native{sysconfig.get_config_var('EXT_SUFFIX') or '.so'}"
FAILURE = HERE / "_native_failed.txt"
"""What setup.py writes where the build failed: the reason, one line."""

ISAS = ("generic", "avx2", "avx512", "avx512_bf16")
"""Instruction sets in ascending order."""
ISA_VARIABLE = "CLIPFAST_NATIVE_ISA"
LIBRARY_VARIABLE = "CLIPFAST_NATIVE_LIBRARY"


class Library(Protocol):
    """The module ``_native``. Shapes, dtypes and strides of every argument are in ``csrc/operations.h``.

    What computes raises ValueError for arguments that it does not expect, MemoryError where it cannot allocate scratch
    memory and RuntimeError where torch's thread pool fails.
    """

    def use_torch(self, tensor: type[Tensor], parallel_for: int) -> None: ...
    def use_blas(self, sgemm: int, get_threads: int, set_threads: int) -> None: ...
    def isa(self) -> str: ...
    def limit_isa(self, name: str) -> str: ...
    def emulate_bf16_pairs(self, enabled: bool) -> bool: ...

    def activation(self, x: Tensor, bias: Tensor | None, activation: str | None, out: Tensor) -> None: ...
    def add_layer_norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor
    ) -> None: ...
    def attention(self, qkv: Tensor, mean: bool, out: Tensor, alpha: Tensor | None) -> None: ...
    def moments(self, codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> None: ...
    def product(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        out: Tensor,
        part_rows: int,
        part_columns: int,
    ) -> None: ...
    def query_row(self, query: Tensor, key: Tensor, value: Tensor, z: Tensor, alpha: Tensor) -> None: ...
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> None: ...
    def span(
        self, texts: Tensor, factor: Tensor, floor: float, picks: Tensor, variance: Tensor, directions: Tensor
    ) -> None: ...
    def text_maps(self, alpha: Tensor, value: Tensor, basis: Tensor, heads: Tensor | None, out: Tensor) -> None: ...
    def weighted_rows(self, qkv: Tensor, weights: Tensor, out: Tensor) -> None: ...

    def add_layer_norm_unsupported_reasons(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor
    ) -> list[str]: ...
    def attention_unsupported_reasons(self, qkv: Tensor) -> list[str]: ...
    def layered_text_maps_unsupported_reasons(
        self, alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None
    ) -> list[str]: ...
    def linear_unsupported_reasons(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]: ...
    def linear_activation_unsupported_reasons(self, x: Tensor, weight: Tensor, bias: Tensor) -> list[str]: ...
    def moments_unsupported_reasons(
        self, codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor
    ) -> list[str]: ...
    def query_row_unsupported_reasons(self, query: Tensor, key: Tensor, value: Tensor) -> list[str]: ...
    def rotate_unsupported_reasons(self, x: Tensor, cos: Tensor, sin: Tensor) -> list[str]: ...
    def span_unsupported_reasons(self, texts: Tensor, factor: Tensor) -> list[str]: ...
    def text_maps_unsupported_reasons(
        self, alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None
    ) -> list[str]: ...
    def text_maps_from_tokens_unsupported_reasons(
        self,
        alpha: Tensor,
        tokens: Tensor,
        value_weight: Tensor,
        value_bias: Tensor,
        text_basis: Tensor,
        out: Tensor,
    ) -> list[str]: ...
    def weighted_rows_unsupported_reasons(self, qkv: Tensor, weights: Tensor) -> list[str]: ...


Handle = TypeVar("Handle")


@dataclass(frozen=True)
class Loaded(Generic[Handle]):
    """A library, or the reason why there is none.

    Attributes:
        library: what its functions are called through, None where it cannot be used.
        reason: why not, one line; empty where there is a library.
    """

    library: Handle | None
    reason: str = ""


def path() -> Path:
    """The file that is loaded: the package's own, or the one that ``CLIPFAST_NATIVE_LIBRARY`` names."""
    return Path(os.environ.get(LIBRARY_VARIABLE) or LIBRARY).absolute()


def _missing() -> str:
    if path() != LIBRARY:
        return f"{LIBRARY_VARIABLE} is {str(path())!r}, and there is no such file"
    if FAILURE.is_file():
        return f"its build failed: {FAILURE.read_text(encoding='utf-8').strip()}"
    return f"{LIBRARY.name} was not built: install the package (pip install -e . in a checkout)"


def _parallel_for() -> int:
    """The address of ``torch_parallel_for``."""
    folder = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib")
    file = next((folder / name for name in names if (folder / name).exists()), None)
    if file is None:
        raise OSError(f"no libtorch_cpu in {folder}")
    try:
        function = ctypes.CDLL(str(file)).torch_parallel_for  # torch has loaded this file already
    except AttributeError:
        raise OSError(f"torch {torch.__version__} has no torch_parallel_for") from None
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _import(file: Path) -> Library:
    loader = ExtensionFileLoader(f"{__package__}._native", str(file))
    spec = importlib.util.spec_from_file_location(loader.name, file, loader=loader)
    assert spec is not None
    module: Any = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    library: Library = module
    return library


@cache
def load() -> Loaded[Library]:
    """Loads the library once. What cannot be loaded safely is not: its record is checked first."""
    file = path()
    if not file.is_file():
        return Loaded(None, _missing())
    if file == LIBRARY or manifest.path_for(file).exists():
        problem = manifest.problem(file, HERE.parents[1] / "csrc")
        if problem:
            return Loaded(None, f"{problem}: install the package again (pip install -e . in a checkout)")
    isa = os.environ.get(ISA_VARIABLE, ISAS[-1])
    if isa not in ISAS:
        return Loaded(None, f"{ISA_VARIABLE} is {isa!r}: choose one of {', '.join(ISAS)}")
    try:
        library = _import(file)
        library.use_torch(torch.Tensor, _parallel_for())
    except (OSError, ImportError, AttributeError, TypeError, RuntimeError) as error:
        return Loaded(None, f"{file.name} cannot be loaded ({type(error).__name__}: {error})")
    library.limit_isa(isa)
    return Loaded(library)


def unsupported_reasons() -> list[str]:
    """Why the library cannot be used on this machine, empty when it can."""
    reason = load().reason
    return [reason] if reason else []


def library() -> Library:
    """The module ``_native``.

    Raises:
        RuntimeError: it cannot be used; with the reason.
    """
    loaded = load()
    if loaded.library is None:
        raise RuntimeError(f"native: {loaded.reason}")
    return loaded.library


def limit(isa: str) -> str:
    """Caps the instruction set from now on, for tests; returns the one in use then, empty without the library.

    Args:
        isa: one of :data:`ISAS`. Where the CPU lacks it, the best that the CPU has is used.
    """
    loaded = load().library
    return "" if loaded is None else loaded.limit_isa(isa)


def isa() -> str:
    """The instruction set in use, empty without the library."""
    loaded = load().library
    return "" if loaded is None else loaded.isa()


def emulate_bf16_pairs(enabled: bool) -> bool:
    """Whether attention of bfloat16 multiplies pairs on every instruction set from now on, for tests of that kernel.

    AVX512-BF16, which has instructions for it, always does. The others emulate them: slow, but the same arithmetic.

    Returns:
        The previous setting.
    """
    loaded = load().library
    return loaded is not None and loaded.emulate_bf16_pairs(enabled)


def float32(tensor: Tensor) -> Tensor:
    """The same values in contiguous float32."""
    return tensor.float().contiguous()


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The same values with a contiguous last axis."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
