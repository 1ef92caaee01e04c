"""A tower whose embedding reads one row of the last residual stream: the class token's, or a mean of tokens'.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``C`` numbers of a code.
"""

import torch
from torch import Tensor

from clipfast.basis import TowerBasis
from clipfast.contributions import Contributions
from clipfast.forward.blocks import attend, freeze, mlp_in, mlp_out, normalise, project_in, project_out
from clipfast.forward.collector import Collector, framed, weighted_row, widened
from clipfast.forward.embedding import embed
from clipfast.forward.pooling import mean_weights, pool, read_row
from clipfast.forward.request import Request
from clipfast.forward.stream import Stream
from clipfast.kernels import ops
from clipfast.kernels.reference import Row
from clipfast.towers.tower import Block, Linear, Tower


def decompose_row(tower: Tower, images: Tensor, request: Request, basis: TowerBasis) -> Contributions:
    """Takes one pooled row apart while the forward runs."""
    backend = request.backend
    x = embed(tower, images, backend)  # [B, N, W], the residual stream
    collector = Collector(tower, request, x, tower.heads, tower.code_width, 1 + tower.layers)
    collector.residual[:, 0] = pool(tower, x)
    blocks = tower.blocks[:-1] if tower.pooling == "cls" else tower.blocks
    stream = Stream(tower, x, blocks, request.mlps, request.adds_products, backend)
    for layer, block in enumerate(blocks):
        normed = stream.norm(block.ln_1)
        qkv = project_in(tower, normed, block, backend)  # [B, N, 3, H, E]
        both = normed if block.parallel else None
        del normed
        row = _row(tower, block) if collector.needs_attention_row(layer) else None
        out, alpha = attend(qkv, block, row, backend)  # [B, N, H, E], [B, H, N]
        _collect(collector, layer, block, qkv, out, alpha)
        del qkv
        stream.add_attention(layer, out.flatten(2))
        del out
        collector.residual[:, 1 + layer] = stream.add_mlp(layer, stream.norm(block.ln_2) if both is None else both)
    pooled = _last_block(tower, stream, collector) if tower.pooling == "cls" else stream.pooled()
    return collector.finish(read_row(tower, pooled, x.dtype, backend), basis)


def _row(tower: Tower, block: Block) -> Row | None:
    """The attention row that the kernels give by themselves; None where tokens count otherwise."""
    if tower.pooling == "cls":
        return "cls"
    norms = (block.inner_norm, block.attention_post_norm)
    return "mean" if tower.pooled_from == 1 and norms == (None, None) else None


def _collect(
    collector: Collector,
    layer: int,
    block: Block,
    qkv: Tensor,
    out: Tensor,
    alpha: Tensor | None,
) -> None:
    """Records the pooled row of one layer's attention from all tokens'.

    Args:
        collector: what records.
        layer: which.
        block: its weights.
        qkv: ``[B, N, 3, H, E]``.
        out: ``[B, N, H, E]``.
        alpha: ``[B, H, N]``, where the kernel gave it.
    """
    tower, backend = collector.tower, collector.request.backend
    if tower.pooling == "cls":
        read = out[:, :1]
        weights = None
    else:
        read = out
        weights = mean_weights(tower, out).expand(len(out), 1, -1)  # [B, 1, N]
    frozen = freeze(block, read.flatten(2), backend)
    if layer not in collector.request.layers:
        if frozen is None:
            collector.leave_out(block, pool(tower, out))
        else:
            added = project_out(read.flatten(2), block, backend)
            collector.rest += added[:, 0] if weights is None else pool(tower, added)
        return
    value = qkv[:, :, 2] if collector.needs_values(layer) else None
    class_value = qkv[:, 0, 2]
    if weights is not None and alpha is None and collector.needs_attention_row(layer):
        alpha = weighted_row(weights, frozen, qkv, block, backend)
    if frozen is None:
        z = widened(pool(tower, out), None, collector.width)
        if value is not None:
            value = widened(value, None, collector.width)
        collector.add_attention(layer, z, alpha, value, widened(class_value, None, collector.width))
        return
    z, frame = framed(read, frozen, weights, collector.width)
    value = None if value is None else frame.values(value, collector.width)
    collector.add_attention(layer, z, alpha, value, frame.values(class_value, collector.width))


