"""Models and images of the GPU benchmarks, drawn so that a wrong result is far from the right one."""

from pathlib import Path
from typing import Any, cast

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DRY = Path(__file__).resolve().parent / "dry-run.json"
"""Configuration of the smallest model that has all there is, for dry runs: ``dry-run`` among open_clip's names."""
BIAS = 0.3
"""Deviation of what is added to every bias and LayerNorm parameter: a result without one of them is then 3 times as far
from the right one as bfloat16 rounds, and nothing is faster or slower for it."""


def random_model(name: str, device: str) -> nn.Module:
    """An open_clip model in pure bfloat16 with seeded weights, none of which is zero or one by construction."""
    if name == DRY.stem and name not in open_clip.list_models():
        open_clip.add_model_config(DRY)
    torch.manual_seed(0)
    built = cast(
        nn.Module,
        open_clip.create_model(name, pretrained=None, load_weights=False, precision="pure_bf16", device=device),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in cast(nn.Module, cast(Any, built).visual).parameters():
            if parameter.ndim == 1:
                added = BIAS * torch.randn(parameter.shape, generator=generator)
                parameter.add_(added.to(parameter.device, parameter.dtype))
    return built.eval()


def draw_images(size: tuple[int, int], batch: int, device: str, seed: int = 3) -> Tensor:
    """Images that differ from each other as photographs do, in their large parts: ``[batch, 3, height, width]``, bf16.

    Images of noise alone have nearly equal embeddings, and rows in the wrong order would pass.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(batch, 3, 4, 4, generator=generator), size=size, mode="bilinear")
    fine = torch.rand(batch, 1, 1, 1, generator=generator) * torch.randn(batch, 3, *size, generator=generator)
    return (2 * coarse + fine).to(device, torch.bfloat16)
