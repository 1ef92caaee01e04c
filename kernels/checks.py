"""What the operations expect of their arguments: one line that names the argument, before anything is computed."""

import torch
from torch import Tensor

SOME = -1
"""An axis of any size but none."""


def expect(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raises ValueError unless the tensor has this shape; None is any size, :data:`SOME` any but none."""
    given = tensor.shape
    if given == shape:
        return
    fits = len(given) == len(shape)
    if fits:
        for have, want in zip(given, shape, strict=True):  # a loop: this is asked of every argument of every call
            fits = fits and (want is None or have == want or (want == SOME and have > 0))
    if not fits:
        wanted = ", ".join("?" if size is None else "1 or more" if size == SOME else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(given)}, expected [{wanted}]")


def expect_together(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all are on one device: torch's own message would name no argument."""
    first: torch.device | None = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            places = ", ".join(f"{name} on {each.device}" for name, each in tensors.items() if each is not None)
            raise ValueError(f"the tensors are on different devices: {places}")


def expect_dtype(dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """Raises ValueError unless all are of a floating-point ``dtype``."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != dtype or not dtype.is_floating_point):
            raise ValueError(f"{name} is {tensor.dtype}, expected {dtype if dtype.is_floating_point else 'floats'}")


def expect_weighted_values(alpha: Tensor, value: Tensor, basis: Tensor, basis_name: str) -> None:
    """Raises ValueError unless ``alpha [B, H, N]``, ``value [B, N, H, E]`` and ``basis [H, E, ·]`` fit together."""
    expect("value", value, (None, None, None, None))
    images, tokens, heads, head_dim = value.shape
    expect("alpha", alpha, (images, heads, tokens))
    expect(basis_name, basis, (heads, head_dim, None))
    expect_together(**{"alpha": alpha, "value": value, basis_name: basis})


def expect_heads(heads: Tensor | None, count: int) -> None:
    """Raises ValueError unless ``heads`` are None or integers below ``count``."""
    if heads is None:
        return
    expect("heads", heads, (None,))
    if heads.dtype not in (torch.int64, torch.int32):  # bool and uint8 would be read as masks
        raise ValueError(f"heads are {heads.dtype}, expected torch.int64 or torch.int32")
    # Values are not looked at on a GPU, where that would wait for everything before.
    if heads.numel() and heads.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(heads.min()), int(heads.max())
        if low < 0 or high >= count:
            raise ValueError(f"heads go from {low} to {high}, expected 0 to {count - 1}")


def expect_out(out: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless sums of that shape can be added to ``out``."""
    expect("out", out, shape)
    if not out.is_contiguous():
        raise ValueError("out is not contiguous")
    if out.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"out is {out.dtype}, expected torch.float32 or torch.float64")
