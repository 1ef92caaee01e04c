"""The residual stream of a tower while its blocks run, and what a block adds to it.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``M`` width of an MLP's hidden layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast import fp8
from clipfast.kernels import buffers, ops
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.tower import Activation, Block, LayerNorm, Tower


def add_norm(x: Tensor, delta: Tensor | None, norm: LayerNorm, backend: str) -> Tensor:
    """Adds a term to the residual stream ``x [..., W]`` in place and returns the stream's LayerNorm."""
    return ops.add_layer_norm(x, delta, norm.weight, norm.bias, norm.eps, backend=backend)


def project_in(tower: Tower, normed: Tensor, block: Block, backend: str) -> Tensor:
    """A block's queries, keys and values of normed tokens, ``[B, N, W] → [B, N, 3, H, E]``."""
    packed = block.packed()
    if packed is not None:
        qkv = ops.linear(normed, *packed, backend=backend)
    else:
        qkv = buffers.empty(normed, *normed.shape[:2], 3 * tower.width)
        for part, layer in zip(qkv.chunk(3, -1), block.query_key_value(), strict=True):
            part.copy_(ops.linear(normed, *layer, backend=backend))
    return qkv.view(*normed.shape[:2], 3, tower.heads, tower.head_dim)


def mlp_in(normed: Tensor, block: Block, activation: Activation, backend: str) -> Tensor:
    """A block's hidden layer, ``[..., W] → [..., M]``."""
    return ops.linear_activation(normed, block.mlp_in_weight, block.mlp_in_bias, activation, backend=backend)


def mlp_out(hidden: Tensor, block: Block, backend: str) -> Tensor:
    """What a block's MLP adds to the residual stream, ``[..., M] → [..., W]``."""
    added = ops.linear(hidden, block.mlp_out_weight, block.mlp_out_bias, backend=backend)
    return added if block.mlp_scale is None else added.mul_(block.mlp_scale)


def project_out(out: Tensor, block: Block, backend: str) -> Tensor:
    """What a block's attention adds to the residual stream, ``[..., H·E] → [..., W]``."""
    added = ops.linear(out, block.out_weight, block.out_bias, backend=backend)
    return added if block.attention_scale is None else added.mul_(block.attention_scale)


def readout(tower: Tower, pooled: Tensor, backend: str) -> Tensor:
    """The final LayerNorm and the projection, ``[B, W] → [B, D]``."""
    normed = add_norm(pooled, None, tower.ln_post, backend)
    return normed if tower.projection is None else normed @ tower.projection


def pool(tower: Tower, x: Tensor) -> Tensor:
    """The row that the embedding reads, ``[B, N, ...] → [B, ...]``, in the dtype sums are carried in."""
    acc_dtype = accumulation_dtype(x.dtype)
    return x[:, 0].to(acc_dtype) if tower.pooling == "cls" else x[:, 1:].to(acc_dtype).mean(1)


class Stream:
    """The residual stream of some blocks while they run: ``x``, what is still to be added to it, and carried biases.

    A term is added where the next LayerNorm reads the stream. On a GPU there is no term: the product itself adds to
    ``x``, rounded once with the sum instead of twice, and saves writing and reading it. Its bias is carried: it never
    enters ``x``, and LayerNorm adds the sum of all biases so far to what it reads.

    Two kinds of products do not add themselves. With a layer scale there is a step between product and sum. The term of
    an MLP is recorded; for the class token it is computed again, one row of a product, but for the mean of all patches
    reading the hidden layer again would take longer than what is saved. And float8's products cannot.

    Attributes:
        x: ``[B, N, W]``, changed in place.

    Args:
        tower: the model.
        x: the start of the stream.
        blocks: those of the model that will run, in their order.
        mlps: their MLPs in float8, None for the weights as they are.
        adds_products: whether products add themselves; None where it pays, on a GPU.
        backend: which kernels compute.
    """

    def __init__(
        self,
        tower: Tower,
        x: Tensor,
        blocks: Sequence[Block],
        mlps: fp8.Mlps | None = None,
        adds_products: bool | None = None,
        backend: str = "auto",
    ) -> None:
        self.x = x
        self._tower = tower
        self._blocks = blocks
        self._mlps = mlps
        self._backend = backend
        self._added: Tensor | None = None  # [B, N, W]
        self._carried: Tensor | None = None  # [W]
        adds = x.is_cuda if adds_products is None else adds_products
        scaled = any(block.attention_scale is not None or block.mlp_scale is not None for block in blocks)
        self._adds_attention = adds and not scaled
        self._adds_mlps = self._adds_attention and tower.pooling == "cls" and mlps is None
        biases = [
            bias
            for block in blocks
            for bias, carried in ((block.out_bias, self._adds_attention), (block.mlp_out_bias, self._adds_mlps))
            if carried
        ]
        self._sums = _running_sums(biases, accumulation_dtype(x.dtype)) if biases else []  # carried after each

    def add_attention(self, layer: int, out: Tensor) -> None:
        """Adds the attention of one of the blocks, from the heads' outputs ``[B, N, H·E]``."""
        block = self._blocks[layer]
        if self._adds_attention:
            self._add_product(out, block.out_weight)
        else:
            self._added = project_out(out, block, self._backend)

    def add_mlp(self, layer: int, normed: Tensor) -> Tensor:
        """Adds the MLP of one of the blocks, from ``[B, N, W]``; returns the pooled row of it, ``[B, W]``."""
        block, activation = self._blocks[layer], self._tower.activation
        if self._mlps is not None:
            self._added = fp8.feed_forward(normed, block, self._mlps.layers[layer], activation, self._backend)
            return pool(self._tower, self._added)
        hidden = mlp_in(normed, block, activation, self._backend)
        del normed
        if not self._adds_mlps:
            self._added = mlp_out(hidden, block, self._backend)
            return pool(self._tower, self._added)
        self._add_product(hidden, block.mlp_out_weight)
        row = hidden[:, 0]
        return ops.linear_unrounded(row, block.mlp_out_weight, block.mlp_out_bias, backend=self._backend)

    def _add_product(self, h: Tensor, weight: Tensor) -> None:
        ops.add_linear(self.x, h, weight, backend=self._backend)
        self._carried = self._sums.pop(0)

    def norm(self, norm: LayerNorm) -> Tensor:
        """The LayerNorm of the stream, ``[B, N, W]``."""
        added, self._added = self._added, None  # nothing as wide as the stream lives longer than it must
        backend, carried = self._backend, self._carried
        return ops.add_layer_norm(self.x, added, norm.weight, norm.bias, norm.eps, carried, backend=backend)

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

    def pooled(self) -> Tensor:
        """The row that the embedding reads, ``[B, W]``, in the dtype sums are carried in."""
        row = pool(self._tower, self.x if self._added is None else self.x.add_(self._added))
        return row if self._carried is None else row + self._carried


def _running_sums(vectors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The sums of the first one, the first two, … of these vectors ``[W]``."""
    # In log₂ steps, because torch's cumsum is refused on a GPU where deterministic algorithms are asked for.
    sums = torch.stack(list(vectors)).to(dtype)
    step = 1
    while step < len(vectors):
        sums = torch.cat([sums[:step], sums[step:] + sums[:-step]])
        step *= 2
    return list(sums.unbind())
