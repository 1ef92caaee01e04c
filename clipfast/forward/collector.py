"""Gathers the terms of the pooled row while a forward runs.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``C`` numbers of a code (``E``, see
:attr:`.Tower.code_width`), ``L`` layers kept, ``T`` texts, ``D`` embed_dim.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.basis import TowerBasis
from clipfast.contributions import Contributions
from clipfast.forward.blocks import Frozen, attention_rows
from clipfast.forward.pooling import Pooled, weighted
from clipfast.forward.request import Request
from clipfast.kernels import ops
from clipfast.kernels.reference import accumulation_dtype
from clipfast.towers.tower import Block, Tower


class Frame(NamedTuple):
    """How a head's values enter its code: ``code = Σⱼ alpha[j]·[scale·v[j] − shift, bias]``, each ``[B]``.

    ``bias`` is what the output's bias is multiplied by where a norm comes after it, see :attr:`.Tower.code_width`.
    """

    scale: Tensor
    shift: Tensor
    bias: Tensor

    def values(self, value: Tensor, width: int) -> Tensor:
        """Values ``[B, ..., H, E]`` as their parts of a code, ``[B, ..., H, C]``."""
        shape = (-1, *[1] * (value.ndim - 1))
        framed = value.to(self.scale.dtype) * self.scale.view(shape) - self.shift.view(shape)
        return widened(framed, self.bias, width).to(value.dtype)


def widened(z: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """A code or values ``[B, ..., E]`` with one number more where codes have one, ``[B, ..., C]``."""
    if z.shape[-1] == width:
        return z
    extra = z.new_zeros(len(z)) if bias is None else bias.to(z.dtype)
    return torch.cat([z, extra.view(-1, *[1] * (z.ndim - 1)).expand(*z.shape[:-1], 1)], -1)


class Collector:
    """Gathers the terms of the pooled row while the forward runs.

    Args:
        tower: the model.
        request: what to keep.
        x: the start of the residual stream, ``[B, N, W]``.
        heads: heads per layer.
        width: numbers of a code, ``C``.
        residual: how many other terms there are, each ``[B, W]``.
    """

    def __init__(self, tower: Tower, request: Request, x: Tensor, heads: int, width: int, residual: int) -> None:
        self.tower = tower
        self.request = request
        images, tokens, _ = x.shape
        acc_dtype = accumulation_dtype(x.dtype)
        layers = len(request.layers)
        self.heads, self.width = heads, width
        self.codes = x.new_empty((images, layers, heads, width), dtype=acc_dtype)
        self.residual = x.new_empty((images, residual, x.shape[2]), dtype=acc_dtype)
        self.rest = x.new_zeros((images, x.shape[2]), dtype=acc_dtype)
        self.values: Tensor | None = None
        if request.tokens:  # one piece for all layers: maps over layers read it in one go
            self.values = x.new_empty((layers, images, tokens, heads, width))
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
        """Whether a layer's attention row is asked for, by itself or by what is made of it."""
        parts = (self.attention, self.maps, self.class_codes)
        return layer in self.request.layers and any(part is not None for part in parts)

    def needs_values(self, layer: int) -> bool:
        """Whether the values of all tokens are."""
        return layer in self.request.layers and (self.request.tokens or self.maps is not None)

    def needs_class_value(self, layer: int) -> bool:
        """Whether the values of the class token are."""
        return layer in self.request.layers and self.class_codes is not None

    def leave_out(self, block: Block, z: Tensor) -> None:
        """Adds a layer that is not kept to the rest, from its heads' outputs for the pooled row, ``[B, H, E]``."""
        acc_dtype = self.rest.dtype
        out = F.linear(z.to(acc_dtype).flatten(1), block.out_weight.to(acc_dtype), block.out_bias.to(acc_dtype))
        self.rest += out if block.attention_scale is None else out * block.attention_scale

    def add_attention(
        self, layer: int, z: Tensor, alpha: Tensor | None, value: Tensor | None, class_value: Tensor | None
    ) -> None:
        """Records the pooled row of one layer's attention.

        Args:
            layer: which, of those that are kept.
            z: ``[B, H, C]``.
            alpha: ``[B, H, N]``, where it is needed.
            value: ``[B, N, H, C]``, where it is needed.
            class_value: ``[B, H, C]``, the class token's row of the values, where it is needed.
        """
        position = self.request.layers.index(layer)
        self.codes[:, position] = z
        if alpha is None:
            assert not self.needs_attention_row(layer)
            return
        if self.attention is not None:
            self.attention[:, position] = alpha
        if self.class_codes is not None:
            assert class_value is not None
            acc_dtype = self.class_codes.dtype
            self.class_codes[:, position] = alpha[..., :1].to(acc_dtype) * class_value.to(acc_dtype)
        if value is None:
            assert self.values is None
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

    def finish(
        self, pooled: Pooled, basis: TowerBasis, residual: Tensor | None = None, rest: Tensor | None = None
    ) -> Contributions:
        """Scales everything by the image's μ, σ and n, once.

        Args:
            pooled: the embedding.
            basis: of the tower.
            residual: the other terms read out, ``[B, 1 + MLPs, D]``, before the division by σ n; default those here.
            rest: the same of what is in no term, ``[B, D]``.
        """
        request, mean, std = self.request, pooled.mean, pooled.std
        norm = pooled.embedding.to(std.dtype).norm(dim=-1)
        scale = 1 / (std * norm)  # [B]
        self.codes *= scale[:, None, None, None]
        if self.class_codes is not None:
            self.class_codes *= scale[:, None, None, None]
        if residual is None:
            residual = basis.readout.term(self.residual, mean, std)
        if rest is None:
            rest = basis.readout.term(self.rest, mean, std, basis.layers - len(request.layers))
        residual = residual * scale[:, None, None]
        if self.maps is not None and request.text_basis is not None:
            tokens = self.maps.shape[-2]
            constants = request.text_basis.constants(mean, std, request.layers) / tokens  # [B, L, T]
            if request.maps == "summed":
                self.maps += self.heads * constants.sum(1)[:, None]
                self.maps *= scale[:, None, None]
            else:
                self.maps += constants[:, :, None, None]
                self.maps *= scale[:, None, None, None, None]
        return Contributions(
            embedding=pooled.embedding,
            norm=norm,
            mean=mean,
            std=std,
            codes=self.codes,
            start=residual[:, 0],
            mlps=residual[:, 1:],
            rest=rest * scale[:, None],
            layers=request.layers,
            grid=self.tower.grid,
            prefix_tokens=self.tower.prefix_tokens,
            basis=basis,
            _attention=self.attention,
            _maps=self.maps,
            _class_codes=self.class_codes,
            _values=None if self.values is None else tuple(self.values),
        )


def weighted_row(weights: Tensor, frozen: Frozen | None, qkv: Tensor, block: Block, backend: str) -> Tensor:
    """The attention row of tokens that count with weights, ``[B, 1, N] → [B, H, N]``; each row sums to 1."""
    factor = weights if frozen is None else weights * frozen.factor[:, None]
    return attention_rows(qkv, block, factor, backend)[:, 0] / factor.sum(-1)[..., None]


def framed(out: Tensor, frozen: Frozen, weights: Tensor | None, width: int) -> tuple[Tensor, Frame]:
    """The code of one row of attention whose norms are frozen, ``[B, N, H, E] → [B, H, C]``, and how values enter it.

    ``weights`` are what the rows count, ``[B, 1, N]``; None for one row alone.
    """
    if weights is None:
        weights = torch.ones_like(frozen.factor)[:, None]
    factor = weights * frozen.factor[:, None]  # [B, 1, N]
    shift = (factor @ frozen.shift[..., None])[:, 0, 0]
    frame = Frame(factor.sum(-1)[:, 0], shift, (weights @ frozen.bias[..., None])[:, 0, 0])
    z = weighted(factor, out)[:, 0] - shift[:, None, None]
    return widened(z, frame.bias, width), frame
