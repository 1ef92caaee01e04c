"""What a tower's blocks compute, in the width of the residual stream: of the pooled row and of all tokens.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``C`` numbers of a code,
``M`` width of an MLP's hidden layer, ``L`` layers, ``D`` embed_dim.
"""

from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.basis import FoldedTower, Readout, autocast_disabled
from clipfast.contributions import Contributions
from clipfast.errors import InputError
from clipfast.forward import Request, decompose
from clipfast.forward.blocks import attend, freeze, mlp_in, mlp_out, normalise, project_in, project_out, statistics
from clipfast.forward.collector import widened
from clipfast.forward.embedding import embed
from clipfast.forward.stream import Stream
from clipfast.kernels import buffers
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.tower import LayerNorm, Output, Tower


class StreamReadout(Readout):
    """A readout that leaves the terms as they are, ``[B, ..., W]``."""

    def __init__(self, tower: Tower) -> None:
        like = torch.empty(0, dtype=accumulation_dtype(tower.dtype), device=tower.device)
        super().__init__(tower.width, None, None, None, 1, "uniform", like)

    def term(self, residual: Tensor, mean: Tensor, std: Tensor, count: int = 1) -> Tensor:
        """The term itself."""
        return residual


class StreamBasis(FoldedTower):
    """A basis whose columns are those of the residual stream: a head's part is what it writes into the stream."""

    @torch.no_grad()
    def __init__(self, tower: Tower) -> None:
        readout = StreamReadout(tower)
        outputs = [block.output() for block in tower.blocks]
        with autocast_disabled(readout.matrix):
            super().__init__(tower, readout, outputs, tower.heads, "uniform", "stream")

    def _values_of(self, output: Output, columns: Tensor) -> Tensor:
        plain = output.inner_norm is None and not any(each.post_norm for each in self._outputs)
        if not plain:
            return super()._values_of(output, columns)
        weight = output.weight.detach().to(columns.dtype).T
        if output.scale is not None:
            weight = weight * output.scale.to(columns.dtype)
        return weight.unflatten(0, (self.heads, -1))

    def bias(self, layer: int) -> Tensor:
        """What a layer's attention writes besides its heads, ``[W]``."""
        return self.heads * self.biases[layer]


class PooledRow:
    """The row of the residual stream that the embedding reads, and every term of it, from one decomposed forward.

    Nothing as wide as the tokens is kept: per image the codes, ``L·H·E`` numbers, and ``(L + 1)·W`` numbers.

    Args:
        tower: one that pools a class token or a mean of tokens before the final LayerNorm.
        images: ``[B, 3, height, width]``, preprocessed, on the tower's device and in its dtype.
        basis: of the tower.
        backend: which kernels compute.
    """

    def __init__(self, tower: Tower, images: Tensor, basis: StreamBasis, backend: str) -> None:
        self._basis = basis
        request = Request(layers=tuple(range(tower.layers)), backend=backend)
        self._terms: Contributions = decompose(tower, images, request, self._basis)
        self._scale = self._terms.std * self._terms.norm  # contributions are divided by it

    @property
    def embedding(self) -> Tensor:
        """``[B, D]``, not normalised."""
        return self._terms.embedding

    @property
    def norm(self) -> Tensor:
        """``[B]``, ‖embedding‖."""
        return self._terms.norm

    @property
    def std(self) -> Tensor:
        """``[B]``, σ of the final LayerNorm."""
        return self._terms.std

    def head(self, layer: int, head: int) -> Tensor:
        """What one head writes, without the output projection's bias, ``[B, W]``."""
        code = self._terms.codes[:, layer, head] * self._scale[:, None]  # of this head alone
        return code @ self._basis.values(layer)[head]

    def heads(self, layer: int) -> Tensor:
        """:meth:`head` of all heads of a layer, ``[B, H, W]``."""
        return torch.einsum("bhe,hew->bhw", self._codes(layer), self._basis.values(layer))

    def _codes(self, layer: int) -> Tensor:
        return self._terms.codes[:, layer] * self._scale[:, None, None]

    def attention(self, layer: int) -> Tensor:
        """What a layer's attention writes, ``[B, W]``."""
        return self._codes(layer).flatten(1) @ self._basis.values(layer).flatten(0, 1) + self._basis.bias(layer)

    def mlp(self, layer: int) -> Tensor:
        """What a layer's MLP writes, ``[B, W]``."""
        return self._terms.mlps[:, layer] * self._scale[:, None]

    @cached_property
    def stream(self) -> Tensor:
        """The row before every block and after the last, ``[L + 1, B, W]``."""
        rows = [self._terms.start * self._scale[:, None]]
        for layer in range(self._basis.layers):
            rows.append(rows[-1] + self.attention(layer) + self.mlp(layer))
        return torch.stack(rows)


