"""What a tower's fields say, written out in plain torch: the embedding as its documentation defines it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.towers.tower import Block, LayerNorm, Rotary, Tower


def _activated(x: Tensor, name: str) -> Tensor:
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _normed(x: Tensor, norm: LayerNorm | None) -> Tensor:
    return x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _rotated(x: Tensor, rotary: Rotary | None, prefix: int) -> Tensor:
    """Queries or keys ``[B, H, N, E]``; what is rotated together is half a head apart."""
    if rotary is None:
        return x
    assert rotary.halves
    patches = x[:, :, prefix:]
    first, second = patches.chunk(2, -1)
    rotated = patches * rotary.cos + torch.cat([-second, first], -1) * rotary.sin
    return torch.cat([x[:, :, :prefix], rotated], 2)


def _embedded(tower: Tower, images: Tensor) -> Tensor:
    rows, columns = tower.grid
    assert tower.patch_weight is not None
    patches = F.conv2d(images, tower.patch_weight, tower.patch_bias, stride=tower.patch_size)
    x = patches[:, :, :rows, :columns].flatten(2).mT
    position = tower.positional_embedding
    if position is not None:
        x = x + position[-rows * columns :]
    prefix = [] if tower.class_embedding is None else [tower.class_embedding]
    prefix += [] if tower.registers is None else list(tower.registers)
    if position is not None:
        rest = position[: -rows * columns]
        prefix = [token + rest[i] if i < len(rest) else token for i, token in enumerate(prefix)]
    tokens = [token.expand(len(x), 1, -1) for token in prefix]
    return _normed(torch.cat([*tokens, x], 1), tower.ln_pre)


def _after(tower: Tower, block: Block, x: Tensor) -> Tensor:
    normed = _normed(x, block.ln_1)
    query, key, value = (
        F.linear(normed, *layer).unflatten(-1, (tower.heads, -1)).transpose(1, 2) for layer in block.query_key_value()
    )
    query, key = (_rotated(each, block.rotary, tower.prefix_tokens) for each in (query, key))
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    attended = F.linear((weights @ value).transpose(1, 2).flatten(2), block.out_weight, block.out_bias)
    x = x + (attended if block.attention_scale is None else attended * block.attention_scale)
    normed = _normed(x, block.ln_2)
    hidden = F.linear(normed, block.mlp_in_weight, block.mlp_in_bias)
    if block.mlp_gate_weight is None:
        hidden = _activated(hidden, tower.activation)
    else:
        hidden = _activated(F.linear(normed, block.mlp_gate_weight, block.mlp_gate_bias), tower.activation) * hidden
    added = F.linear(hidden, block.mlp_out_weight, block.mlp_out_bias)
    return x + (added if block.mlp_scale is None else added * block.mlp_scale)


def _pooled(tower: Tower, x: Tensor) -> Tensor:
    normed = _normed(x, tower.ln_post)
    if tower.pooling == "cls":
        return normed[:, 0]
    if tower.pooling == "normed_mean":
        return normed[:, tower.prefix_tokens :].mean(1)
    pool = tower.pool
    assert tower.pooling == "attention"
    assert pool is not None
    key, value = (
        F.linear(normed, weight, bias).unflatten(-1, (pool.heads, -1))
        for weight, bias in ((pool.key_weight, pool.key_bias), (pool.value_weight, pool.value_bias))
    )
    query = pool.query.view(pool.heads, -1)
    weights = (torch.einsum("he,bnhe->bhn", query, key) / query.shape[-1] ** 0.5).softmax(-1)
    out = F.linear(torch.einsum("bhn,bnhe->bhe", weights, value).flatten(1), pool.out_weight, pool.out_bias)
    mlp = pool.mlp
    assert mlp is not None
    hidden = _activated(F.linear(_normed(out, mlp.norm), mlp.in_weight, mlp.in_bias), mlp.activation)
    return out + F.linear(hidden, mlp.out_weight, mlp.out_bias)


@torch.no_grad()
def embedding(tower: Tower, images: Tensor) -> Tensor:
    """Image embeddings ``[B, D]`` of images ``[B, 3, height, width]``."""
    x = _embedded(tower, images)
    for block in tower.blocks:
        x = _after(tower, block, x)
    pooled = _pooled(tower, x)
    return pooled if tower.projection is None else pooled @ tower.projection
