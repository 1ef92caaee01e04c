"""A kernel launch as a value: what is run on a GPU is what is compiled offline and counted.

Every Triton operation of clipfast first makes a :class:`Launch` from its arguments and then runs it. Made from tensors
on torch's ``meta`` device the same launch can be compiled for any GPU without having one
(``python -m benchmarks.compiled``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``), decided when it is imported."""

_INTERPRETED = tl.constexpr(INTERPRETED)


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


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and arguments.

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
    config: Config = field(default_factory=lambda: Config({}))

    def run(self) -> None:
        """Runs the kernel on the device of its tensors; an empty grid runs nothing."""
        if 0 in self.grid:
            return
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            **self.config.blocks,
            num_warps=self.config.warps,
            num_stages=self.config.stages,
        )


def dot_precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 exactly, unless torch's own matrix products may use TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU as 80, 90, 100; 90 where there is none."""
    if not tensor.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def power_of_two(size: int, at_least: int = 1) -> int:
    """The smallest power of two that is no less than ``size`` and ``at_least``."""
    return int(triton.next_power_of_2(max(size, at_least)))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in float32.

    The interpreter multiplies the raw bits of bfloat16 as if they were integers: there, and only there, upcast.
    """
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def fma(a, b, c):
    """``a · b + c`` rounded once.

    ``exp2(fma(score, scale, −max))`` stays exact for scores of any size because the product is not rounded before the
    difference is taken. The interpreter rounds twice, so it multiplies in float64 there: same result as a GPU's.
    """
    if _INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    return tl.fma(a, b + tl.zeros_like(a), c + tl.zeros_like(a))