class Block:
    """What one block computes of all tokens; each value when it is first asked for.

    Args:
        tower: the model.
        layer: which block.
        x: the residual stream before it, ``[B, N, W]``.
        backend: which kernels compute.
    """

    def __init__(self, tower: Tower, layer: int, x: Tensor, backend: str) -> None:
        self._tower, self._backend = tower, backend
        self.layer, self.x = layer, x
        self.weights = tower.blocks[layer]

    @cached_property
    def normed(self) -> Tensor:
        """What the attention reads, ``[B, N, W]``."""
        return normalise(self.x, None, self.weights.ln_1, self._backend)

    @cached_property
    def qkv(self) -> Tensor:
        """Queries, keys and values as the attention uses them, ``[B, N, 3, H, E]``."""
        return project_in(self._tower, self.normed, self.weights, self._backend)

    @property
    def projected(self) -> Tensor:
        """Queries, keys and values before norms of their own and rotary positions, ``[B, N, 3, H, E]``."""
        weights = self.weights
        if weights.rotary is None and weights.query_norm is None and weights.key_norm is None:
            return self.qkv
        plain = replace(weights, rotary=None, query_norm=None, key_norm=None)
        return project_in(self._tower, self.normed, plain, self._backend)

    @property
    def scores(self) -> Tensor:
        """The attention's logits, ``[B, H, queries, keys]``."""
        query, key = (part.to(accumulation_dtype(part.dtype)) for part in self.qkv[:, :, :2].unbind(2))
        scores = torch.einsum("bqhe,bkhe->bhqk", query * self._tower.head_dim**-0.5, key)
        bias = self.weights.score_bias
        return scores if bias is None else scores + bias.to(scores.dtype)

    @cached_property
    def out(self) -> Tensor:
        """What each head reads, before the output projection, ``[B, N, H, E]``."""
        return attend(self.qkv, self.weights, None, self._backend)[0]

    @cached_property
    def attention(self) -> Tensor:
        """What the attention writes, ``[B, N, W]``."""
        return project_out(self.out.flatten(2), self.weights, self._backend)

    def codes(self) -> Tensor:
        """:attr:`out` with the norms after it frozen, ``[B, N, H, C]``: times the values of a :class:`StreamBasis`."""
        out = self.out.to(accumulation_dtype(self.out.dtype))
        frozen = freeze(self.weights, self.out.flatten(2), self._backend)
        if frozen is None:
            return widened(out, None, self._tower.code_width)
        z = (out - frozen.shift[..., None, None]) * frozen.factor[..., None, None]
        if self._tower.code_width == z.shape[-1]:
            return z
        return torch.cat([z, frozen.bias[..., None, None].expand(*z.shape[:-1], 1)], -1)

    @property
    def middle(self) -> Tensor:
        """The residual stream between attention and MLP, ``[B, N, W]``."""
        return self.x + self.attention

    @cached_property
    def mlp_normed(self) -> Tensor:
        """What the MLP reads, ``[B, N, W]``."""
        return self.normed if self.weights.parallel else normalise(self.middle, None, self.weights.ln_2, self._backend)

    def before_activation(self, *, linear: bool = False) -> Tensor:
        """What the MLP's activation reads, ``[B, N, M]``; of a gated MLP what it is multiplied with for ``linear``."""
        weights, normed = self.weights, self.mlp_normed
        if weights.mlp_in_norm is not None:
            normed = normalise(normed.contiguous(), None, weights.mlp_in_norm, self._backend)
        if weights.mlp_gate_weight is None or linear:
            return F.linear(normed, weights.mlp_in_weight, weights.mlp_in_bias)
        return F.linear(normed, weights.mlp_gate_weight, weights.mlp_gate_bias)

    @cached_property
    def hidden(self) -> Tensor:
        """What the MLP's output projection reads, ``[B, N, M]``."""
        return mlp_in(self.mlp_normed, self.weights, self._tower.activation, self._backend)

    @cached_property
    def mlp(self) -> Tensor:
        """What the MLP writes, ``[B, N, W]``."""
        return mlp_out(self.hidden, self.weights, self._backend)


