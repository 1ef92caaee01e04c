"""open_clip's image towers for images of another size, with positions as open_clip resamples those of a checkpoint."""

from typing import Any, TypeVar, cast

import torch
from torch import nn

from clipfast.errors import InputError
from clipfast.towers import timm_sizes
from clipfast.towers.folding import copy_with, folded
from clipfast.towers.sizes import Size, check_patches, resampled, size_of
from clipfast.towers.wrappers import unwrap

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def sized(visual: M, size: Size | None) -> M:
    """An image tower for images of a size: itself where it is for them, else a copy that shares all but the positions.

    open_clip compares the number of patches alone, and takes 4 × 16 patches for 8 × 8; here the grids are compared.

    Args:
        visual: of one of open_clip's classes.
        size: height and width; None for its own.

    Raises:
        InputError: not whole patches, or a tower whose positions open_clip does not resample.
    """
    own = size_of(cast(Any, visual).image_size)
    if size is None or size == own:
        return visual
    if hasattr(visual, "attnpool"):
        raise InputError(
            f"images of {size[0]} × {size[1]} pixels: open_clip resamples no positions of a ResNet's attention pool, "
            f"and these are for {own[0]} × {own[1]}"
        )
    if hasattr(visual, "trunk"):
        trunk = timm_sizes.sized(unwrap(cast(nn.Module, visual.trunk)), size)
        copy: Any = copy_with(visual, {}, {**visual._modules, "trunk": trunk})
        copy.image_size = size
        return cast(M, copy)
    return _vision_transformer(visual, size)


def _vision_transformer(visual: M, size: Size) -> M:
    vit: Any = folded(visual, without=dict(visual.named_children())).module
    check_patches(size, vit.patch_size)
    grid = (size[0] // vit.patch_size[0], size[1] // vit.patch_size[1])
    copy = copy_with(vit, {"positional_embedding": resampled(vit.positional_embedding, vit.grid_size, grid)})
    copy.image_size, copy.grid_size = size, grid
    return cast(M, copy)
