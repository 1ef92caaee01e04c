"""Tower + images → Contributions: the decomposed forward.

A plain forward computes everything that a decomposition needs and throws it away; here the pooled token's share is
kept as it goes by. Per layer that is each head's output for one token (``z``, row 0 of the attention output, free),
one attention row (``alpha``) and, for text maps, one pass over the values. What the plain forward computes in vain is
left out: in the last block only the pooled token is read, so neither its keys and values nor the other tokens' MLP
are needed. σ, μ and n are known only after the last layer; everything is accumulated unscaled and scaled once.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``L`` layers kept, ``T`` texts, ``D`` embed_dim.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.basis import Basis, Centring, FoldedTower, autocast_disabled
from clipfast.contributions import Contributions
from clipfast.fp8 import Mlps
from clipfast.kernels import buffers, ops
from clipfast.kernels.reference import accumulation_dtype
from clipfast.stream import Stream, add_norm, mlp_in, mlp_out, pool, project_in, project_out, readout
from clipfast.towers.tower import Linear, Tower

Maps = Literal["summed", "per_head"]


@dataclass(frozen=True)
class Request:
    """What to keep of a forward pass.

    Attributes:
        layers: layers of the model to keep codes, attention, tokens and maps of, ascending.
        text_basis: :func:`clipfast.basis.fold` of the tower with texts as columns, for maps.
        maps: ``"summed"`` over the kept heads and layers, ``"per_head"``, or None.
        attention: keep the pooled token's attention weights.
        tokens: keep what :meth:`Contributions.tokens` needs: the values of the kept layers.
        class_token: keep the class token's own part of every kept head.
        centring: how μ is split over the terms.
        backend: which kernels compute.
        mlps: the tower's MLPs in float8; None for its own weights. The last block's, if it is for the class token
            alone, takes no time and is computed from its own weights.
        adds_products: whether products add themselves to the residual stream, see :class:`Stream`; None on a GPU.
    """

    layers: tuple[int, ...]
    text_basis: Basis | None = None
    maps: Maps | None = None
    attention: bool = False
    tokens: bool = False
    class_token: bool = False
    centring: Centring = "uniform"
    backend: str = "auto"
    mlps: Mlps | None = None
    adds_products: bool | None = None


def embed(tower: Tower, images: Tensor, backend: str) -> Tensor:
    """Pixels to the start of the residual stream, ``[B, 3, height, width] → [B, N, W]``."""
    # A convolution whose stride is its kernel is one matrix product; this way its result has the tokens' layout.
    (rows, columns), (high, wide) = tower.grid, tower.patch_size
    patches = images[:, :, : rows * high, : columns * wide].unflatten(3, (columns, wide)).unflatten(2, (rows, high))
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), rows * columns, 3 * high * wide)
    position = tower.positional_embedding.to(images.dtype)
    x = images.new_empty(len(images), tower.tokens, tower.width)
    x[:, 0] = tower.class_embedding + position[0]
    if tower.registers is not None:
        x[:, 1 : tower.prefix_tokens] = tower.registers
    embedded = ops.linear(patches, tower.patch_weight.flatten(1), tower.patch_bias, backend=backend)  # [B, patches, W]
    x[:, tower.prefix_tokens :] = embedded.add_(position[1:])
    return x if tower.ln_pre is None else add_norm(x, None, tower.ln_pre, backend)


class _Collector:
    """Gathers the pooled token's terms while the forward runs."""

    def __init__(self, tower: Tower, request: Request, x: Tensor) -> None:
        self.tower = tower
        self.request = request
        images, tokens, width = x.shape
        acc_dtype = accumulation_dtype(x.dtype)
        layers, heads = len(request.layers), tower.heads
        self.codes = x.new_empty((images, layers, heads, tower.head_dim), dtype=acc_dtype)
        self.residual = x.new_empty((images, 1 + tower.layers, width), dtype=acc_dtype)  # the start, every MLP
        self.residual[:, 0] = pool(tower, x)
        self.rest = x.new_zeros((images, width), dtype=acc_dtype)
        self.values: Tensor | None = None
        if request.tokens:  # one piece for all layers: maps over layers read it in one go
            self.values = x.new_empty((layers, images, tokens, heads, tower.head_dim))
        self.attention: Tensor | None = None
        if request.attention or request.tokens:
            self.attention = x.new_empty((images, layers, heads, tokens), dtype=acc_dtype)
        self.class_codes = torch.empty_like(self.codes) if request.class_token else None
        self.maps: Tensor | None = None
        if request.text_basis is not None and request.maps is not None:
            texts = request.text_basis.columns
            if request.maps == "summed":
                self.maps = x.new_zeros((images, tokens, texts), dtype=acc_dtype)
            else:
                self.maps = x.new_empty((images, layers, heads, tokens, texts), dtype=acc_dtype)

    def needs_attention_row(self, layer: int) -> bool:
        parts = (self.attention, self.maps, self.class_codes)
        return layer in self.request.layers and any(part is not None for part in parts)

    def needs_values(self, layer: int) -> bool:
        return layer in self.request.layers and (self.request.tokens or self.maps is not None)

    def needs_class_value(self, layer: int) -> bool:
        return layer in self.request.layers and self.class_codes is not None

    def add_attention(
        self, layer: int, z: Tensor, alpha: Tensor | None, value: Tensor | None, class_value: Tensor | None
    ) -> None:
        """Records the pooled row of one layer's attention.

        Args:
            layer: which.
            z: ``[B, H, E]``.
            alpha: ``[B, H, N]``, where it is needed.
            value: ``[B, N, H, E]``, where it is needed.
            class_value: ``[B, H, E]``, the class token's row of the values, where it is needed.
        """
        if layer not in self.request.layers:
            block = self.tower.blocks[layer]
            acc_dtype = self.rest.dtype
            out = F.linear(z.to(acc_dtype).flatten(1), block.out_weight.to(acc_dtype), block.out_bias.to(acc_dtype))
            self.rest += out if block.attention_scale is None else out * block.attention_scale
            return
        position = self.request.layers.index(layer)
        self.codes[:, position] = z
        if alpha is None:
            return
        if self.attention is not None:
            self.attention[:, position] = alpha
        if self.class_codes is not None and class_value is not None:
            acc_dtype = self.class_codes.dtype
            self.class_codes[:, position] = alpha[..., :1].to(acc_dtype) * class_value.to(acc_dtype)
        if value is None:
            return
        if self.values is not None:
            self.values[position] = value
        if self.maps is not None and self.request.text_basis is not None:
            text_basis = self.request.text_basis.values(layer)
            if self.request.maps == "summed":
                ops.text_maps(alpha, value, text_basis, self.maps, backend=self.request.backend)
            else:
                self.maps[:, position] = ops.head_maps(alpha, value, text_basis, backend=self.request.backend)

    def add_maps_from_tokens(
        self, layer: int, alpha: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor
    ) -> None:
        """Adds one layer to summed maps without its values, from what they are projected from, ``[B, N, W]``."""
        if self.maps is None or self.request.text_basis is None:
            return
        basis, backend = self.request.text_basis.values(layer), self.request.backend
        ops.text_maps_from_tokens(alpha, tokens, value_weight, value_bias, basis, self.maps, backend=backend)

    def finish(self, embedding: Tensor, mean: Tensor, std: Tensor, basis: FoldedTower) -> Contributions:
        """Scales everything by the image's μ, σ and n, once."""
        tower, request = self.tower, self.request
        norm = embedding.to(std.dtype).norm(dim=-1)
        scale = 1 / (std * norm)  # [B]
        self.codes *= scale[:, None, None, None]
        if self.class_codes is not None:
            self.class_codes *= scale[:, None, None, None]
        omitted = tower.layers - len(request.layers)
        residual = basis.readout.term(self.residual, mean, std) * scale[:, None, None]
        if self.maps is not None and request.text_basis is not None:
            tokens = self.maps.shape[-2]
            constants = request.text_basis.constants(mean, std, request.layers) / tokens  # [B, L, T]
            if request.maps == "summed":
                self.maps += tower.heads * constants.sum(1)[:, None]
                self.maps *= scale[:, None, None]
            else:
                self.maps += constants[:, :, None, None]
                self.maps *= scale[:, None, None, None, None]
        return Contributions(
            embedding=embedding,
            norm=norm,
            mean=mean,
            std=std,
            codes=self.codes,
            start=residual[:, 0],
            mlps=residual[:, 1:],
            rest=basis.readout.term(self.rest, mean, std, omitted) * scale[:, None],
            layers=request.layers,
            grid=tower.grid,
            prefix_tokens=tower.prefix_tokens,
            basis=basis,
            _attention=self.attention,
            _maps=self.maps,
            _class_codes=self.class_codes,
            _values=None if self.values is None else tuple(self.values),
        )


