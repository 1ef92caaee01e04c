"""A CLIP vision transformer as plain tensors with named axes.

Whatever package a model comes from, a reader in this folder turns it into a :class:`Tower`; the forward pass sees
nothing else. Tensors are the module's own parameters, shared and never copied.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
Pooling = Literal["cls", "mean"]

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


@dataclass(frozen=True)
class LayerNorm(_Axes):
    """``(x − mean) / √(var + eps) · weight + bias`` over the last axis."""

    weight: Tensor
    bias: Tensor
    eps: float

    axes: ClassVar = {"weight": ("width",), "bias": ("width",)}


class Linear(NamedTuple):
    """``x Wᵀ + b``."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Block(_Axes):
    """One pre-norm residual block: ``x += λ₁·attention(ln_1(x))``, then ``x += λ₂·mlp(ln_2(x))``.

    ``three_inner`` packs query, key and value in that order, each ``heads × head_dim``; a module that keeps them apart
    gives three tensors. A missing layer scale is None.
    """

    ln_1: LayerNorm
    in_weight: Tensor | tuple[Tensor, Tensor, Tensor]
    in_bias: Tensor | tuple[Tensor | None, Tensor | None, Tensor | None] | None
    out_weight: Tensor
    out_bias: Tensor
    attention_scale: Tensor | None
    ln_2: LayerNorm
    mlp_in_weight: Tensor
    mlp_in_bias: Tensor
    mlp_out_weight: Tensor
    mlp_out_bias: Tensor
    mlp_scale: Tensor | None

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

    def scaled_out_bias(self) -> Tensor:
        """What the attention's bias adds to the residual stream, ``λ₁·b_O [width]``."""
        return self.out_bias if self.attention_scale is None else self.out_bias * self.attention_scale


@dataclass(frozen=True)
class Tower(_Axes):
    """A vision transformer from pixels to the joint embedding.

    Tokens are the class token first, then registers, then patches row by row. Positions are added to the class token
    and the patches. ``pooling`` says which row of the last residual stream
    is read: the class token's, or the mean of the patches'. Without a ``projection`` the embedding is the final
    LayerNorm of that row.
    """

    patch_weight: Tensor
    patch_bias: Tensor | None
    class_embedding: Tensor
    registers: Tensor | None
    positional_embedding: Tensor
    ln_pre: LayerNorm | None
    blocks: tuple[Block, ...]
    ln_post: LayerNorm
    projection: Tensor | None
    heads: int
    activation: Activation
    pooling: Pooling
    image_size: tuple[int, int]
    patch_size: tuple[int, int]

    axes: ClassVar = {
        "patch_weight": ("width", "3", "patch_height", "patch_width"),
        "patch_bias": ("width",),
        "class_embedding": ("width",),
        "registers": ("registers", "width"),
        "positional_embedding": ("positions", "width"),
        "projection": ("width", "embed_dim"),
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
        return self.class_embedding.shape[0]

    @property
    def head_dim(self) -> int:
        """Width of one head, ``E``."""
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Tokens per image with the class token and registers, ``N``."""
        return self.prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return 1 if self.registers is None else 1 + len(self.registers)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def embed_dim(self) -> int:
        """Width of the embedding, ``D``."""
        return self.width if self.projection is None else self.projection.shape[1]

    @property
    def terms(self) -> int:
        """Terms of the residual stream, ``K = 2L + 1``: the start, L attentions, L MLPs."""
        return 2 * self.layers + 1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights that multiply."""
        return self.patch_weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.patch_weight.device

    def version(self) -> int:
        """A number that changes when any weight is replaced, moved, or changed in place."""
        return weights_version(self.tensors())
