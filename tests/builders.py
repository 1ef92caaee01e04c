"""Small real open_clip modules whose every parameter matters."""

from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]

TINY = {
    "image_size": 24,
    "patch_size": 8,
    "width": 32,
    "layers": 3,
    "heads": 2,
    "mlp_ratio": 2.0,
    "output_dim": 20,
}
"""Ten tokens, three layers, two heads of 16."""


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Gives every parameter a random value of its natural size, and batch normalisation statistics: no bias is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            continue  # temperature of the similarity: no part of an embedding
        if parameter.ndim == 1 and name.endswith(("weight", "gamma")):
            parameter.normal_(1.0, 0.3, generator=generator)
        elif parameter.ndim == 1 or name.endswith("positional_embedding"):
            parameter.normal_(0.0, 0.3, generator=generator)
        else:
            fan_in = parameter.shape[0] if name.endswith("proj") else parameter.shape[1:].numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.3, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0, generator=generator)
    return module


def vision_tower(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> VisionTransformer:
    """open_clip's VisionTransformer, :data:`TINY` but for ``changes``, random and in eval mode."""
    return randomise(VisionTransformer(**{**TINY, **changes}), seed).to(dtype).eval()


def named_tower(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """The vision tower of a named open_clip config with ``changes`` to its ``vision_cfg``, random, in eval mode."""
    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], **changes}
    embed_dim = vision.pop("embed_dim", config["embed_dim"])
    with torch.device("meta"):  # open_clip's own initialisation would be overwritten anyway
        tower = open_clip.model._build_vision_tower(embed_dim, vision, config.get("quick_gelu", False))
    return randomise(tower.to_empty(device="cpu").to(dtype), seed).eval()


def clip_model(seed: int = 0, embed_dim: int = 20) -> open_clip.CLIP:
    """A whole CLIP with open_clip's vocabulary and a text tower as small as its vision tower."""
    model = open_clip.CLIP(
        embed_dim,
        vision_cfg={"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "mlp_ratio": 2.0},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    )
    randomise(model, seed)
    return model.eval()


def pixels(visual: nn.Module, images: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random preprocessed images for a tower, ``[images, 3, height, width]``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    size: Any = visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(images, 3, height, width, generator=generator).to(dtype)


def directions(texts: int, embed_dim: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit text features, ``[texts, embed_dim]``."""
    generator = torch.Generator().manual_seed(2000 + seed)
    features = torch.randn(texts, embed_dim, generator=generator, dtype=torch.float64)
    return (features / features.norm(dim=-1, keepdim=True)).to(dtype)
