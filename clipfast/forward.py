"""Tower + images → Contributions: the decomposed forward.

A plain forward computes everything that a decomposition needs and throws it away; here the pooled token's share is
kept as it goes by. Per layer that is each head's output for one token (``z``, row 0 of the attention output, free),
one attention row (``alpha``) and, for text maps, one pass over the values. What the plain forward computes in vain is
left out: in the last block only the pooled token is read, so neither its keys and values nor the other tokens' MLP
are needed. σ, μ and n are known only after the last layer; everything is accumulated unscaled and scaled once.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``L`` layers kept, ``T`` texts, ``D`` embed_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.basis import Basis, Centring, FoldedTower, autocast_disabled
from clipfast.contributions import Contributions
from clipfast.kernels import buffers, ops
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.tower import Activation, Block, LayerNorm, Tower

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
    adds_products: bool | None = None


def add_norm(x: Tensor, delta: Tensor | None, norm: LayerNorm, backend: str) -> Tensor:
    """Adds a term to the residual stream ``x [..., W]`` in place and returns the stream's LayerNorm."""
    return ops.add_layer_norm(x, delta, norm.weight, norm.bias, norm.eps, backend=backend)


def feed_forward(normed: Tensor, block: Block, activation: Activation, backend: str) -> Tensor:
    """What a block's MLP adds to the residual stream, from the normed tokens ``[..., W]``."""
    hidden = ops.linear_activation(normed, block.mlp_in_weight, block.mlp_in_bias, activation, backend=backend)
    return project(hidden, block.mlp_out_weight, block.mlp_out_bias, block.mlp_scale, backend)


def project(h: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, backend: str) -> Tensor:
    """A projection to the residual stream with its layer scale, ``[..., K] → [..., W]``."""
    added = ops.linear(h, weight, bias, backend=backend)
    return added if scale is None else added.mul_(scale)


class Stream:
    """The residual stream of some blocks while they run: ``x``, what is still to be added to it, and carried biases.

    A term is added where the next LayerNorm reads the stream. On a GPU there is no term: the product itself adds to
    ``x``, rounded once with the sum instead of twice, and saves writing and reading it. Its bias is carried: it never
    enters ``x``, and LayerNorm adds the sum of all biases so far to what it reads. A layer scale stands between product
    and sum, so a tower that has one takes the first way.

    Attributes:
        x: ``[B, N, W]``, changed in place.

    Args:
        x: the start of the stream.
        blocks: those that will run, in their order.
        adds_products: whether products add themselves; None where it pays, on a GPU.
        backend: which kernels compute.
    """

    def __init__(self, x: Tensor, blocks: Sequence[Block], adds_products: bool | None, backend: str) -> None:
        self.x = x
        self._backend = backend
        self._added: Tensor | None = None  # [B, N, W]
        self._carried: Tensor | None = None  # [W]
        self._sums: list[Tensor] | None = None  # what is carried after every product
        scaled = any(block.attention_scale is not None or block.mlp_scale is not None for block in blocks)
        if blocks and not scaled and (x.is_cuda if adds_products is None else adds_products):
            biases = torch.stack([bias for block in blocks for bias in (block.out_bias, block.mlp_out_bias)])
            self._sums = list(biases.to(accumulation_dtype(x.dtype)).cumsum(0).unbind())

    def add(self, h: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> None:
        """Adds a projection of ``h [B, N, K]``, with its bias and layer scale."""
        if self._sums is None:
            self._added = project(h, weight, bias, scale, self._backend)
        else:
            ops.add_linear(self.x, h, weight, backend=self._backend)
            self._carried = self._sums.pop(0)

    def norm(self, norm: LayerNorm) -> Tensor:
        """The LayerNorm of the stream, ``[B, N, W]``."""
        added, self._added = self._added, None  # nothing as wide as the stream lives longer than it must
        backend, carried = self._backend, self._carried
        return ops.add_layer_norm(self.x, added, norm.weight, norm.bias, norm.eps, carried, backend=backend)

    def mlp_term(self, tower: Tower, hidden: Tensor, block: Block) -> Tensor:
        """The pooled row of what was added last, the MLP of a block, ``[B, W]``; ``hidden [B, N, M]`` is its inside."""
        if self._added is not None:
            return pool(tower, self._added)
        row = hidden[:, 0] if tower.pooling == "cls" else pool(tower, hidden)
        return ops.linear_unrounded(row, block.mlp_out_weight, block.mlp_out_bias, backend=self._backend)

    def class_token(self) -> Tensor:
        """The class token's row of the stream, after :meth:`norm`, ``[B, W]``."""
        row = self.x[:, 0].contiguous()
        return row if self._carried is None else (row + self._carried).to(row.dtype)

    def whole(self) -> Tensor:
        """The stream with everything in it, ``[B, N, W]``: the last that is asked of it."""
        for part in (self._added, self._carried):
            if part is not None:
                self.x += part
        return self.x

    def pooled(self, tower: Tower) -> Tensor:
        """The row that the embedding reads, ``[B, W]``, in the dtype sums are carried in."""
        row = pool(tower, self.x if self._added is None else self.x.add_(self._added))
        return row if self._carried is None else row + self._carried


def embed(tower: Tower, images: Tensor, backend: str) -> Tensor:
    """Pixels to the start of the residual stream, ``[B, 3, height, width] → [B, N, W]``."""
    # A convolution whose stride is its kernel is one matrix product; this way its result has the tokens' layout.
    (rows, columns), (high, wide) = tower.grid, tower.patch_size
    patches = images[:, :, : rows * high, : columns * wide].unflatten(3, (columns, wide)).unflatten(2, (rows, high))
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), rows * columns, 3 * high * wide)
    position = tower.positional_embedding.to(images.dtype)
    x = images.new_empty(len(images), tower.tokens, tower.width)
    x[:, 0] = tower.class_embedding + position[0]
    embedded = ops.linear(patches, tower.patch_weight.flatten(1), backend=backend)  # [B, N − 1, W]
    x[:, 1:] = embedded.add_(position[1:])
    return x if tower.ln_pre is None else add_norm(x, None, tower.ln_pre, backend)