def _last_attention(tower: Tower, normed: Tensor, collector: _Collector) -> Tensor:
    """Attention of the last block for the class token alone, ``[B, N, W] → [B, W]``, recorded in ``collector``.

    Keys are never formed (``q·W_K x = (W_Kᵀq)·x``), values only for tokens and maps per head, and one row of them for
    the class token's own part.
    """
    layer = tower.layers - 1
    block, heads, backend = tower.blocks[-1], tower.heads, collector.request.backend
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
        if collector.request.tokens or collector.request.maps == "per_head":
            value = by_head(normed, to_value)
        else:
            collector.add_maps_from_tokens(layer, alpha, normed, value_by_head, bias)
    class_value = None
    if collector.needs_class_value(layer):
        class_value = by_head(normed[:, 0], to_value)
    collector.add_attention(layer, z, alpha, value, class_value)
    return project_out(z.flatten(1).to(normed.dtype), block, backend)


@torch.no_grad()
def decompose(tower: Tower, images: Tensor, request: Request, basis: FoldedTower) -> Contributions:
    """Runs the tower once and keeps every term of the pooled token.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed, on the tower's device and in its dtype.
        request: what to keep.
        basis: :func:`clipfast.basis.fold` of the tower for ``request.centring``.
    """
    with autocast_disabled(images):
        if torch.compiler.is_compiling():
            return _decompose(tower, images, request, basis)
        with buffers.reuse(tower.device):
            return _decompose(tower, images, request, basis)


