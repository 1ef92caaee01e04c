"""A kernel launch as a value: what is run on a GPU is what is compiled offline and counted.

Every Triton operation of clipfast first makes a :class:`Launch` from its arguments and then runs it. Made from tensors
on torch's ``meta`` device the same launch can be compiled for any GPU without having one
(``python -m benchmarks.compiled``).
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``), decided when it is imported."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels read: float64 would need float64 sums."""


@dataclass(frozen=True)
class Config:
    """One way to cut an operation into programs.

    Attributes:
        blocks: tile sizes by the kernel's own names, ``{"BLOCK_M": 128}``.
        warps: warps per program.
        stages: depth of the software pipeline.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        sizes = "x".join(str(size) for size in self.blocks.values())
        return f"{sizes}w{self.warps}s{self.stages}"


_WHOLE = Config({})
"""Of a kernel that is not cut."""

_NO_GUARD: AbstractContextManager[Any] = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which a CUDA device is the current one; nothing where it is already, or for other devices.

    Triton launches on the current device and its current stream, wherever the tensors are.
    """
    if device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(device.index)


class _Thread(threading.local):
    launcher: "Callable[[Launch], object] | None" = None
    capability = 90


_thread = _Thread()


@contextmanager
def instead(launcher: "Callable[[Launch], object]") -> Iterator[None]:
    """A context in which this thread's launches are given to ``launcher`` and not run.

    Results are memory that nobody wrote. It is how kernels are compiled ahead of their first run, and how Python's
    share of a call is measured without a GPU.
    """
    before, _thread.launcher = _thread.launcher, launcher
    try:
        yield
    finally:
        _thread.launcher = before


@dataclass(slots=True)
class Launch:
    """A kernel with its grid and arguments, not changed after it is made: frozen it would take a microsecond more.

    Attributes:
        kernel: a function decorated with ``triton.jit``.
        grid: programs per axis; only the first may be large (2³¹ − 1, the others 65,535).
        arguments: runtime arguments by name, in the order of the kernel's signature.
        constants: compile-time arguments by name, without the tile sizes.
        config: tile sizes, warps and stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    config: Config = _WHOLE

    def run(self) -> None:
        """Runs the kernel on the device of its tensors; an empty grid runs nothing."""
        if 0 in self.grid:
            return
        if _thread.launcher is not None:
            _thread.launcher(self)
            return
        with on_device(self.device):
            self.kernel[self.grid](**self.options())

    def compile(self) -> Any:
        """Compiles the kernel as :meth:`run` needs it, without running it.

        Returns:
            Triton's compiled kernel; inside its ``AsyncCompileMode`` a future of it.
        """
        with on_device(self.device):
            return self.kernel.run(**self.options(), grid=self.grid, warmup=True)

    def options(self) -> dict[str, Any]:
        """Everything that the kernel is called with, by name."""
        return {
            **self.arguments,
            **self.constants,
            **self.config.blocks,
            "num_warps": self.config.warps,
            "num_stages": self.config.stages,
        }

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        for argument in self.arguments.values():
            tensor = getattr(argument, "base", argument)  # of a tensor descriptor
            if isinstance(tensor, Tensor):
                return tensor.device
        raise ValueError(f"{self.kernel} has no tensor among its arguments")


@contextmanager
def assume(capability: int) -> Iterator[None]:
    """A context in which tensors that are on no GPU count as on one of this compute capability (80, 90, 100)."""
    before, _thread.capability = _thread.capability, capability
    try:
        yield
    finally:
        _thread.capability = before


AMD = 0
"""What stands for the compute capability of AMD's GPUs, which have none: whatever only some of NVIDIA's have is off."""


def shared_memory(on: int) -> int:
    """Bytes of shared memory that one program can have on a compute capability."""
    return {AMD: 64, 80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(on, 99) * 1024


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU as 80, 90, 100, :data:`AMD` for one of AMD's.

    Where there is none, 90 or what is assumed.
    """
    if not tensor.is_cuda:
        return _thread.capability
    return _capability(tensor.device) if torch.version.hip is None else AMD


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(size: int, at_least: int = 1) -> int:
    """The smallest power of two that is no less than ``size`` and ``at_least``."""
    return 1 << (max(size, at_least) - 1).bit_length()


_DESCRIBED: dict[Hashable, dict[str, Any]] = {}


def describe(tensor: Tensor, block: Sequence[int]) -> TensorDescriptor:
    """A tensor descriptor of tiles; Triton checks a kind of them when it is first made, which takes most of the time.

    Args:
        tensor: whose address and steps but the last are multiples of 16 bytes, with a contiguous last axis.
        block: sizes of a tile.
    """
    shape, strides = tensor.shape, tensor.stride()
    kind = (tensor.dtype, shape, strides, *block)
    known = _DESCRIBED.get(kind)
    if known is None:
        descriptor = TensorDescriptor(tensor, list(shape), list(strides), list(block))
        if len(_DESCRIBED) >= MOST_DESCRIBED:
            _DESCRIBED.clear()
        _DESCRIBED[kind] = {name: value for name, value in vars(descriptor).items() if name != "base"}
        return descriptor
    if tensor.data_ptr() % 16:
        raise ValueError(f"the tensor starts {tensor.data_ptr() % 16} bytes after a multiple of 16")
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(known, base=tensor)
    return descriptor


MOST_DESCRIBED = 4096
"""Kinds of descriptors that are known; with more, all are forgotten."""


def alignment(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides, which tells the compiler how wide a load may be."""
    return gcd(16, *strides)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor with a last axis that is contiguous, itself where it is."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def unsupported_dtypes(**tensors: Tensor | None) -> list[str]:
    """The reasons why kernels cannot read these by their dtype; what is None is not there."""
    return [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors.items()
        if tensor is not None and tensor.dtype not in DTYPES
    ]


def unsupported_head_dim(head_dim: int, largest: int) -> list[str]:
    """The reason why a head cannot be a tile: it is wider than the ``largest``."""
    return [f"head_dim {head_dim} is more than {largest}"] if head_dim > largest else []
