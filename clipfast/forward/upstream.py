"""The blocks before an attention pool: what each head, MLP and the start give to the embedding through the pool.

An attention pool reads every token through a LayerNorm of its own. With those frozen, head g of the pool reads
``p_g = Σᵢ w[g,i]·γ(xᵢ − μᵢ) + β`` with ``w[g,i] = a[g,i]/σᵢ``, which is linear in whatever the blocks wrote into the
tokens ``xᵢ``; its value and output projections are linear, too. So a term ``m`` of the residual stream gives the pool's
output ``Σ_g W_O^g W_V^g γ(Σᵢ w[g,i] mᵢ)``. The weights are known after the last block: each block's outputs are kept
until then. No ``N × N`` weights are stored; where attention or maps are asked for, scores are formed once more.

``B`` images, ``N`` tokens, ``W`` width, ``L`` layers, ``H`` heads, ``E`` head_dim, ``G`` heads of the pool, ``F`` their
head_dim, ``V`` width of the pool's output, ``T`` texts, ``D`` embed_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.basis import Readout
from clipfast.forward.blocks import Frozen, attention_rows
from clipfast.forward.pooling import Pooled, weighted
from clipfast.towers.tower import Block, LayerNorm, Output, Tower


@dataclass
class Kept:
    """What one block wrote, until the weights of its tokens are known.

    Attributes:
        out: ``[B, N, H, E]``, its heads' outputs.
        mlp: ``[B, N, W]``, what its MLP added.
        frozen: its norms after the attention.
        qkv: ``[B, N, 3, H, E]``, where attention or maps are asked for.
    """

    out: Tensor
    mlp: Tensor
    frozen: Frozen | None
    qkv: Tensor | None


class PoolPath:
    """How weighted sums of tokens reach the output of an attention pool.

    Args:
        tower: the model.
        pooled: the images' weights.
        centring: how each token's mean is split: ``"uniform"``, or ``"termwise"``.
    """

    def __init__(self, tower: Tower, pooled: Pooled, centring: str) -> None:
        pool, norm = tower.pool, tower.ln_post
        assert pool is not None
        assert pooled.weights is not None
        assert pooled.means is not None
        dtype = pooled.weights.dtype
        self.weights = pooled.weights
        self._terms = tower.terms
        self._gamma = None if norm is None else norm.weight.to(dtype)
        self._centres = centring == "termwise" and norm is not None and not norm.rms
        self._means = None if centring == "termwise" else pooled.means  # [B, G]
        self._value = pool.value_weight.to(dtype).unflatten(0, (pool.heads, -1))  # [G, F, W]
        self._out = pool.out_weight.to(dtype)
        constant = pool.out_bias.to(dtype)
        values = None if pool.value_bias is None else pool.value_bias.to(dtype)
        if norm is not None:
            shift = pool.value_weight.to(dtype) @ norm.bias.to(dtype)
            values = shift if values is None else values + shift
        self._constant = constant if values is None else constant + self._out @ values  # [V]

    def rows(self, rows: Tensor, share: float) -> Tensor:
        """Weighted sums of a term's tokens to its part of the pool's output.

        Args:
            rows: ``[B, ..., G, W]``.
            share: of the means and the pool's biases, 1 for all terms together.

        Returns:
            ``[B, ..., V]``.
        """
        if self._means is not None:
            means = self._means.view(len(rows), *[1] * (rows.ndim - 3), rows.shape[-2], 1)
            rows = rows - share * means
        if self._centres:
            rows = rows - rows.mean(-1, keepdim=True)
        if self._gamma is not None:
            rows = rows * self._gamma
        read = torch.einsum("...gw,gfw->...gf", rows, self._value)
        return F.linear(read.flatten(-2), self._out) + share * self._constant

    def residual(self, x: Tensor) -> Tensor:
        """One term of the residual stream, ``[B, N, W] → [B, V]``."""
        return self.rows(weighted(self.weights, x), 1 / self._terms)

    def heads(self, block: Block, kept: Kept, heads: int) -> Tensor:
        """Every head of a block, ``[B, H, V]``."""
        return self.rows(_head_rows(self.weights, block.output(), kept, heads), 1 / (self._terms * heads))

    def columns(self, matrix: Tensor) -> Tensor:
        """What reads the residual stream, given what reads the pool's output, ``[V, T] → [G, W, T]``."""
        by_head = (self._out.T @ matrix).unflatten(0, (self._value.shape[0], -1))  # [G, F, T]
        columns = self._value.transpose(1, 2) @ by_head
        if self._gamma is not None:
            columns = self._gamma[:, None] * columns
        return columns - columns.mean(1, keepdim=True) if self._centres else columns


def _head_rows(weights: Tensor, output: Output, kept: Kept, heads: int) -> Tensor:
    """What every head writes into the stream, tokens added up with weights, ``[B, H, G, W]``, biases shared evenly."""
    dtype, frozen = weights.dtype, kept.frozen
    factor = weights if frozen is None else weights * frozen.factor[:, None]  # [B, G, N]
    z = weighted(factor, kept.out)  # [B, G, H, E]
    if frozen is not None:
        z = z - (factor @ frozen.shift[..., None])[..., None]
    reads, bias = _output(output, dtype)
    by_head = reads.unflatten(1, (heads, -1))  # [W, H, E]
    rows = torch.einsum("bghe,whe->bhgw", z, by_head)
    total = weights.sum(-1)  # [B, G]
    scaled = total if frozen is None else (weights @ frozen.bias[..., None])[..., 0]
    rows = rows + scaled[:, None, :, None] * (bias / heads)
    if output.post_norm is not None:
        shift = output.post_norm.bias.to(dtype)
        shift = shift if output.scale is None else shift * output.scale.to(dtype)
        rows = rows + total[:, None, :, None] * (shift / heads)
    return rows


def _output(output: Output, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight ``[W, H·E]`` and bias ``[W]`` of an output with its norms' weights and its scale in them."""
    weight, bias = output.weight.to(dtype), output.bias.to(dtype)
    inner: LayerNorm | None = output.inner_norm
    post: LayerNorm | None = output.post_norm
    if inner is not None:
        bias = bias + weight @ inner.bias.to(dtype)
        weight = weight * inner.weight.to(dtype)
    if post is not None:
        if not post.rms:
            weight, bias = weight - weight.mean(0), bias - bias.mean()
        weight, bias = weight * post.weight.to(dtype)[:, None], bias * post.weight.to(dtype)
    if output.scale is not None:
        weight, bias = weight * output.scale.to(dtype)[:, None], bias * output.scale.to(dtype)
    return weight, bias


def pooled_rows(weights: Tensor, block: Block, kept: Kept, backend: str) -> Tensor:
    """Attention of a block's tokens added up with their weights, ``[B, G, N] → [B, G, H, N]``."""
    assert kept.qkv is not None
    factor = weights if kept.frozen is None else weights * kept.frozen.factor[:, None]
    return attention_rows(kept.qkv, block, factor, backend)


def head_columns(path: PoolPath, block: Block, readout: Readout, heads: int) -> Tensor:
    """What a block's values give texts through each head of the pool, ``[G, H, E, T]``."""
    weight, _ = _output(block.output(), path.weights.dtype)
    by_head = weight.T.unflatten(0, (heads, -1))  # [H, E, W]
    return by_head @ path.columns(readout.matrix)[:, None]
