"""The terms of an embedding from a module's own outputs: forward hooks, and every later norm frozen.

Nothing here is clipfast's. A module runs once; hooks record what each block wrote into the residual stream and what
each head gave to its output projection. With every later norm frozen at the values of that run, and an attention pool
at its weights, the way from the stream to the embedding is affine: ``f(x) = L(x) + f(0)``. A term is ``L(what it
wrote)`` and its even share of ``f(0)``. Every frozen norm takes each term's own mean away, as centring ``"termwise"``
does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Tokens = Callable[[Tensor], Tensor]
"""Residual stream ``[..., N, W]`` → ``[..., D]`` or ``[..., N, W]``."""


@dataclass
class Layer:
    """The modules of one block that write into the residual stream.

    Attributes:
        block: the block.
        out: the heads' output projection; its input is recorded.
        mlp: what gives the MLP's output, before ``mlp_scale`` and ``mlp_norm``.
        attention_scale: λ after the output projection.
        mlp_scale: λ after the MLP.
        inner_norm: the norm that gives the input of ``out``.
        attention_norm: the norm after ``out``.
        mlp_norm: the norm after the MLP.
    """

    block: nn.Module
    out: nn.Linear
    mlp: nn.Module
    attention_scale: Tensor | float = 1.0
    mlp_scale: Tensor | float = 1.0
    inner_norm: nn.Module | None = None
    attention_norm: nn.Module | None = None
    mlp_norm: nn.Module | None = None


@dataclass
class Hooked:
    """What a family of models is, for this brute force.

    Attributes:
        module: the model, in float64.
        layers: its blocks.
        heads: heads per block.
        read: given the last residual stream, the frozen affine map to the embedding, and what else is added to it.
        embed: the module's own embedding of images.
    """

    module: nn.Module
    layers: Sequence[Layer]
    heads: int
    read: Callable[[Tensor], tuple[Tokens, Tensor | None]]
    embed: Callable[[Tensor], Tensor]


@dataclass
class Terms:
    """Every term, divided by the embedding's norm.

    Attributes:
        embedding: ``[B, D]``, the module's own.
        start: ``[B, D]``.
        heads: ``[B, L, H, D]``.
        mlps: ``[B, L, D]``.
        other: ``[B, D]``, what is added after the pooling; None for nothing.
    """

    embedding: Tensor
    start: Tensor
    heads: Tensor
    mlps: Tensor
    other: Tensor | None


def frozen_norm(norm: Any, x: Tensor) -> Tokens:
    """A norm with its statistics as they are for ``x``; the identity for none."""
    if norm is None or isinstance(norm, nn.Identity):
        return lambda y: y
    eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
    bias = getattr(norm, "bias", None)
    if "RMS" in type(norm).__name__.upper():
        scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
        return lambda y: y * scale * norm.weight
    scale = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    return lambda y: (y - y.mean(-1, keepdim=True)) * scale * norm.weight + (0 if bias is None else bias)


@torch.no_grad()
def terms(model: Hooked, images: Tensor) -> Terms:
    """Every term of the embeddings of images ``[B, 3, height, width]``."""
    recorded: dict[tuple[int, str], Tensor] = {}

    def keep(index: int, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Any, output: Any = None) -> None:
            value = inputs[0] if output is None else output
            recorded[index, name] = (value[0] if isinstance(value, tuple) else value).clone()

        return hook

    handles = []
    for index, layer in enumerate(model.layers):
        handles += [
            layer.block.register_forward_pre_hook(keep(index, "before")),
            layer.block.register_forward_hook(keep(index, "after")),
            layer.out.register_forward_pre_hook(keep(index, "heads")),
            layer.out.register_forward_hook(keep(index, "out")),
            layer.mlp.register_forward_hook(keep(index, "mlp")),
        ]
    try:
        embedding = model.embed(images)
    finally:
        for handle in handles:
            handle.remove()
    last = recorded[len(model.layers) - 1, "after"]
    read, other = model.read(last)
    zero = read(torch.zeros_like(last))
    count = 2 * len(model.layers) + 1
    assert torch.allclose(read(last) + (0 if other is None else other), embedding, rtol=1e-9, atol=1e-10)

    heads, mlps, stream = [], [], recorded[0, "before"]
    for index, layer in enumerate(model.layers):
        attention, mlp = (frozen_norm(norm, recorded[index, name]) for norm, name in _after(layer))
        parts, constant = _heads(layer, recorded[index, "heads"], model.heads)
        shift = attention(torch.zeros_like(constant))
        wrote = [(attention(part) - shift) * layer.attention_scale for part in parts.unbind(2)]
        shared = attention(constant) * layer.attention_scale
        stream = stream + sum(wrote) + shared
        share = (read(shared.expand_as(last)) - zero) / model.heads
        heads.append(torch.stack([read(part) - zero + share + zero / (count * model.heads) for part in wrote], 1))
        added = mlp(recorded[index, "mlp"]) * layer.mlp_scale
        stream = stream + added
        assert torch.allclose(stream, recorded[index, "after"], rtol=1e-9, atol=1e-10), f"block {index}"
        mlps.append(read(added) - zero + zero / count)
    norm = embedding.norm(dim=-1)
    return Terms(
        embedding=embedding,
        start=(read(recorded[0, "before"]) - zero + zero / count) / norm[:, None],
        heads=torch.stack(heads, 1) / norm[:, None, None, None],
        mlps=torch.stack(mlps, 1) / norm[:, None, None],
        other=None if other is None else other / norm[:, None],
    )


def _after(layer: Layer) -> tuple[tuple[nn.Module | None, str], tuple[nn.Module | None, str]]:
    return (layer.attention_norm, "out"), (layer.mlp_norm, "mlp")


def _heads(layer: Layer, given: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """What each head writes through the output projection, ``[B, N, H, W]``, and what is none's, ``[..., W]``."""
    constant = torch.zeros_like(layer.out.weight[:, 0]) if layer.out.bias is None else layer.out.bias
    if layer.inner_norm is not None and getattr(layer.inner_norm, "bias", None) is not None:
        given = given - layer.inner_norm.bias
        constant = constant + layer.out.weight @ layer.inner_norm.bias
    by_head = given.unflatten(-1, (heads, -1))
    weight = layer.out.weight.unflatten(1, (heads, -1))  # [W, H, E]
    return torch.einsum("bnhe,whe->bnhw", by_head, weight), constant.expand(*given.shape[:2], -1)