def _decompose(tower: Tower, images: Tensor, request: Request, basis: FoldedTower) -> Contributions:
    backend = request.backend
    x = embed(tower, images, backend)  # [B, N, W], the residual stream
    collector = _Collector(tower, request, x)
    blocks = tower.blocks[:-1] if tower.pooling == "cls" else tower.blocks
    stream = Stream(tower, x, blocks, request.mlps, request.adds_products, backend)
    for layer, block in enumerate(blocks):
        normed = stream.norm(block.ln_1)
        qkv = project_in(tower, normed, block, backend)  # [B, N, 3, H, E]
        del normed
        row = tower.pooling if collector.needs_attention_row(layer) else None
        out, alpha = ops.attention(qkv, row, backend=backend)  # [B, N, H, E], [B, H, N]
        value = qkv[:, :, 2] if collector.needs_values(layer) else None
        collector.add_attention(layer, pool(tower, out), alpha, value, qkv[:, 0, 2])
        del qkv, value
        stream.add_attention(layer, out.flatten(2))
        del out
        collector.residual[:, 1 + layer] = stream.add_mlp(layer, stream.norm(block.ln_2))
    pooled = _last_block(tower, stream, collector) if tower.pooling == "cls" else stream.pooled()
    mean, std = ops.layer_statistics(pooled, tower.ln_post.eps, backend=backend)
    embedding = readout(tower, pooled.to(x.dtype), backend)
    return collector.finish(embedding, mean, std, basis)


def _last_block(tower: Tower, stream: Stream, collector: _Collector) -> Tensor:
    """The last block for the class token alone, ``[B, N, W] → [B, W]``."""
    block, backend = tower.blocks[-1], collector.request.backend
    attended = _last_attention(tower, stream.norm(block.ln_1), collector)
    pooled = stream.class_token()  # [B, W]
    hidden = mlp_in(add_norm(pooled, attended, block.ln_2, backend), block, tower.activation, backend)
    term = mlp_out(hidden, block, backend)
    collector.residual[:, -1] = term
    return pooled + term
