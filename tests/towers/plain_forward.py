"""What a tower's fields say, written out in plain torch: the embedding as its documentation defines it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.towers.tower import AttentionPool, Block, LayerNorm, Rotary, Tower


def _activated(x: Tensor, name: str) -> Tensor:
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.silu(x) if name == "silu" else F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def _normed(x: Tensor, norm: LayerNorm | None) -> Tensor:
    if norm is None:
        return x
    if norm.rms:
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def _rotated(x: Tensor, rotary: Rotary | None, prefix: int) -> Tensor:
    """Queries or keys ``[B, H, N, E]``; what is rotated together is half a head apart, or next to each other."""
    if rotary is None:
        return x
    patches = x[:, :, prefix:]
    if rotary.halves:
        first, second = patches.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    else:
        other = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    return torch.cat([x[:, :, :prefix], patches * rotary.cos + other * rotary.sin], 2)


def _embedded(tower: Tower, images: Tensor) -> Tensor:
    if tower.embedder is not None:
        return tower.embedder.run(images)
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


def _attended(tower: Tower, block: Block, normed: Tensor) -> Tensor:
    query, key, value = (
        F.linear(normed, *layer).unflatten(-1, (tower.heads, -1)).transpose(1, 2) for layer in block.query_key_value()
    )
    query, key = _normed(query, block.query_norm), _normed(key, block.key_norm)
    query, key = (_rotated(each, block.rotary, tower.prefix_tokens) for each in (query, key))
    logits = query @ key.mT / query.shape[-1] ** 0.5
    weights = (logits if block.score_bias is None else logits + block.score_bias).softmax(-1)
    heads = _normed((weights @ value).transpose(1, 2).flatten(2), block.inner_norm)
    out = F.linear(heads, block.out_weight, block.out_bias)
    return _scaled(_normed(out, block.attention_post_norm), block.attention_scale)


def _mlp(tower: Tower, block: Block, normed: Tensor) -> Tensor:
    normed = _normed(normed, block.mlp_in_norm)
    hidden = F.linear(normed, block.mlp_in_weight, block.mlp_in_bias)
    if block.mlp_gate_weight is None:
        hidden = _activated(hidden, tower.activation)
    else:
        hidden = _activated(F.linear(normed, block.mlp_gate_weight, block.mlp_gate_bias), tower.activation) * hidden
    added = F.linear(_normed(hidden, block.mlp_norm), block.mlp_out_weight, block.mlp_out_bias)
    return _scaled(_normed(added, block.mlp_post_norm), block.mlp_scale)


def _after(tower: Tower, block: Block, x: Tensor) -> Tensor:
    normed = _normed(x, block.ln_1)
    attended = x + _attended(tower, block, normed)
    return attended + _mlp(tower, block, normed if block.parallel else _normed(attended, block.ln_2))


def _attention_pooled(pool: AttentionPool, normed: Tensor) -> Tensor:
    key, value = (
        F.linear(normed, weight, bias).unflatten(-1, (pool.heads, -1))
        for weight, bias in ((pool.key_weight, pool.key_bias), (pool.value_weight, pool.value_bias))
    )
    query = pool.query.expand(len(normed), 1, -1) if pool.query.ndim == 1 else None
    if query is None:
        query = F.linear(normed if pool.every_query else normed[:, :1], pool.query, pool.query_bias)
    query, key = query.unflatten(-1, (pool.heads, -1)), _normed(key, pool.key_norm)
    weights = (torch.einsum("bqhe,bnhe->bqhn", query, key) / query.shape[-1] ** 0.5).softmax(-1).mean(1)
    if pool.weights is not None:
        weights = pool.weights.expand(len(normed), -1, -1)
    heads = torch.einsum("bhn,bnhe->bhe", weights, value).flatten(1)
    out = F.linear(heads, pool.out_weight, pool.out_bias)
    mlp, added = pool.mlp, []
    for part, weight in zip(heads.chunk(pool.queries, 1), pool.out_weight.chunk(pool.queries, 1), strict=True):
        if mlp is not None:
            each = _normed(F.linear(part, pool.queries * weight, pool.out_bias), mlp.norm)
            hidden = _activated(F.linear(each, mlp.in_weight, mlp.in_bias), mlp.activation)
            added.append(F.linear(hidden, mlp.out_weight, mlp.out_bias))
    return _normed(out + sum(added) / pool.queries, pool.norm)


def _pooled(tower: Tower, x: Tensor) -> Tensor:
    pool, prefix = tower.pool, tower.prefix_tokens
    if pool is not None:
        assert tower.pooling == "attention"
        return _attention_pooled(pool, _normed(x, tower.ln_post)[:, 0 if pool.reads_prefix else prefix :])
    rows = x[:, 0 if tower.prefix_pooled else prefix :]
    if tower.pooling == "mean":
        return _normed(rows.mean(1), tower.ln_post)
    if tower.pooling == "normed_mean":
        return _normed(rows, tower.ln_post).mean(1)
    assert tower.pooling == "cls"
    return _normed(x[:, 0], tower.ln_post)


@torch.no_grad()
def embedding(tower: Tower, images: Tensor) -> Tensor:
    """Image embeddings ``[B, D]`` of images ``[B, 3, height, width]``."""
    x = _embedded(tower, images)
    assert x.shape[1:] == (tower.tokens, tower.width)
    for block in tower.blocks:
        x = _after(tower, block, x)
    pooled = _pooled(tower, x)
    pooled = pooled if tower.projection is None else pooled @ tower.projection
    return pooled if tower.projection_bias is None else pooled + tower.projection_bias
