"""The network to train: a small open_clip CLIP, initialised so that it learns quickly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from clipfast.scenes.vocabulary import IMAGE_SIZE

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
"""Channel statistics that normalise images in [0, 1]."""


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of the two towers. The vision width is a multiple of its heads' width, the text width of 64."""

    embed_dim: int = 128
    vision_width: int = 192
    vision_head: int = 32
    vision_layers: int = 6
    patch: int = 8
    text_width: int = 128
    text_layers: int = 3
    context_length: int = 32


def model_config(config: NetworkConfig, vocabulary: int) -> dict[str, Any]:
    """The `model_cfg` section of open_clip's configuration file."""
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": config.vision_layers,
            "width": config.vision_width,
            "head_width": config.vision_head,
            "patch_size": config.patch,
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": vocabulary,
            "width": config.text_width,
            "heads": config.text_width // 64,
            "layers": config.text_layers,
        },
    }


def build(config: NetworkConfig, vocabulary: int) -> Any:
    """A new CLIP (open_clip.model.CLIP) with random weights from torch's global generator."""
    sections = model_config(config, vocabulary)
    model = CLIP(
        embed_dim=sections["embed_dim"],
        vision_cfg=CLIPVisionCfg(**sections["vision_cfg"]),
        text_cfg=CLIPTextCfg(**sections["text_cfg"]),
        quick_gelu=False,
    )
    _start_vision(model.visual)
    return model


@torch.no_grad()
def _start_vision(visual: Any) -> None:
    """Initialise the vision tower with distinct positions and with blocks close to the identity.

    With a random position table, patches first have to learn to attend to their neighbours. With waves
    of several lengths, "the patch to the left" is a linear map from the first step on.
    """
    side = visual.grid_size[0]
    width = visual.positional_embedding.shape[1]
    visual.positional_embedding.copy_(0.5 * torch.cat([torch.zeros(1, width), position_waves(side, width)]))
    visual.class_embedding.normal_(std=0.02)
    depth = len(visual.transformer.resblocks)
    for block in visual.transformer.resblocks:
        _start_attention(block.attn)
        torch.nn.init.trunc_normal_(block.mlp.c_fc.weight, std=width**-0.5)
        torch.nn.init.trunc_normal_(block.mlp.c_proj.weight, std=width**-0.5 / math.sqrt(4 * depth))
        torch.nn.init.zeros_(block.mlp.c_fc.bias)
        torch.nn.init.zeros_(block.mlp.c_proj.bias)


def _start_attention(attention: Any, likeness: float = 0.7, echo: float = 0.4) -> None:
    """Initialise queries and keys alike, and the output as the negated transpose of the values.

    In trained transformers, W_q W_k^T is close to a multiple of the identity (tokens attend to similar
    tokens) and W_v W_o to a negative multiple. Training is faster from there. A head is narrower than
    a token, so this holds on a random subspace.
    """
    width = attention.embed_dim
    heads = attention.num_heads
    size = width // heads
    rows = attention.in_proj_weight.view(3, heads, size, width)
    out = attention.out_proj.weight.view(width, heads, size)
    noise = width**-0.5
    for head in range(heads):
        shared = torch.linalg.qr(torch.randn(width, size))[0].T
        rows[0, head] = math.sqrt(likeness) * shared * 1.5 + 0.5 * noise * torch.randn(size, width)
        rows[1, head] = math.sqrt(likeness) * shared * 1.5 + 0.5 * noise * torch.randn(size, width)
        shared = torch.linalg.qr(torch.randn(width, size))[0].T
        rows[2, head] = math.sqrt(echo) * shared + 0.5 * noise * torch.randn(size, width)
        out[:, head] = -math.sqrt(echo) * shared.T + 0.2 * noise * torch.randn(width, size)
    attention.in_proj_bias.zero_()
    attention.out_proj.bias.zero_()


def position_waves(side: int, width: int) -> Tensor:
    """Sines and cosines of a patch's column and row at several wavelengths: [side**2, width]."""
    count = width // 4
    # from waves of two patches to waves longer than the image
    rates = torch.exp(torch.linspace(math.log(math.pi), math.log(math.pi / (2 * side)), count))
    phase = torch.arange(side, dtype=torch.float32)[:, None] * rates
    waves = torch.cat([phase.sin(), phase.cos()], dim=1)
    columns = waves[None].expand(side, side, -1)
    rows = waves[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], dim=2).reshape(side * side, -1)
