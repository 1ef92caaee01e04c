"""timm's models for images of another size, as their own ``set_input_size`` makes them."""

from typing import Any, TypeVar, cast

import torch
from torch import nn

from clipfast.errors import InputError
from clipfast.towers.folding import folded
from clipfast.towers.sizes import Size, deep_copy_of

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def sized(trunk: M, size: Size | None) -> M:
    """A model for images of a size: itself where it takes them, else a copy that shares all but what depends on it.

    A convolutional network takes images of any size.

    Args:
        trunk: the model.
        size: height and width; None for its own.

    Raises:
        InputError: a model that timm cannot set to the size.
    """
    own = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    if size is None or own is None or tuple(own) == size:
        return trunk
    name = f"{size[0]} × {size[1]} pixels: timm's {type(trunk).__name__}"
    copy: Any = deep_copy_of(folded(trunk).module)  # set_input_size would write through a parametrisation
    if not hasattr(copy, "set_input_size"):
        raise InputError(f"images of {name} has no set_input_size in this version of timm, and takes one size")
    try:
        copy.set_input_size(img_size=size)
    except Exception as error:  # timm's models raise different types
        text = " ".join(str(error).split())[:160]
        raise InputError(f"images of {name} cannot be set to them: {type(error).__name__}: {text}") from error
    return cast(M, copy)
