"""From the last residual stream to the embedding: which tokens are read, with which weights.

``B`` images, ``N`` tokens, ``W`` width, ``G`` heads of an attention pool, ``E`` their head_dim, ``D`` embed_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.forward.blocks import activate, normalise, statistics
from clipfast.kernels import ops
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.tower import AttentionPool, PoolMlp, Tower


def pool(tower: Tower, x: Tensor) -> Tensor:
    """The class token's row or the mean of the tokens that are read, ``[B, N, ...] → [B, ...]``, as sums are carried.

    Before an attention pool there is no such row: it is the mean, which nothing reads.
    """
    acc_dtype = accumulation_dtype(x.dtype)
    return x[:, 0].to(acc_dtype) if tower.pooling == "cls" else x[:, tower.pooled_from :].to(acc_dtype).mean(1)


def mean_weights(tower: Tower, like: Tensor) -> Tensor:
    """What each token counts in a mean, ``[N]``, in the dtype sums are carried in."""
    weights = like.new_zeros(tower.tokens, dtype=accumulation_dtype(like.dtype))
    weights[tower.pooled_from :] = 1 / (tower.tokens - tower.pooled_from)
    return weights


def weighted(weights: Tensor, x: Tensor) -> Tensor:
    """Tokens added up with weights, ``[B, G, N] × [B, N, ...] → [B, G, ...]``, in the dtype of the weights."""
    return (weights @ x.flatten(2).to(weights.dtype)).unflatten(2, x.shape[2:])


def readout(tower: Tower, pooled: Tensor, backend: str) -> Tensor:
    """The final LayerNorm of one row and the projection, ``[B, W] → [B, D]``."""
    return project(tower, normalise(pooled, None, tower.ln_post, backend))


def project(tower: Tower, row: Tensor) -> Tensor:
    """The projection to the embedding, ``[B, W] → [B, D]``."""
    if tower.projection is not None:
        row = row @ tower.projection
    return row if tower.projection_bias is None else row + tower.projection_bias


@dataclass
class Pooled:
    """How an embedding is read from the last residual stream, with every norm on the way frozen.

    Attributes:
        embedding: ``[B, D]``.
        mean: ``[B]``, of the last norm's input: the final LayerNorm's, or the one after an attention pool.
        std: ``[B]``, of the same.
        weights: ``[B, G, N]``, what each token's residual stream counts; of a mean they sum to 1, with ``G = 1``. Of an
            attention pool they are its attention over each token's own standard deviation. None for the class token.
        means: ``[B, G]``, the means of the tokens' residual streams added up with these weights.
        attention: ``[B, G, N]`` of an attention pool.
        heads: ``[B, G, E]``, the outputs of its heads.
        values: ``[B, N, G, E]``, where they were asked for.
        mlp: ``[B, W]``, what its MLP adds.
    """

    embedding: Tensor
    mean: Tensor
    std: Tensor
    weights: Tensor | None = None
    means: Tensor | None = None
    attention: Tensor | None = None
    heads: Tensor | None = None
    values: Tensor | None = None
    mlp: Tensor | None = None


def read_row(tower: Tower, pooled: Tensor, dtype: torch.dtype, backend: str) -> Pooled:
    """The embedding of one row, ``[B, W]``: pooling before the final LayerNorm."""
    mean, std = statistics(pooled, tower.ln_post, backend)
    return Pooled(readout(tower, pooled.to(dtype), backend), mean, std)


def read_tokens(tower: Tower, x: Tensor, backend: str, *, values: bool = False) -> Pooled:
    """The embedding of a whole residual stream, ``[B, N, W]``, by whatever pooling.

    Args:
        tower: the model.
        x: the last residual stream.
        backend: which kernels compute.
        values: give the values of an attention pool, too.
    """
    if tower.pooling == "normed_mean":
        return _mean_of_norms(tower, x, backend)
    if tower.pooling == "attention":
        return _attend(tower, x, backend, values)
    result = read_row(tower, pool(tower, x), x.dtype, backend)
    if tower.pooling == "mean":
        result.weights = mean_weights(tower, x).expand(len(x), 1, -1)
    return result


def _mean_of_norms(tower: Tower, x: Tensor, backend: str) -> Pooled:
    # A weighted mean of the tokens, with the final LayerNorm's σ being the harmonic mean of theirs.
    normed = normalise(x, None, tower.ln_post, backend)
    embedding = project(tower, pool(tower, normed).to(x.dtype))
    means, stds = statistics(x, tower.ln_post, backend)  # [B, N]
    weights = mean_weights(tower, x) / stds
    std = 1 / weights.sum(-1)
    weights = weights * std[:, None]
    return Pooled(embedding, (weights * means).sum(-1), std, weights[:, None])


def _attend(tower: Tower, x: Tensor, backend: str, needs_values: bool) -> Pooled:
    pool = tower.pool
    assert pool is not None
    normed = normalise(x, None, tower.ln_post, backend)
    left_out = 0 if pool.reads_prefix else tower.prefix_tokens
    if left_out:
        normed = normed[:, left_out:].contiguous()
    by_head = (pool.heads, -1)
    key_weight, value_weight = (weight.unflatten(0, by_head) for weight in (pool.key_weight, pool.value_weight))
    value_bias = pool.value_weight.new_zeros(len(pool.value_weight)) if pool.value_bias is None else pool.value_bias
    value_bias = value_bias.unflatten(0, by_head)
    values = None
    if needs_values or pool.key_norm is not None or pool.weights is not None or pool.every_query:
        values = ops.linear(normed, pool.value_weight, pool.value_bias, backend=backend).unflatten(2, by_head)
    if pool.weights is not None:
        assert values is not None
        attention = pool.weights.to(accumulation_dtype(x.dtype)).expand(len(x), -1, -1)
        heads = torch.einsum("bgn,bnge->bge", attention, values.to(attention.dtype))
    elif pool.every_query:
        assert values is not None
        attention = _mean_attention(pool, normed, values, backend)
        heads = torch.einsum("bgn,bnge->bge", attention, values.to(attention.dtype))
    elif pool.key_norm is None:  # a key's bias adds the same to every logit
        heads, attention = ops.query_row_from_tokens(
            _query(pool, normed), normed, key_weight, value_weight, value_bias, backend=backend
        )
    else:
        assert values is not None
        heads, attention = ops.query_row(_query(pool, normed), _keys(pool, normed, backend), values, backend=backend)
    if left_out:  # tokens that the pool does not read count nothing
        attention = F.pad(attention, (left_out, 0))
        values = None if values is None else F.pad(values, (0, 0, 0, 0, left_out, 0))
    out = F.linear(heads.flatten(1).to(x.dtype), pool.out_weight, pool.out_bias)  # [B, W]
    added = None if pool.mlp is None else pool_mlp(pool.mlp, _by_query(pool, heads, out), backend)
    added = added if added is None or pool.queries == 1 else added.mean(1)
    whole = out if added is None else out + added
    mean, std = statistics(whole, pool.norm, backend)
    row = normalise(whole, None, pool.norm, backend)
    means, stds = statistics(x, tower.ln_post, backend)  # [B, N]
    weights = attention / stds[:, None]
    return Pooled(
        embedding=project(tower, row),
        mean=mean,
        std=std,
        weights=weights,
        means=(weights @ means[..., None])[..., 0],
        attention=attention,
        heads=heads,
        values=values,
        mlp=added,
    )


def _query(pool: AttentionPool, normed: Tensor) -> Tensor:
    """The query of each image, ``[B, N, W] → [B, G, E]``."""
    if pool.query.ndim == 1:
        return pool.query.to(normed.dtype).view(pool.heads, -1).expand(len(normed), -1, -1).contiguous()
    return _queries(pool, normed[:, 0])


def _queries(pool: AttentionPool, normed: Tensor) -> Tensor:
    """Queries that are made of tokens, ``[..., W] → [..., G, E]``."""
    return F.linear(normed, pool.query, pool.query_bias).unflatten(-1, (pool.heads, -1))


def _keys(pool: AttentionPool, normed: Tensor, backend: str) -> Tensor:
    """The keys of all tokens, ``[B, N, W] → [B, N, G, E]``."""
    key = ops.linear(normed, pool.key_weight, pool.key_bias, backend=backend).unflatten(2, (pool.heads, -1))
    return key if pool.key_norm is None else normalise(key.contiguous(), None, pool.key_norm, backend)


def _mean_attention(pool: AttentionPool, normed: Tensor, values: Tensor, backend: str) -> Tensor:
    """The mean of every token's attention, ``[B, N, W] → [B, G, N]``."""
    qkv = torch.stack((_queries(pool, normed), _keys(pool, normed, backend), values), 2)
    tokens = normed.shape[1]
    share = normed.new_full((len(normed), 1, tokens), 1 / tokens, dtype=accumulation_dtype(normed.dtype))
    rows: Tensor = ops.weighted_rows(qkv, share, backend=backend)
    return rows[:, 0]


def _by_query(pool: AttentionPool, heads: Tensor, out: Tensor) -> Tensor:
    """What each query of several gives before its MLP, ``[B, Q, W]``; of one, the output ``[B, W]``."""
    if pool.queries == 1:
        return out
    by_query = heads.unflatten(1, (pool.queries, -1)).flatten(2).to(out.dtype)  # [B, Q, inner / Q]
    weight = pool.out_weight.unflatten(1, (pool.queries, -1))
    return pool.queries * torch.einsum("bqi,wqi->bqw", by_query, weight) + pool.out_bias


def pool_mlp(mlp: PoolMlp, out: Tensor, backend: str) -> Tensor:
    """What the MLP of an attention pool adds to its output, ``[..., W] → [..., W]``."""
    normed = normalise(out, None, mlp.norm, backend)
    hidden = activate(F.linear(normed, mlp.in_weight, mlp.in_bias), mlp.activation)
    return F.linear(hidden, mlp.out_weight, mlp.out_bias)
