"""A forward of open_clip's own modules with every attention matrix in one graph, written out with einsum.

Nothing of clipfast is imported: what gradients of attention are compared with. Attention can be replaced layer by
layer, for finite differences.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Graph:
    attention: list[Tensor]  # [B, H, N, N] per layer
    hidden: list[Tensor]  # [B, N, W], one more than layers
    embedding: Tensor  # [B, D]


def read(visual: Any, pooled: Tensor) -> Tensor:
    return visual.ln_post(pooled) @ visual.proj


def pooled(visual: Any, x: Tensor) -> Tensor:
    return x[:, 1:].mean(1) if visual.pool_type == "avg" else x[:, 0]


def graph(visual: Any, images: Tensor, replaced: Mapping[int, Tensor] | None = None) -> Graph:
    with torch.enable_grad():
        x = visual._embeds(images)
        attention, hidden = [], [x]
        for layer, block in enumerate(visual.transformer.resblocks):
            attn = block.attn
            qkv = torch.einsum("bnw,kw->bnk", block.ln_1(x), attn.in_proj_weight) + attn.in_proj_bias
            query, key, value = qkv.unflatten(2, (3, attn.num_heads, -1)).unbind(2)  # [B, N, H, E]
            logits = torch.einsum("bnhe,bmhe->bhnm", query, key) / query.shape[-1] ** 0.5
            exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
            weights = exponentials / exponentials.sum(-1, keepdim=True)
            if replaced is not None and layer in replaced:
                weights = replaced[layer]
            attention.append(weights)
            mixed = torch.einsum("bhnm,bmhe->bnhe", weights, value).flatten(2)
            x = x + block.ls_1(mixed @ attn.out_proj.weight.T + attn.out_proj.bias)
            x = x + block.ls_2(block.mlp(block.ln_2(x)))
            hidden.append(x)
        return Graph(attention, hidden, read(visual, pooled(visual, x)))


def cosine(embedding: Tensor, text: Tensor) -> Tensor:
    """``[B]`` for a text ``[D]`` or ``[B, D]``; a text that is not of length 1 scales it."""
    return (embedding * text).sum(-1) / embedding.square().sum(-1).sqrt()
