"""What one block of a tower computes, in its own order: norms, projections, positions, MLP.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``M`` width of an MLP's hidden layer.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels import buffers, ops
from clipfast.kernels.reference import Row, accumulation_dtype
from clipfast.towers.tower import Activation, Block, LayerNorm, Tower


def normalise(
    x: Tensor, delta: Tensor | None, norm: LayerNorm | None, backend: str, carried: Tensor | None = None
) -> Tensor:
    """Adds a term to the residual stream ``x [..., W]`` in place and returns the stream's norm, or itself for None.

    ``carried`` belongs to the stream and is never added to it, see :class:`clipfast.forward.stream.Stream`.
    """
    if norm is not None and not norm.rms:
        return ops.add_layer_norm(x, delta, norm.weight, norm.bias, norm.eps, carried, backend=backend)
    if delta is not None:
        x.add_(delta)
    if norm is None:
        return x if carried is None else x + carried.to(x.dtype)
    acc_dtype = accumulation_dtype(x.dtype)
    whole = x.to(acc_dtype) if carried is None else x.to(acc_dtype) + carried
    return F.rms_norm(whole, x.shape[-1:], norm.weight.to(acc_dtype), norm.eps).to(x.dtype)


def statistics(x: Tensor, norm: LayerNorm | None, backend: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that a norm takes of each row, ``[..., W] → [...]`` twice; 0 and 1 for no norm."""
    acc_dtype = accumulation_dtype(x.dtype)
    if norm is None:
        return x.new_zeros(x.shape[:-1], dtype=acc_dtype), x.new_ones(x.shape[:-1], dtype=acc_dtype)
    if norm.rms:
        square = x.to(acc_dtype).square().mean(-1)
        return torch.zeros_like(square), (square + norm.eps).sqrt()
    mean, std = ops.layer_statistics(x.reshape(-1, x.shape[-1]), norm.eps, backend=backend)
    return mean.view(x.shape[:-1]), std.view(x.shape[:-1])


def project_in(tower: Tower, normed: Tensor, block: Block, backend: str) -> Tensor:
    """A block's queries, keys and values of normed tokens, ``[B, N, W] → [B, N, 3, H, E]``."""
    packed = block.packed()
    if packed is not None:
        qkv = ops.linear(normed, *packed, backend=backend)
    else:
        qkv = buffers.empty(normed, *normed.shape[:2], 3 * block.out_weight.shape[1])
        for part, layer in zip(qkv.chunk(3, -1), block.query_key_value(), strict=True):
            buffers.into(part, partial(ops.linear, normed, *layer, backend=backend))
    qkv = qkv.view(*normed.shape[:2], 3, tower.heads, tower.head_dim)
    for part, norm in ((qkv[:, :, 0], block.query_norm), (qkv[:, :, 1], block.key_norm)):
        if norm is not None:
            part.copy_(normalise(part.contiguous(), None, norm, backend))
    if block.rotary is not None:
        turned = qkv[:, tower.prefix_tokens :, :2]  # queries and keys of the patches
        ops.rotate(turned, block.rotary.cos, block.rotary.sin, block.rotary.halves, backend=backend)
    return qkv


def attend(qkv: Tensor, block: Block, row: Row | None, backend: str) -> tuple[Tensor, Tensor | None]:
    """Attention of all tokens, ``[B, N, 3, H, E] → [B, N, H, E]``, and the pooled row ``[B, H, N]``."""
    if block.score_bias is None:
        out, alpha = ops.attention(qkv, row, backend=backend)
        return out, alpha
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    bias = block.score_bias.to(qkv.dtype)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).contiguous()
    if row is None:
        return out, None
    weights = torch.zeros(1, qkv.shape[1], dtype=accumulation_dtype(qkv.dtype), device=qkv.device)
    if row == "cls":
        weights[:, 0] = 1
    else:
        weights[:, 1:] = 1 / (qkv.shape[1] - 1)
    return out, attention_rows(qkv, block, weights.expand(len(qkv), -1, -1), backend)[:, 0]


