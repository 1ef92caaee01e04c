"""The models, images and texts that are measured: seeded, and nothing has to be downloaded.

Weights are random where a name brings none: speed does not depend on what they are. Biases and LayerNorm parameters
are random too, so that a check sees every term; images are noise, never zeros, which some kernels multiply faster.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.errors import UnsupportedTower
from clipfast.model import BUNDLED, load
from clipfast.towers import openclip_models

TEXTS = 16
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""Precisions by the names of the command line."""


def known(name: str) -> None:
    """Raises unless a model of that name exists, without building it.

    Raises:
        ModelError: no such name or folder; the message has names that are near.
    """
    if name not in BUNDLED:
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


def module(name: str, device: str = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model by name, its random weights seeded and nothing in them zero or one by construction.

    Raises:
        ModelError: no such model, or one that cannot be loaded.
        UnsupportedTower: one that cannot be decomposed, with every reason; said before its weights are built.
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
    return loaded.module


@torch.no_grad()
def randomize(visual: nn.Module) -> None:
    """Moves every bias and LayerNorm parameter away from 0 and 1."""
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
    """Random unit features standing for texts, ``[count, width]``."""
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return unit(features).to(device)
