"""What the fuzz test draws: values of every kind, in any memory layout, and wrong arguments."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33, 37, 48, 63, 64, 65, 67, 96, 127, 128, 129, 300)
"""One, primes, and numbers around the widths of vectors and tiles."""

KINDS = ("plain", "zero", "denormal", "infinite", "nan", "huge")
"""Values from −1 to 1, and extreme ones."""


def size(draw: st.DrawFn, most: int, least: int = 0) -> int:
    """The length of an axis, 0 in one draw of 16."""
    if not least and draw(st.integers(0, 15)) == 15:
        return 0
    return draw(st.sampled_from([each for each in SIZES if least <= each <= most]))


def numbers(shape: tuple[int, ...], dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    """Values of one kind; of "infinite" and "nan" one entry in ten is."""
    generator = torch.Generator().manual_seed(seed)
    plain = torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1
    if kind in ("infinite", "nan"):
        rare = torch.rand(shape, generator=generator) < 0.1
        return torch.where(rare, torch.copysign(torch.tensor(float(kind[:3])), plain), plain).to(dtype)
    limits = torch.finfo(dtype)
    scale = {"plain": 1, "zero": 0, "denormal": limits.smallest_normal, "huge": limits.max**0.5}[kind]
    return (plain * scale).to(dtype)


def lay(values: Tensor, order: Sequence[int], steps: list[int], gaps: list[int], offset: int) -> Tensor:
    """Copies values to memory of their own, in which everything else is NaN and which ends with the last value.

    Args:
        values: what to copy.
        order: axes from the outermost in memory to the innermost.
        steps: by how many times its dense stride each axis is spread.
        gaps: elements left free after each axis.
        offset: elements before the first.
    """
    strides, width = [0] * values.ndim, 1
    for axis in reversed(order):
        strides[axis] = width * steps[axis]
        width = strides[axis] * max(1, values.shape[axis]) + gaps[axis]
    last = sum((count - 1) * stride for count, stride in zip(values.shape, strides, strict=True))
    held = offset + last + 1 if values.numel() else offset
    memory = torch.full((held,), torch.nan).to(values.dtype)
    return memory.as_strided(values.shape, strides, offset).copy_(values)


class Drawn:
    """Draws the tensors of one call and records the kinds of their values."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.hard = draw(st.sampled_from(KINDS))
        self.kinds: set[str] = set()

    def tensor(
        self, *shape: int, dtype: torch.dtype = torch.float32, rows: bool = False, packed: bool = False
    ) -> Tensor:
        """A tensor in any memory layout, some of its axes with stride 0.

        Args:
            shape: of the tensor.
            dtype: of its values.
            rows: whether its last axis is contiguous and no axis has stride 0, as for an argument that is changed.
            packed: whether it is contiguous.
        """
        kind = self.draw(st.sampled_from(("plain", self.hard)))
        self.kinds.add(kind)
        values = numbers(shape, dtype, kind, self.draw(st.integers(0, 2**16)))
        offset = self.draw(st.integers(0, 5))
        axes = list(range(len(shape)))
        if packed or self.draw(st.booleans()):
            return lay(values, axes, [1] * len(shape), [0] * len(shape), offset)
        order = [*self.draw(st.permutations(axes[:-1])), axes[-1]] if rows else self.draw(st.permutations(axes))
        steps = [self.draw(st.integers(1, 3)) for _ in axes]
        steps[-1] = 1 if rows else steps[-1]
        gaps = [self.draw(st.integers(0, 3)) for _ in axes]
        same = [axis for axis in axes if not rows and shape[axis] and self.draw(st.integers(0, 7)) == 0]
        for axis in same:
            values = values.narrow(axis, 0, 1)
        return lay(values, order, steps, gaps, offset).expand(shape)


def has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.device.type == "cpu"


def memory(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def again(tensor: Tensor) -> Tensor:
    """A copy of a tensor with a copy of its storage: same strides, same offset."""
    if not has_memory(tensor):
        return tensor
    if tensor.is_neg():
        return torch._neg_view(again(torch._neg_view(tensor)))
    if tensor.data_ptr() % tensor.element_size():
        return between_elements(tensor)
    return memory(tensor).clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def bits(tensor: Tensor) -> Tensor:
    """The bytes of each value, which distinguish NaNs and the signs of zero."""
    return tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


# ------------------------------------------------------------------------------------------------ what is wrong

OTHER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
OTHER_DTYPES += (torch.complex64, torch.float8_e4m3fn)


def between_elements(tensor: Tensor) -> Tensor:
    """The same values at an address that is not aligned to their size."""
    if not tensor.numel():
        return tensor
    held = bytearray(1) + bytearray(bits(tensor).tolist())
    return torch.frombuffer(held, dtype=tensor.dtype, offset=1).view(tensor.shape)


def _shorter(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    axis = draw(st.integers(0, tensor.ndim - 1))
    return tensor.narrow(axis, 0, max(0, tensor.shape[axis] - 1))


def _longer(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    axis = draw(st.integers(0, tensor.ndim - 1))
    return torch.cat([tensor, tensor.new_ones([1 if at == axis else n for at, n in enumerate(tensor.shape)])], axis)


def _same_for_all(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    axis = draw(st.integers(0, tensor.ndim - 1))
    return tensor.narrow(axis, 0, min(1, tensor.shape[axis])).expand(tensor.shape)


WRONGS: dict[str, Any] = {
    "an axis less": lambda draw, tensor: tensor.sum(0).to(tensor.dtype),
    "no axes": lambda draw, tensor: tensor.sum().to(tensor.dtype),
    "an axis more": lambda draw, tensor: tensor[None],
    "shorter": _shorter,
    "longer": _longer,
    "axes swapped": lambda draw, tensor: tensor.transpose(*draw(st.tuples(*[st.integers(0, tensor.ndim - 1)] * 2))),
    "the same for all": _same_for_all,
    "another dtype": lambda draw, tensor: tensor.to(draw(st.sampled_from(OTHER_DTYPES))),
    "another device": lambda draw, tensor: tensor.to("meta"),
    "a negated view": lambda draw, tensor: torch._neg_view(tensor),
    "sparse": lambda draw, tensor: tensor.to_sparse(),
    "between elements": lambda draw, tensor: between_elements(tensor),
}
"""Changes to a tensor, most of which make it invalid."""