class AllTokens:
    """The residual stream of all tokens before and after every block, and what the blocks compute, on request.

    The stream is recorded once, in a forward of its own: ``(L + 1)·B·N·W`` numbers stay in memory. A block runs again
    when something else of it is asked for; the last one's results are kept until another's turn.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed, on the tower's device and in its dtype.
        backend: which kernels compute.
    """

    def __init__(self, tower: Tower, images: Tensor, backend: str) -> None:
        self._tower, self._images, self._backend = tower, images, backend
        self._last: Block | None = None

    @cached_property
    def stream(self) -> tuple[Tensor, ...]:
        """The residual stream before every block and after the last, ``L + 1`` times ``[B, N, W]``."""
        tower, backend, kept = self._tower, self._backend, []
        with buffers.reuse(tower.device):
            stream = Stream(tower, embed(tower, self._images, backend), tower.blocks, None, False, backend)
            for layer, block in enumerate(tower.blocks):
                normed = stream.norm(block.ln_1)
                kept.append(stream.x.clone())
                out, _ = attend(project_in(tower, normed, block, backend), block, None, backend)
                stream.add_attention(layer, out.flatten(2))
                stream.pass_mlp(layer, normed if block.parallel else stream.norm(block.ln_2))
            return (*kept, stream.whole().clone())

    def block(self, layer: int) -> Block:
        """What a block computes."""
        if self._last is None or self._last.layer != layer:
            self._last = Block(self._tower, layer, self.stream[layer], self._backend)
        return self._last

    def embedded(self, *, positions: bool) -> Tensor:
        """Class token, registers and embedded patches before the LayerNorm that follows, ``[B, N, W]``.

        Args:
            positions: with their positions added.
        """
        tower = replace(self._tower, ln_pre=None)
        tower = tower if positions else replace(tower, positional_embedding=None)
        return embed(tower, self._images, self._backend)

    def positions(self) -> Tensor:
        """What positions add, ``[B, N, W]``; zero for registers."""
        tower, position = self._tower, self._tower.positional_embedding
        if position is None:
            raise InputError("this tower adds no positions before its first block")
        patches = tower.grid[0] * tower.grid[1]
        before = len(position) - patches  # of class token and registers
        added = self._images.new_zeros(tower.tokens, tower.width)
        added[:before] = position[:before].to(added.dtype)
        added[tower.prefix_tokens :] = position[before:].to(added.dtype)
        return added.expand(len(self._images), -1, -1)


def standard_deviation(x: Tensor, norm: LayerNorm, backend: str) -> Tensor:
    """What a norm divides each row by, ``[..., W] → [..., 1]``."""
    return statistics(x.contiguous(), norm, backend)[1][..., None]


def normed(x: Tensor, norm: LayerNorm) -> Tensor:
    """A norm of rows, ``[..., W]``, in the dtype that sums are carried in."""
    acc_dtype = accumulation_dtype(x.dtype)
    x, weight = x.to(acc_dtype), norm.weight.to(acc_dtype)
    if norm.rms:
        return F.rms_norm(x, x.shape[-1:], weight, norm.eps)
    return F.layer_norm(x, x.shape[-1:], weight, norm.bias.to(acc_dtype), norm.eps)
