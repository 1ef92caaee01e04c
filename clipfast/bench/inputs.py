"""Models, images and texts for measurements: seeded, and without downloads.

Weights are random unless the name comes with weights: speed does not depend on their values. Biases and LayerNorm
parameters are random too, so that checks cover every term. Images are noise: some kernels multiply zeros faster.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.errors import ModelError, UnsupportedTower
from clipfast.loading import BUNDLED, load
from clipfast.towers import huggingface_models, openclip_models
from clipfast.towers.openclip_sizes import sized

TEXTS = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""Precisions by the names of the command line."""


def known(name: str) -> None:
    """Raises unless a model of that name exists, without building it.

    Raises:
        ModelError: no such name or folder, where the message suggests similar names; or a model of another package.
    """
    if name not in BUNDLED:
        is_huggingface = name.startswith(huggingface_models.PREFIX) or huggingface_models.is_folder(name)
        if is_huggingface or name.startswith("timm:"):
            package = "transformers" if is_huggingface else "timm"
            raise ModelError(f"{name} is a model of {package}, and only models of open_clip are measured")
        openclip_models.resolve_name(name)


@contextlib.contextmanager
def _random_weights_are_meant() -> Iterator[None]:
    logger = logging.getLogger("clipfast")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def module(
    name: str,
    device: str = "cpu",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    image_size: tuple[int, int] | None = None,
) -> nn.Module:
    """A model by name. Random weights are seeded, and none is zero or one by construction.

    Args:
        name: as :func:`known` takes it.
        device: where to put it.
        seed: of random weights.
        dtype: of the weights.
        image_size: height and width of its images; None for its own.

    Raises:
        ModelError: no such model, or one that cannot be loaded.
        InputError: an image size that it cannot be given.
        UnsupportedTower: a tower that cannot be decomposed, with every reason; raised before its weights are built.
    """
    if name in openclip_models.names():
        reasons = [reason for _, reason in openclip_models.supports(name)]
        if reasons:
            raise UnsupportedTower(name, reasons)
    torch.manual_seed(seed)
    with _random_weights_are_meant():
        loaded = load(name, device=device, dtype=dtype, backend="eager")
    if not loaded.pretrained:
        randomize(cast(nn.Module, loaded.module.visual))
    loaded.module.visual = sized(cast(nn.Module, loaded.module.visual), image_size)
    return loaded.module


@torch.no_grad()
def randomize(visual: nn.Module) -> None:
    """Adds noise to every bias and LayerNorm parameter, so that none is 0 or 1."""
    for parameter in visual.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))


def noise(visual: Any, batch: int, device: str = "cpu", seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images of noise, ``[batch, 3, height, width]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *visual.image_size, generator=generator).to(device, dtype)


def unit(embedding: Tensor) -> Tensor:
    """Rows divided by their norms."""
    return cast(Tensor, embedding / embedding.norm(dim=-1, keepdim=True))


def unit_texts(width: int, device: str = "cpu", count: int = TEXTS, seed: int = 2) -> Tensor:
    """Random unit vectors in place of text features, ``[count, width]``."""
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return unit(features).to(device)
