"""A CLIP vision transformer as plain tensors with named axes.

Whatever package a model comes from, a reader in this folder turns it into a :class:`Tower`; the forward pass sees
nothing else. Tensors are the module's own parameters, shared and never copied.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu"]
Pooling = Literal["cls", "mean", "normed_mean", "attention"]

_DTYPE, _VERSION = attrgetter("dtype"), attrgetter("_version")


def weights_version(tensors: Iterable[Tensor]) -> int:
    """A number that changes when any of the tensors is replaced, moved, or changed in place."""
    listed = tuple(tensors)
    # Tensors made under inference_mode count no versions.
    counted = [t for t in listed if not t.is_inference()] if any(map(Tensor.is_inference, listed)) else listed
    return hash((*map(Tensor.data_ptr, listed), *map(_DTYPE, listed), *map(_VERSION, counted)))


class _Axes:
    """Checks at construction that every tensor has the axes its class names."""

    axes: ClassVar[dict[str, tuple[str, ...]]]

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for name, axes in self.axes.items():
            value = getattr(self, name)
            if isinstance(value, tuple):  # tensors of equal shapes, in place of one that packs them
                axes = (axes[0].removeprefix("three_"), *axes[1:])
            for tensor in value if isinstance(value, tuple) else (value,):
                if tensor is not None:
                    _check_axes(name, tensor, axes, sizes)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in the order of the fields."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, _Axes):
                yield from value.tensors()
            elif isinstance(value, tuple):
                for item in value:
                    if isinstance(item, Tensor):
                        yield item
                    elif isinstance(item, _Axes):
                        yield from item.tensors()


def _check_axes(name: str, tensor: Tensor, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Raises ValueError unless a tensor has these axes; ``sizes`` are those of axes seen before, and are added to."""
    if tensor.ndim != len(axes):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected axes {axes}")
    for axis, size in zip(axes, tensor.shape, strict=True):
        if axis.isdigit() and int(axis) != size:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected axes {axes}")
        if not axis.isdigit() and sizes.setdefault(axis, size) != size:
            raise ValueError(f"{name}: axis {axis} is {size}, elsewhere {sizes[axis]}")


P = TypeVar("P", bound=_Axes)


