"""Checks of arguments: each raises a ValueError of one line that names the argument, before anything is computed."""

import torch
from torch import Tensor

NONEMPTY = -1
"""In an expected shape, an axis of any size but 0."""


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError unless the tensor has this shape; None stands for any size, :data:`NONEMPTY` for any but 0."""
    shape = tensor.shape
    if shape == expected:
        return
    fits = len(shape) == len(expected)
    if fits:
        for actual, size in zip(shape, expected, strict=True):  # a plain loop: this runs for every argument of a call
            fits = fits and (size is None or actual == size or (size == NONEMPTY and actual > 0))
    if not fits:
        sizes = ", ".join("?" if size is None else "1 or more" if size == NONEMPTY else str(size) for size in expected)
        raise ValueError(f"{name} has shape {list(shape)}, expected [{sizes}]")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all are on one device: torch's own message would name no argument."""
    first: torch.device | None = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            devices = ", ".join(f"{name} on {other.device}" for name, other in tensors.items() if other is not None)
            raise ValueError(f"the tensors are on different devices: {devices}")


def check_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all are of a floating-point ``dtype``."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != dtype or not dtype.is_floating_point):
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype if dtype.is_floating_point else 'floats'}")


def check_weighted_values(alpha: Tensor, value: Tensor, basis: Tensor, basis_name: str) -> None:
    """Raises ValueError unless ``alpha [B, H, N]``, ``value [B, N, H, E]`` and ``basis [H, E, ·]`` fit together."""
    check_shape("value", value, (None, None, None, None))
    images, tokens, heads, head_dim = value.shape
    check_shape("alpha", alpha, (images, heads, tokens))
    check_shape(basis_name, basis, (heads, head_dim, None))
    check_same_device(**{"alpha": alpha, "value": value, basis_name: basis})


def check_heads(heads: Tensor | None, count: int) -> None:
    """Raises ValueError unless ``heads`` is None or a vector of integers below ``count``."""
    if heads is None:
        return
    check_shape("heads", heads, (None,))
    if heads.dtype not in (torch.int64, torch.int32):  # bool and uint8 would be read as masks
        raise ValueError(f"heads are {heads.dtype}, expected torch.int64 or torch.int32")
    # On a GPU the values are not checked: reading them would wait for all work queued before.
    if heads.numel() and heads.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(heads.min()), int(heads.max())
        if low < 0 or high >= count:
            raise ValueError(f"heads go from {low} to {high}, expected 0 to {count - 1}")


def check_out(out: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless sums of that shape can be added to ``out``."""
    check_shape("out", out, shape)
    if not out.is_contiguous():
        raise ValueError("out is not contiguous")
    if out.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"out is {out.dtype}, expected torch.float32 or torch.float64")
