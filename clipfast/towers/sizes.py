"""Towers for images of another size than their positions are for.

A module stays as it is. Its weights go into a copy that shares every parameter but those that depend on the size, and
the copy is read and run in its place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.towers.tower import Tower

Size = tuple[int, int]
"""Height and width in pixels."""
M = TypeVar("M", bound=nn.Module)


def size_of(image_size: int | Sequence[int]) -> Size:
    """Height and width, of both or of the side of a square.

    Raises:
        InputError: anything else than one or two whole numbers above zero.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    are_whole = isinstance(sides, list | tuple | torch.Size) and all(type(side) is int for side in sides)
    if not are_whole or len(sides) != 2 or min(sides) < 1:
        raise InputError(f"image_size is {image_size!r}: give height and width in pixels, (height, width), or one side")
    return sides[0], sides[1]


def pixels_of(images: Tensor) -> Size:
    """Height and width of images ``[B, 3, height, width]``."""
    return images.shape[2], images.shape[3]


def check_patches(size: Size, patch_size: Size) -> None:
    """Raises :class:`InputError` unless images are whole patches high and wide."""
    (height, width), (high, wide) = size, patch_size
    if height % high or width % wide:
        sides = zip(size, patch_size, strict=True)
        near = " × ".join(str(max(round(side / patch), 1) * patch) for side, patch in sides)
        raise InputError(f"images of {height} × {width} pixels are not whole patches of {high} × {wide}: try {near}")


def resampled(table: Tensor, grid: Size, new_grid: Size) -> Tensor:
    """Positions of a grid of patches for another grid: bicubic, with antialiasing, as open_clip resamples them.

    Args:
        table: ``[prefix + rows · columns, W]``; the rows of other tokens stay as they are.
        grid: rows and columns.
        new_grid: rows and columns.

    Returns:
        ``[prefix + new rows · new columns, W]``.
    """
    prefix, patches = table.split([len(table) - grid[0] * grid[1], grid[0] * grid[1]])
    image = patches.to(torch.promote_types(table.dtype, torch.float32)).T.unflatten(1, grid)[None]
    image = image.contiguous()  # channels last, as open_clip has them, torch 2.14 errs for a grid of one column
    image = F.interpolate(image, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, image[0].permute(1, 2, 0).flatten(0, 1).to(table.dtype)])


def deep_copy_of(module: M, known: dict[int, nn.Module] | None = None) -> M:
    """A module and all modules in it, which can be changed without changing those: parameters alone are shared."""
    known = {} if known is None else known
    if id(module) not in known:
        known[id(module)] = copy = type(module).__new__(type(module))
        children, buffers = module._modules.items(), module._buffers.items()
        vars(copy).update(
            {
                **vars(module),
                "_parameters": dict(module._parameters),
                "_buffers": {name: None if buffer is None else buffer.clone() for name, buffer in buffers},
                "_modules": {name: None if child is None else deep_copy_of(child, known) for name, child in children},
            }
        )
    return cast(M, known[id(module)])


def of_copy(tower: Tower, module: nn.Module, copy: nn.Module) -> Tower:
    """The tower that was read from a module's copy for images of another size, with what the copy was made of.

    Args:
        tower: read from ``copy``.
        module: the module itself, whose parameters are watched for changes.
        copy: the copy.
    """
    kept = {id(tensor) for tensor in _held(copy)}
    changed = tuple(tensor for tensor in _held(module) if id(tensor) not in kept)
    listed = {id(tensor) for tensor in changed}
    others = tuple(tensor for tensor in tower.sources if id(tensor) not in listed)
    return replace(tower, sources=(*others, *changed))


def _held(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from (buffer for buffer in module.buffers() if buffer.is_floating_point())
