"""What the modules with relevance packages' names share: models, texts, and maps as the packages scale them."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.errors import InputError
from clipfast.loading import wrap
from clipfast.model import Model
from clipfast.towers.tower import Tower


def as_model(model: Model | nn.Module) -> Model:
    """A model, or a module that :func:`clipfast.wrap` takes."""
    return model if isinstance(model, Model) else wrap(model)


def features_of(model: Model, texts: str | Sequence[str] | Tensor) -> Tensor:
    """Features ``[T, D]`` of strings, of unit norm, or those that are given, as long as they are.

    Raises:
        InputError: features of another shape, no texts, or strings without a text encoder or tokenizer.
    """
    width = model.tower.embed_dim
    if not isinstance(texts, Tensor):
        return model.encode_text(texts)
    if texts.ndim != 2 or not len(texts) or texts.shape[1] != width or not texts.is_floating_point():
        raise InputError(f"texts has shape {list(texts.shape)}, expected strings or features [texts, {width}]")
    return texts.detach().to(model.device)


def check_batch(model: Model, images: Any) -> Tensor:
    """Preprocessed images ``[B, 3, height, width]`` on the model's device and in its dtype, of its size.

    Raises:
        InputError: anything else.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images is a {type(images).__name__}: give a preprocessed tensor, model.prepare(images)")
    return model.prepare(images).detach()


def patch_size(tower: Tower) -> tuple[int, int]:
    """Height and width of a patch, in pixels."""
    (height, width), (rows, columns) = tower.image_size, tower.grid
    return height // rows, width // columns


def enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps ``[..., rows, columns]`` bilinearly at another size."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size)


def spread(maps: Tensor) -> Tensor:
    """Each map ``[..., height, width]`` from 0 to 1; 0 where all its values are alike."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    alike = high == low
    return ((maps - low) / (high - low).masked_fill(alike, 1)).masked_fill(alike, 0)
