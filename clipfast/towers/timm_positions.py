"""Positions of patches relative to each other in timm's attentions: rotary ones, and biases of the logits."""

from typing import Any, cast

import torch
from timm import layers as timm_layers
from timm.layers import RelPosBias, RelPosMlp
from timm.models.beit import RelativePositionBias
from torch import Tensor, nn

from clipfast.towers.patches import plain_type
from clipfast.towers.timm_parts import Parts, classes
from clipfast.towers.tower import Rotary

ROTARY = classes(timm_layers, *(f"RotaryEmbedding{kind}" for kind in ("Cat", "Mixed", "DinoV3", "MRope")))


def rotary(parts: Parts, vit: Any) -> list[Rotary | None]:
    """The rotary positions of every block."""
    rope, depth = getattr(vit, "rope", None), len(vit.blocks)
    if rope is None or not parts.expect(rope, ROTARY, "rope") or parts.like.is_meta:
        return [None] * depth
    if any(getattr(block.attn, "num_prefix_tokens", -1) != vit.num_prefix_tokens for block in vit.blocks):
        parts.note("replaced", "rope: blocks with another number of class tokens and registers")
    needs_grid = vit.dynamic_img_size or not hasattr(rope, "feat_shape")
    table = rope.get_embed(shape=list(vit.patch_embed.grid_size)) if needs_grid else rope.get_embed()
    table = table.to(torch.promote_types(table.dtype, parts.like.dtype))
    tables = table if vit.rope_mixed else table.expand(depth, 1, *table.shape)
    halves = [bool(getattr(block.attn, "rotate_half", False)) for block in vit.blocks]
    listed = []
    shared: dict[bool, Rotary] = {}
    for layer, half in zip(tables, halves, strict=True):
        sin, cos = layer.tensor_split(2, -1)
        each = Rotary(cos, sin, half)
        listed.append(each if vit.rope_mixed else shared.setdefault(half, each))
    return list(listed)


def shifts(trunk: Any) -> bool:
    """Whether rotary positions are shifted at random, as in training."""
    rope: Any = getattr(trunk, "rope", None)
    return plain_type(rope) in ROTARY and rope.training and getattr(rope, "aug_active", False)


def shared_bias(parts: Parts, vit: Any) -> Tensor | None:
    """The bias of the logits that all blocks share, ``[heads, N, N]``."""
    shared = getattr(vit, "shared_rel_pos", None)
    if shared is not None:
        return _bias(parts, shared, "shared_rel_pos")
    shared = getattr(vit, "rel_pos_bias", None)
    if shared is None or not parts.expect(shared, (RelativePositionBias,), "rel_pos_bias"):
        return None
    return cast(Tensor, shared())


def score_bias(parts: Parts, attn: Any, place: str, shared: Tensor | None) -> Tensor | None:
    """The bias of one attention's logits, ``[heads, N, N]``: its own, what all blocks share, or the sum."""
    own = getattr(attn, "rel_pos", None)
    if own is not None:  # what is shared is then left out
        return _bias(parts, own, f"{place}.rel_pos")
    if getattr(attn, "relative_position_bias_table", None) is None:
        return shared
    bias: Tensor = attn._get_rel_pos_bias()[0]
    return bias if shared is None else bias + shared


def _bias(parts: Parts, positions: nn.Module, place: str) -> Tensor | None:
    if not parts.expect(positions, (RelPosBias, RelPosMlp), place):
        return None
    if "training" in parts.found:  # its dropout would draw random numbers
        return None
    return cast(Tensor, cast(Any, positions).get_bias()[0])
