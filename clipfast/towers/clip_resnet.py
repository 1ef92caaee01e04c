"""CLIP's ResNets, of open_clip and of OpenAI: a convolutional trunk, and an attention pool that is decomposed.

The trunk runs as it is, with whatever hooks and layers it has. Its last feature map is what the pool reads: a token for
every position, the mean of them before them, and a positional embedding added to all. The query is made of the mean.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipfast.towers.clip_layers import LINEARS, Places, expect
from clipfast.towers.folding import folded, weight_is_read
from clipfast.towers.patches import normalises_over_batches
from clipfast.towers.tower import AttentionPool, Embedder, Tower

REFUSALS = {"batch_norm": "batch normalisation in training mode: call .eval() first"}
"""Why a ResNet alone is refused, by a short key."""

STRIDE = 32
"""Pixels between two positions of the last feature map."""

_STAGES = ("layer1", "layer2", "layer3", "layer4")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "c_proj")


def read(visual: Any, image_size: int) -> Tower:
    """A ``ModifiedResNet`` that :func:`replaced` has nothing against, sharing its parameters.

    Args:
        visual: the module.
        image_size: side of its images in pixels.
    """
    pool, sources = folded(visual.attnpool)
    return Tower(
        patch_weight=None,
        patch_bias=None,
        class_embedding=None,
        registers=None,
        positional_embedding=None,
        ln_pre=None,
        blocks=(),
        ln_post=None,
        projection=None,
        heads=pool.num_heads,
        activation="gelu",  # there are no blocks with one
        pooling="attention",
        image_size=(image_size, image_size),
        patch_size=(STRIDE, STRIDE),
        embedder=Embedder(
            run=partial(_embed, visual),
            weights=tuple(_weights(visual)),
            width=pool.positional_embedding.shape[1],
            prefix_tokens=1,
        ),
        pool=AttentionPool(
            query=pool.q_proj.weight,
            query_bias=pool.q_proj.bias,
            key_weight=pool.k_proj.weight,
            key_bias=pool.k_proj.bias,
            value_weight=pool.v_proj.weight,
            value_bias=pool.v_proj.bias,
            out_weight=pool.c_proj.weight,
            out_bias=pool.c_proj.bias,
            heads=pool.num_heads,
        ),
        sources=(pool.positional_embedding, *sources),  # in half precision the package keeps it in float32
    )


def _embed(visual: Any, images: Tensor) -> Tensor:
    """``[B, 3, height, width] → [B, N, W]``: what the attention pool reads."""
    return tokens(visual.attnpool, _trunk(visual, images))


def _trunk(visual: Any, images: Tensor) -> Tensor:
    """The last feature map, ``[B, 3, height, width] → [B, W, rows, columns]``."""
    x = images.type(visual.conv1.weight.dtype)
    for number in (1, 2, 3):
        convolution, batch_norm = getattr(visual, f"conv{number}"), getattr(visual, f"bn{number}")
        x = _activation(visual, number)(batch_norm(convolution(x)))
    x = visual.avgpool(x)
    for stage in _STAGES:
        x = getattr(visual, stage)(x)
    return x


def _activation(visual: Any, number: int) -> Callable[[Tensor], Tensor]:
    """One of the stem's activations: ``act1`` in open_clip, ``relu1`` or once ``relu`` in OpenAI's package."""
    return next(getattr(visual, name) for name in (f"act{number}", f"relu{number}", "relu") if hasattr(visual, name))


def tokens(pool: Any, features: Tensor) -> Tensor:
    """What an ``AttentionPool2d`` makes of a feature map ``[B, W, rows, columns]`` before its attention, ``[B, N, W]``.

    The first token is the mean of all positions; all have their positional embedding.
    """
    x = features.flatten(2).transpose(1, 2)
    return torch.cat([x.mean(1, keepdim=True), x], 1) + pool.positional_embedding.to(x.dtype)


def _weights(visual: nn.Module) -> Iterator[Tensor]:
    """Everything the feature map is computed with; the first is the first convolution's weight."""
    for name, child in visual.named_children():
        if name != "attnpool":
            yield from child.parameters()
            yield from (buffer for buffer in child.buffers() if buffer.is_floating_point())


def trunk(visual: nn.Module) -> list[nn.Module]:
    """The modules that run as they are."""
    return [child for name, child in visual.named_children() if name != "attnpool"]


def replaced(visual: nn.Module, pools: tuple[type, ...]) -> Places:
    """Layers of the attention pool that are not those of its package's class, and what the trunk must not do.

    Args:
        visual: a ``ModifiedResNet``.
        pools: the package's ``AttentionPool2d``.
    """
    pool: Any = visual.attnpool
    batch_norm = [("batch_norm", "")] if normalises_over_batches(visual) else []
    wrong = expect(pool, pools, "attnpool")
    if wrong:
        return batch_norm + wrong
    for name in _PROJECTIONS:
        layer = getattr(pool, name)
        if not weight_is_read(layer):
            wrong.append(("not_run", f"attnpool.{name}: {type(layer).__name__}"))
            continue
        wrong += expect(layer, LINEARS, f"attnpool.{name}")
        if not wrong and layer.bias is None:
            wrong.append(("replaced", f"attnpool.{name}: no bias"))
    return batch_norm + wrong


@torch.no_grad()
def own_forward(visual: Any, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The module's own image embeddings ``[B, D]``, and the tokens that its attention pool read, ``[B, N, W]``."""
    read_by_pool: list[Tensor | None] = [None]

    def record(pool: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read_by_pool[0] = tokens(pool, inputs[0])

    handle = visual.attnpool.register_forward_pre_hook(record)
    try:
        with torch.autocast(images.device.type, enabled=False):
            embedding = visual._call_impl(images)  # a forward that was compiled in place would not run the hook
    finally:
        handle.remove()
    return embedding, read_by_pool