def pool(tower: Tower, x: Tensor) -> Tensor:
    """The row that the embedding reads, ``[B, N, ...] → [B, ...]``, in the dtype sums are carried in."""
    acc_dtype = accumulation_dtype(x.dtype)
    return x[:, 0].to(acc_dtype) if tower.pooling == "cls" else x[:, 1:].to(acc_dtype).mean(1)


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
    query_weight, key_weight, value_weight = block.in_weight.chunk(3)
    query_bias, _, value_bias = (None, None, None) if block.in_bias is None else block.in_bias.chunk(3)

    def by_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(x, weight, bias, backend=backend).unflatten(-1, (heads, tower.head_dim))

    query = by_head(normed[:, 0], query_weight, query_bias)
    key_by_head, value_by_head = (weight.view(heads, -1, tower.width) for weight in (key_weight, value_weight))
    bias = (value_weight.new_zeros(len(value_weight)) if value_bias is None else value_bias).view(heads, -1)
    z, alpha = ops.query_row_from_tokens(query, normed, key_by_head, value_by_head, bias, backend=backend)
    value = None
    if collector.needs_values(layer):
        if collector.request.tokens or collector.request.maps == "per_head":
            value = by_head(normed, value_weight, value_bias)
        else:
            collector.add_maps_from_tokens(layer, alpha, normed, value_by_head, bias)
    class_value = None
    if collector.needs_class_value(layer):
        class_value = by_head(normed[:, 0], value_weight, value_bias)
    collector.add_attention(layer, z, alpha, value, class_value)
    out = z.flatten(1).to(normed.dtype)
    return project(out, block.out_weight, block.out_bias, block.attention_scale, backend)


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
    stream = Stream(x, blocks, request.adds_products, backend)
    for layer, block in enumerate(blocks):
        normed = stream.norm(block.ln_1)
        qkv = ops.linear(normed, block.in_weight, block.in_bias, backend=backend)
        del normed
        qkv = qkv.view(*x.shape[:2], 3, tower.heads, tower.head_dim)  # [B, N, 3, H, E]
        row = tower.pooling if collector.needs_attention_row(layer) else None
        out, alpha = ops.attention(qkv, row, backend=backend)  # [B, N, H, E], [B, H, N]
        value = qkv[:, :, 2] if collector.needs_values(layer) else None
        collector.add_attention(layer, pool(tower, out), alpha, value, qkv[:, 0, 2])
        del qkv, value
        stream.add(out.flatten(2), block.out_weight, block.out_bias, block.attention_scale)
        del out
        normed = stream.norm(block.ln_2)
        hidden = ops.linear_activation(
            normed, block.mlp_in_weight, block.mlp_in_bias, tower.activation, backend=backend
        )
        del normed
        stream.add(hidden, block.mlp_out_weight, block.mlp_out_bias, block.mlp_scale)
        collector.residual[:, 1 + layer] = stream.mlp_term(tower, hidden, block)
        del hidden
    pooled = _last_block(tower, stream, collector) if tower.pooling == "cls" else stream.pooled(tower)
    mean, std = ops.layer_statistics(pooled, tower.ln_post.eps, backend=backend)
    embedding = add_norm(pooled.to(x.dtype), None, tower.ln_post, backend) @ tower.projection
    return collector.finish(embedding, mean, std, basis)


def _last_block(tower: Tower, stream: Stream, collector: _Collector) -> Tensor:
    """The last block for the class token alone, ``[B, N, W] → [B, W]``."""
    block, backend = tower.blocks[-1], collector.request.backend
    attended = _last_attention(tower, stream.norm(block.ln_1), collector)
    pooled = stream.class_token()  # [B, W]
    term = feed_forward(add_norm(pooled, attended, block.ln_2, backend), block, tower.activation, backend)
    collector.residual[:, -1] = term
    return pooled + term
