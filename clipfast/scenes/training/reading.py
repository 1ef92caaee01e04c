"""The vision tower's forward, with the output of every head for the class token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """One forward of B images.

    tokens   [B, 1 + patches, width] tokens after the last norm; row 0 is projected into the shared embedding
    stream   [B, width] class token before that norm: the sum of all terms below
    heads    [B, heads, head width] per layer: attention output of the class token
    others   [B, width] per term: the start of the class token's stream, then every MLP
    """

    tokens: Tensor
    stream: Tensor
    heads: tuple[Tensor, ...]
    others: tuple[Tensor, ...]


def read(visual: Any, images: Tensor) -> Reading:
    """The forward of open_clip's VisionTransformer up to its projection, with every term."""
    x = visual._embeds(images)
    heads, others = [], [x[:, 0]]
    for block in visual.transformer.resblocks:
        batch, tokens, width = x.shape
        attention = block.attn
        packed = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = packed.view(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)  # [B, tokens, heads, head width]
        heads.append(out[:, 0])
        x = x + attention.out_proj(out.reshape(batch, tokens, width))
        term = block.mlp(block.ln_2(x))
        others.append(term[:, 0])
        x = x + term
    return Reading(visual.ln_post(x), x[:, 0], tuple(heads), tuple(others))