def views_detached(part: P) -> P:
    """A tower, or a part of one, with its views of parameters cut off from autograd; their memory is shared.

    Autograd refuses to look at a view that was made without it once its parameter has changed in place; compiled code
    looks at it to tell whether the graph still holds.
    """

    def detached(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if value._base is None else value.detach()
        if isinstance(value, _Axes):
            return views_detached(value)
        return tuple(map(detached, value)) if isinstance(value, tuple) else value

    return replace(part, **{field.name: detached(getattr(part, field.name)) for field in fields(part)})  # type: ignore


@dataclass(frozen=True)
class LayerNorm(_Axes):
    """``(x − mean) / √(var + eps) · weight + bias`` over the last axis.

    With ``rms`` it is ``x / √(mean(x²) + eps) · weight``, and ``bias`` is zero. A norm without a bias has one of zeros.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    rms: bool = False

    axes: ClassVar = {"weight": ("width",), "bias": ("width",)}


class Linear(NamedTuple):
    """``x Wᵀ + b``."""

    weight: Tensor
    bias: Tensor | None


class Output(NamedTuple):
    """How heads' outputs become one term: ``λ·post_norm(W·inner_norm(heads) + b)``.

    Attributes:
        weight: ``[W, H·E]``.
        bias: ``[W]``.
        scale: λ, ``[W]``.
        inner_norm: over all heads' outputs.
        post_norm: over the sum.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    inner_norm: LayerNorm | None = None
    post_norm: LayerNorm | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor."""
        yield self.weight
        yield self.bias
        if self.scale is not None:
            yield self.scale
        for norm in (self.inner_norm, self.post_norm):
            if norm is not None:
                yield from norm.tensors()


@dataclass(frozen=True)
class Rotary(_Axes):
    """Rotary positions: ``x·cos + rotated(x)·sin`` for the queries and keys of all patches, not of prefix tokens.

    With ``halves`` the two numbers that are rotated together are half a head apart, ``(−x₂, x₁)`` for ``x = (x₁, x₂)``;
    else they are neighbours. ``heads`` is 1 where all heads share the angles.
    """

    cos: Tensor
    sin: Tensor
    halves: bool

    axes: ClassVar = {"cos": ("heads", "patches", "head_dim"), "sin": ("heads", "patches", "head_dim")}


@dataclass(frozen=True)
class Block(_Axes):
    """One residual block: ``x += λ₁·post_1(attention(ln_1(x)))``, then ``x += λ₂·post_2(mlp(ln_2(x)))``.

    ``three_inner`` packs query, key and value in that order, each ``heads × head_dim``; a module that keeps them apart
    gives three tensors. What a module does not have is None: a layer scale, a norm before a part (then the part reads
    the stream itself) or after it. Missing biases are zeros.

    Attributes:
        mlp_gate_weight: of a gated MLP, ``activation(gate(x)) · in(x)``; of others the activation is of ``in(x)``.
        query_norm: over each head's queries.
        key_norm: over each head's keys.
        score_bias: relative positions, added to the attention's logits.
        inner_norm: over all heads' outputs, before the output projection.
        mlp_in_norm: over what ``ln_2`` gives, before the MLP's first product.
        mlp_norm: over the hidden layer, before its output projection.
        parallel: attention and MLP both read ``ln_1(x)``, and both are added; ``ln_2`` is None.
    """

    ln_1: LayerNorm | None
    in_weight: Tensor | tuple[Tensor, Tensor, Tensor]
    in_bias: Tensor | tuple[Tensor | None, Tensor | None, Tensor | None] | None
    out_weight: Tensor
    out_bias: Tensor
    attention_scale: Tensor | None
    ln_2: LayerNorm | None
    mlp_in_weight: Tensor
    mlp_in_bias: Tensor
    mlp_out_weight: Tensor
    mlp_out_bias: Tensor
    mlp_scale: Tensor | None
    mlp_gate_weight: Tensor | None = None
    mlp_gate_bias: Tensor | None = None
    query_norm: LayerNorm | None = None
    key_norm: LayerNorm | None = None
    rotary: Rotary | None = None
    score_bias: Tensor | None = None
    inner_norm: LayerNorm | None = None
    attention_post_norm: LayerNorm | None = None
    mlp_in_norm: LayerNorm | None = None
    mlp_norm: LayerNorm | None = None
    mlp_post_norm: LayerNorm | None = None
    parallel: bool = False

    axes: ClassVar = {
        "in_weight": ("three_inner", "width"),
        "in_bias": ("three_inner",),
        "out_weight": ("width", "inner"),
        "out_bias": ("width",),
        "attention_scale": ("width",),
        "mlp_in_weight": ("hidden", "width"),
        "mlp_in_bias": ("hidden",),
        "mlp_out_weight": ("width", "hidden"),
        "mlp_out_bias": ("width",),
        "mlp_scale": ("width",),
        "mlp_gate_weight": ("hidden", "width"),
        "mlp_gate_bias": ("hidden",),
        "score_bias": ("heads", "tokens", "tokens"),
    }

    def packed(self) -> Linear | None:
        """Weight and bias that pack query, key and value; None where the module keeps them apart."""
        if isinstance(self.in_weight, Tensor) and not isinstance(self.in_bias, tuple):
            return Linear(self.in_weight, self.in_bias)
        return None

    def query_key_value(self) -> tuple[Linear, Linear, Linear]:
        """Weight ``[inner, width]`` and bias ``[inner]`` of each of the three, views of what packs them."""
        weights = self.in_weight.chunk(3) if isinstance(self.in_weight, Tensor) else self.in_weight
        biases = self.in_bias.chunk(3) if isinstance(self.in_bias, Tensor) else self.in_bias or (None, None, None)
        query, key, value = (Linear(*pair) for pair in zip(weights, biases, strict=True))
        return query, key, value

    def output(self) -> "Output":
        """How its heads' outputs enter the residual stream."""
        return Output(self.out_weight, self.out_bias, self.attention_scale, self.inner_norm, self.attention_post_norm)


@dataclass(frozen=True)
class PoolMlp(_Axes):
    """What is added to an attention pool's output: ``y = o + out(activation(in(norm(o))))``."""

    norm: LayerNorm
    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    activation: Activation

    axes: ClassVar = {
        "in_weight": ("hidden", "width"),
        "in_bias": ("hidden",),
        "out_weight": ("width", "hidden"),
        "out_bias": ("width",),
    }


@dataclass(frozen=True)
class AttentionPool(_Axes):
    """One query that reads all tokens after the final LayerNorm: ``o = W_O·attention(query, tokens) + b_O``.

    Attributes:
        query: the query, projected and with its bias; or its weight ``[inner, width]`` where it is made of the first
            token.
        query_bias: in the second case.
        key_norm: over each head's keys.
        mlp: after the output projection, with a residual connection.
        norm: after both; the embedding reads it.
        reads_prefix: whether it reads class token and registers, or the patches alone.
        weights: what each head reads of each token, the same for all images; there are no queries and keys then.
        queries: how many queries' outputs are averaged. Each has its part of the heads, and ``out_weight`` holds the
            average; the MLP reads each query's output.
        every_query: every token makes a query, not the first alone, and their attention is averaged.
    """

    query: Tensor
    key_weight: Tensor
    key_bias: Tensor | None
    value_weight: Tensor
    value_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor
    heads: int
    query_bias: Tensor | None = None
    key_norm: LayerNorm | None = None
    norm: LayerNorm | None = None
    mlp: PoolMlp | None = None
    reads_prefix: bool = True
    weights: Tensor | None = None
    queries: int = 1
    every_query: bool = False

    axes: ClassVar = {
        "key_weight": ("inner", "width"),
        "key_bias": ("inner",),
        "value_weight": ("inner", "width"),
        "value_bias": ("inner",),
        "out_weight": ("out", "inner"),
        "out_bias": ("out",),
        "query_bias": ("inner",),
        "weights": ("heads", "tokens"),
    }


@dataclass(frozen=True)
class Embedder(_Axes):
    """The module's own layers before the first block, where they are not one convolution: they run as they are.

    Attributes:
        run: ``[B, 3, height, width] → [B, N, W]``, the start of the residual stream with everything in it.
        weights: what it computes with.
        width: ``W``.
        prefix_tokens: tokens before the patches.
    """

    run: Callable[[Tensor], Tensor]
    weights: tuple[Tensor, ...]
    width: int
    prefix_tokens: int

    axes: ClassVar = {}


@dataclass(frozen=True)
class Tower(_Axes):
    """A vision transformer from pixels to the embedding.

    Tokens are the class token first, then registers, then patches row by row. ``positional_embedding`` is added to the
    patches with its last rows, and to the first of the other tokens with the rows before.

    ``pooling`` says which row of the last residual stream the embedding reads: ``"cls"``, the class token's;
    ``"mean"``, the mean of the patches'; ``"normed_mean"``, the mean of the patches' final LayerNorms;
    ``"attention"``, what ``pool`` reads of all tokens' final LayerNorms. Without a ``projection`` the embedding is that
    row after the final LayerNorm.

    A tower without blocks is a network of another kind, whose last feature map ``embedder`` gives: its pooling alone
    can be decomposed.

    Attributes:
        ln_post: the final LayerNorm; None for none.
        embedder: in place of everything before ``blocks``, which is then None.
        pool: of ``"attention"``.
        prefix_pooled: a mean is over class token and registers, too.
        projection_bias: of ``projection``.
        sources: the module's parameters where tensors here are computed from them and not shared.
    """

    patch_weight: Tensor | None
    patch_bias: Tensor | None
    class_embedding: Tensor | None
    registers: Tensor | None
    positional_embedding: Tensor | None
    ln_pre: LayerNorm | None
    blocks: tuple[Block, ...]
    ln_post: LayerNorm | None
    projection: Tensor | None
    heads: int
    activation: Activation
    pooling: Pooling
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    embedder: Embedder | None = None
    pool: AttentionPool | None = None
    prefix_pooled: bool = False
    projection_bias: Tensor | None = None
    sources: tuple[Tensor, ...] = ()

    axes: ClassVar = {
        "patch_weight": ("width", "3", "patch_height", "patch_width"),
        "patch_bias": ("width",),
        "class_embedding": ("width",),
        "registers": ("registers", "width"),
        "positional_embedding": ("positions", "width"),
        "projection": ("pooled", "embed_dim"),  # the width, or what an attention pool gives
        "projection_bias": ("embed_dim",),
    }

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor, in the order of the fields."""
        return iter(self._listed)

    @cached_property
    def _listed(self) -> tuple[Tensor, ...]:
        return tuple(super().tensors())

    @property
    def layers(self) -> int:
        """Transformer blocks, ``L``."""
        return len(self.blocks)

    @property
    def width(self) -> int:
        """Width of the residual stream, ``W``."""
        return len(self._first) if self.embedder is None else self.embedder.width

    @property
    def head_dim(self) -> int:
        """Width of one head, ``E``."""
        return self.blocks[0].out_weight.shape[1] // self.heads

    @property
    def tokens(self) -> int:
        """Tokens per image with the class token and registers, ``N``."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        if self.embedder is not None:
            return self.embedder.prefix_tokens
        return (self.class_embedding is not None) + (0 if self.registers is None else len(self.registers))

    @property
    def has_class_token(self) -> bool:
        """Whether the first token stands for the whole image: a class token, or the mean that a pool's query reads."""
        if self.embedder is not None:
            return self.embedder.prefix_tokens > 0
        return self.class_embedding is not None

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def embed_dim(self) -> int:
        """Width of the embedding, ``D``."""
        if self.projection is not None:
            return self.projection.shape[1]
        return self.width if self.pool is None else len(self.pool.out_weight)

    @property
    def pooled_from(self) -> int:
        """The first token that a mean is over."""
        return 0 if self.prefix_pooled else self.prefix_tokens

    @property
    def code_width(self) -> int:
        """Numbers per head in a code: ``E``, and one more where a norm after the attention scales its bias."""
        return self.head_dim + any(block.attention_post_norm is not None for block in self.blocks)

    @property
    def terms(self) -> int:
        """Terms of the residual stream, ``K = 2L + 1``: the start, L attentions, L MLPs."""
        return 2 * self.layers + 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights that multiply."""
        return self._first.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._first.device

    @property
    def _first(self) -> Tensor:
        """The first of the weights that multiply: what makes patches of pixels."""
        if self.embedder is not None:
            return self.embedder.weights[0]
        assert self.patch_weight is not None
        return self.patch_weight

    def special(self) -> list[str]:
        """What it has beyond a vision transformer of CLIP, in words: for methods that take no other."""
        blocks = self.blocks
        checks = {
            "no transformer blocks": not blocks,
            "layers before the blocks that are no convolution": self.embedder is not None,
            "no class token": self.prefix_tokens == 0,
            "pooling after the final norm": self.pooling in ("normed_mean", "attention"),
            "a mean over more or fewer than all patches": self.pooling == "mean" and self.pooled_from != 1,
            "no final norm": self.ln_post is None,
            "RMS norms": any(norm is not None and norm.rms for b in blocks for norm in (b.ln_1, b.ln_2, self.ln_post)),
            "a bias of the projection": self.projection_bias is not None,
            "relative positions": any(b.score_bias is not None for b in blocks),
            "rotary positions": any(b.rotary is not None for b in blocks),
            "norms of queries or keys": any(b.query_norm is not None or b.key_norm is not None for b in blocks),
            "gated MLPs": any(b.mlp_gate_weight is not None for b in blocks) or self.activation == "silu",
            "norms inside or after a block's parts": any(
                norm is not None
                for b in blocks
                for norm in (b.inner_norm, b.attention_post_norm, b.mlp_in_norm, b.mlp_norm, b.mlp_post_norm)
            ),
            "parts that no norm comes before": any(b.ln_1 is None or b.ln_2 is None for b in blocks),
        }
        return [words for words, holds in checks.items() if holds]

    def version(self) -> int:
        """A number that changes when any weight is replaced, moved, or changed in place."""
        return weights_version(self.tensors())