def _last_block(tower: Tower, stream: Stream, collector: Collector) -> Tensor:
    """The last block for the class token alone, ``[B, N, W] → [B, W]``."""
    block, backend = tower.blocks[-1], collector.request.backend
    normed = stream.norm(block.ln_1)
    attended = _last_attention(tower, normed, collector)
    pooled = stream.class_token()  # [B, W]
    if block.parallel:
        row = normed[:, 0]
        pooled = pooled + attended
    else:
        row = normalise(pooled, attended, block.ln_2, backend)
    term = mlp_out(mlp_in(row, block, tower.activation, backend), block, backend)
    collector.residual[:, -1] = term
    return pooled + term


def _last_attention(tower: Tower, normed: Tensor, collector: Collector) -> Tensor:
    """Attention of the last block for the class token alone, ``[B, N, W] → [B, W]``, recorded in ``collector``.

    Keys are not formed (``q·W_K x = (W_Kᵀq)·x``) unless a norm or a rotation acts on them, values only for tokens and
    maps per head, and one row of them for the class token's own part.
    """
    layer = tower.layers - 1
    block, heads, backend = tower.blocks[-1], tower.heads, collector.request.backend
    if any(part is not None for part in (block.key_norm, block.query_norm, block.rotary, block.score_bias)):
        qkv = project_in(tower, normed, block, backend)
        query, key, values = qkv[:, 0, 0], qkv[:, :, 1], qkv[:, :, 2]
        if block.score_bias is None:
            z, alpha = ops.query_row(query.contiguous(), key, values, backend=backend)
        else:
            out, row = attend(qkv, block, "cls", backend)
            assert row is not None
            z, alpha = out[:, 0].to(row.dtype), row
        value = values if collector.needs_values(layer) else None
        return _record_last(block, z, alpha, value, qkv[:, 0, 2], normed.dtype, collector)
    to_query, to_key, to_value = block.query_key_value()

    def by_head(x: Tensor, layer: Linear) -> Tensor:
        return ops.linear(x, *layer, backend=backend).unflatten(-1, (heads, tower.head_dim))

    query = by_head(normed[:, 0], to_query)
    key_by_head, value_by_head = (each.weight.view(heads, -1, tower.width) for each in (to_key, to_value))
    bias = to_value.weight.new_zeros(len(to_value.weight)) if to_value.bias is None else to_value.bias
    bias = bias.view(heads, -1)
    z, alpha = ops.query_row_from_tokens(query, normed, key_by_head, value_by_head, bias, backend=backend)
    value = None
    if collector.needs_values(layer):
        plain = block.inner_norm is None and collector.width == tower.head_dim
        if collector.request.tokens or collector.request.maps == "per_head" or not plain:
            value = by_head(normed, to_value)
        else:
            collector.add_maps_from_tokens(layer, alpha, normed, value_by_head, bias)
    class_value = by_head(normed[:, 0], to_value) if collector.needs_class_value(layer) else None
    return _record_last(block, z, alpha, value, class_value, normed.dtype, collector)


def _record_last(
    block: Block,
    z: Tensor,
    alpha: Tensor,
    value: Tensor | None,
    class_value: Tensor | None,
    dtype: torch.dtype,
    collector: Collector,
) -> Tensor:
    """Records the last block's attention and returns what it adds to the class token, ``[B, W]``."""
    backend, layer, width = collector.request.backend, collector.tower.layers - 1, collector.width
    frozen = freeze(block, z.flatten(1)[:, None].to(dtype), backend)
    attended = project_out(z.flatten(1).to(dtype), block, backend)
    if layer not in collector.request.layers:
        if frozen is None:
            collector.leave_out(block, z)
        else:
            collector.rest += attended
    elif frozen is None:
        wide = [None if each is None else widened(each, None, width) for each in (value, class_value)]
        collector.add_attention(layer, widened(z, None, width), alpha, *wide)
    else:
        code, frame = framed(z[:, None], frozen, None, width)
        wide = [None if each is None else frame.values(each, width) for each in (value, class_value)]
        collector.add_attention(layer, code, alpha, *wide)
    return attended