def attention_rows(qkv: Tensor, block: Block, weights: Tensor, backend: str) -> Tensor:
    """Attention rows added up with weights, ``[B, G, N] → [B, G, H, N]``: :func:`.ops.weighted_rows`."""
    if block.score_bias is None:
        rows: Tensor = ops.weighted_rows(qkv, weights.contiguous(), backend=backend)
        return rows
    out = []
    for part, each in zip(qkv, weights, strict=True):  # one image's N × N scores at a time
        query, key = (part[:, index].transpose(0, 1).to(weights.dtype) for index in (0, 1))
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(1, 2) + block.score_bias.to(weights.dtype)
        out.append((each @ logits.softmax(-1)).transpose(0, 1))
    return torch.stack(out) if out else weights.new_zeros(0, weights.shape[1], qkv.shape[3], qkv.shape[1])


def project_out(out: Tensor, block: Block, backend: str) -> Tensor:
    """What a block's attention adds to the residual stream, ``[..., H·E] → [..., W]``."""
    heads = out if block.inner_norm is None else normalise(out, None, block.inner_norm, backend)
    added = ops.linear(heads, block.out_weight, block.out_bias, backend=backend)
    if block.attention_post_norm is not None:
        added = normalise(added, None, block.attention_post_norm, backend)
    return added if block.attention_scale is None else added.mul_(block.attention_scale)


def mlp_in(normed: Tensor, block: Block, activation: Activation, backend: str) -> Tensor:
    """A block's hidden layer, ``[..., W] → [..., M]``."""
    if block.mlp_in_norm is not None:
        normed = normalise(normed, None, block.mlp_in_norm, backend)
    if block.mlp_gate_weight is None:
        hidden = _activated(normed, block.mlp_in_weight, block.mlp_in_bias, activation, backend)
    else:
        gate = _activated(normed, block.mlp_gate_weight, block.mlp_gate_bias, activation, backend)
        hidden = ops.linear(normed, block.mlp_in_weight, block.mlp_in_bias, backend=backend).mul_(gate)
    return hidden if block.mlp_norm is None else normalise(hidden, None, block.mlp_norm, backend)


def _activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation, backend: str) -> Tensor:
    if activation == "silu" or bias is None:
        hidden = ops.linear(x, weight, bias, backend=backend)
        return F.silu(hidden, inplace=True) if activation == "silu" else activate(hidden, activation)
    return ops.linear_activation(x, weight, bias, activation, backend=backend)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """An activation in plain torch, for what no kernel fuses it with."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def mlp_out(hidden: Tensor, block: Block, backend: str) -> Tensor:
    """What a block's MLP adds to the residual stream, ``[..., M] → [..., W]``."""
    added = ops.linear(hidden, block.mlp_out_weight, block.mlp_out_bias, backend=backend)
    if block.mlp_post_norm is not None:
        added = normalise(added, None, block.mlp_post_norm, backend)
    return added if block.mlp_scale is None else added.mul_(block.mlp_scale)


class Frozen(NamedTuple):
    """The norms of a block's attention, frozen: token i adds ``(zᵢ − shiftᵢ)·factorᵢ`` and ``biasᵢ`` times its bias.

    Attributes:
        factor: ``[B, N]``, 1 over both standard deviations.
        shift: ``[B, N]``, mean of the norm of all heads' outputs.
        bias: ``[B, N]``, 1 over the standard deviation of the norm after the output projection.
    """

    factor: Tensor
    shift: Tensor
    bias: Tensor


def freeze(block: Block, out: Tensor, backend: str) -> Frozen | None:
    """The norms of a block's attention at these tokens' heads, ``[B, N, H·E]``; None where it has none."""
    if block.inner_norm is None and block.attention_post_norm is None:
        return None
    mean, std = statistics(out, block.inner_norm, backend)
    post = torch.ones_like(std)
    if block.attention_post_norm is not None:
        heads = out if block.inner_norm is None else normalise(out, None, block.inner_norm, backend)
        added = ops.linear(heads, block.out_weight, block.out_bias, backend=backend)
        _, post = statistics(added, block.attention_post_norm, backend)
    return Frozen(1 / (std * post), mean, 1 / post)
