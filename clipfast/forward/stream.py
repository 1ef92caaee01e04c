"""The residual stream of a tower while its blocks run, and what a block adds to it.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``M`` width of an MLP's hidden layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast import fp8
from clipfast.forward.blocks import mlp_in, mlp_out, normalise, project_out
from clipfast.forward.pooling import pool
from clipfast.kernels import ops
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.tower import Block, LayerNorm, Tower


class Stream:
    """The residual stream of some blocks while they run: ``x``, what is still to be added to it, and carried biases.

    A term is added where the next LayerNorm reads the stream. On a GPU there is no term: the product itself adds to
    ``x``, rounded once with the sum instead of twice, and saves writing and reading it. Its bias is carried: it never
    enters ``x``, and LayerNorm adds the sum of all biases so far to what it reads.

    Two kinds of products do not add themselves. With a layer scale or a norm there is a step between product and sum.
    The term of an MLP is recorded; for the class token it is computed again, one row of a product, but for the mean of
    all patches reading the hidden layer again would take longer than what is saved. And float8's products cannot.

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
        self._adds_attention = adds and all(map(_is_plain, blocks))
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
        hidden = self._add_mlp(layer, normed)
        if hidden is None:
            return pool(self._tower, self.added)
        block = self._blocks[layer]
        return ops.linear_unrounded(hidden[:, 0], block.mlp_out_weight, block.mlp_out_bias, backend=self._backend)

    def pass_mlp(self, layer: int, normed: Tensor) -> None:
        """:meth:`add_mlp` where nothing asks for the pooled row.

        Without products that add themselves, :attr:`added` is then the whole term.
        """
        self._add_mlp(layer, normed)

    def _add_mlp(self, layer: int, normed: Tensor) -> Tensor | None:
        """Gives the hidden layer ``[B, N, M]`` where the product adds itself to the stream."""
        block, activation = self._blocks[layer], self._tower.activation
        if self._added is not None:  # the attention of a parallel block, which reads the same norm
            self.x += self._added
            self._added = None
        if self._mlps is not None:
            self._added = fp8.feed_forward(normed, block, self._mlps.layers[layer], activation, self._backend)
            return None
        hidden = mlp_in(normed, block, activation, self._backend)
        del normed
        if not self._adds_mlps:
            self._added = mlp_out(hidden, block, self._backend)
            return None
        self._add_product(hidden, block.mlp_out_weight)
        return hidden

    def _add_product(self, h: Tensor, weight: Tensor) -> None:
        ops.add_linear(self.x, h, weight, backend=self._backend)
        self._carried = self._sums.pop(0)

    def norm(self, norm: LayerNorm | None) -> Tensor:
        """The norm of the stream, ``[B, N, W]``; the stream itself for None."""
        added, self._added = self._added, None  # nothing as wide as the stream lives longer than it must
        return normalise(self.x, added, norm, self._backend, self._carried)

    @property
    def added(self) -> Tensor:
        """The last term, before the stream has it, ``[B, N, W]``."""
        assert self._added is not None
        return self._added

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


def _is_plain(block: Block) -> bool:
    """Whether nothing stands between a block's products and the residual stream."""
    steps = (block.attention_scale, block.mlp_scale, block.attention_post_norm, block.mlp_post_norm)
    return block.ln_1 is not None and block.ln_2 is not None and all(step is None for step in steps)


def _running_sums(vectors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The sums of the first one, the first two, … of these vectors ``[W]``."""
    # In log₂ steps, because torch's cumsum is refused on a GPU where deterministic algorithms are asked for.
    sums = torch.stack(list(vectors)).to(dtype)
    step = 1
    while step < len(vectors):
        sums = torch.cat([sums[:step], sums[step:] + sums[:-step]])
        step *= 2
    return list(sums.unbind())
