"""timm's vision models as plain tensors: alone, or as the image tower of open_clip's ``TimmModel``.

Vision transformers (``VisionTransformer``, ``Eva``, ``Beit``, with rotary or relative positions) are read block by
block. Of networks of other kinds (ConvNeXt, Swin, FastViT) the pooling is read; their own layers run up to it. The
embedding is what the module's own forward gives, with its classifier as the projection. What cannot be decomposed
exactly is refused with every reason at once.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from clipfast.errors import UnsupportedTower
from clipfast.towers.folding import folded
from clipfast.towers.patches import CHANGED, drops_now, patches, plain_type, sentence
from clipfast.towers.sizes import Size, check_patches, of_copy
from clipfast.towers.timm_blocks import block as read_block
from clipfast.towers.timm_blocks import is_differential
from clipfast.towers.timm_networks import (
    NETWORKS,
    NO_PATCHES,
    SWINS,
    as_tokens,
    held_tensors,
    is_one_convolution,
    network,
    run_start,
    run_transformer,
    sizes,
)
from clipfast.towers.timm_parts import Parts
from clipfast.towers.timm_pools import distilled, pooling, projection
from clipfast.towers.timm_positions import rotary, shared_bias, shifts
from clipfast.towers.timm_sizes import sized
from clipfast.towers.tower import Block, Embedder, Tower
from clipfast.towers.wrappers import unwrap

TRANSFORMERS = (VisionTransformer, VisionTransformerDistilled, Eva, VisionTransformerRelPos, Beit)
"""Classes that are read block by block."""
READ = tuple(kind.__name__ for kind in (*TRANSFORMERS, *NETWORKS))
"""Classes that are read."""

REFUSALS: dict[str, str] = {
    "timm_class": f"not one of timm's classes that are read: {', '.join(READ)}",
    "no_pool": "no pooling (global_pool=''): there is no single image embedding",
    "max_pool": "a maximum over tokens, which is no sum of what they hold",
    "mlp_head": "a nonlinear projection after the pooling: wrap the trunk before it (of open_clip: model.visual.trunk)",
    "head_pool": "a pooling of open_clip's own after a timm trunk: wrap the trunk before it (model.visual.trunk)",
    "differential": "differential attention below a class token: a norm over the difference of two attentions per head",
    "gate": "a gate on the heads' outputs, another for every channel of every token",
    "branches": "parallel branches with different heads, or with norms inside them",
    "pool_positions": "an attention pool that adds positions of its own",
    "timm_activation": "an activation other than GELU, its approximations and SiLU",
    "channels": "images of other than three channels",
    "grid": "an image size that is no multiple of the patches'",
    "batch_norm": "batch normalisation in training mode: call .eval() first",
} | CHANGED
"""Why a tower is refused, by a short key."""

_RUN = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
Fields = dict[str, Any]
"""Arguments of :class:`Tower`."""


Examined = tuple[Tower | None, list[tuple[str, str]]]
"""A tower, or None and the reasons against it."""


def read(module: nn.Module, *, ignore_hooks: bool = False, image_size: Size | None = None) -> Tower:
    """Reads a model of timm into a :class:`Tower` that shares its parameters.

    Args:
        module: the model.
        ignore_hooks: accept forward hooks.
        image_size: height and width of the images; positions are resampled as timm does it. None for the model's.

    Raises:
        UnsupportedTower: with every reason.
        InputError: an image size that the model cannot be given.
    """

    def examined(model: nn.Module, size: Size | None) -> Examined:
        return examine(model, model, image_size=size, ignore_hooks=ignore_hooks)

    return read_at(unwrap(module), image_size, examined, sized)


def read_at(
    root: nn.Module,
    image_size: Size | None,
    examined: Callable[[nn.Module, Size | None], Examined],
    resized: Callable[[nn.Module, Size], nn.Module],
) -> Tower:
    """The tower of a model for images of a size.

    Args:
        root: the model.
        image_size: height and width; None for its own.
        examined: :func:`examine` of a model, for images of a size where it has none of its own.
        resized: gives a copy of the model for images of a size.

    Raises:
        UnsupportedTower: with every reason.
        InputError: an image size that the model cannot be given.
    """
    tower, reasons = examined(root, None)
    another = tower is None and {key for key, _ in reasons} == {"grid"}
    if image_size is not None and (another or (tower is not None and image_size != tower.image_size)):
        if tower is not None:
            check_patches(image_size, tower.patch_size)
        copy = resized(root, image_size)
        tower, reasons = examined(copy, image_size)
        tower = None if tower is None else of_copy(tower, root, copy)
    if tower is None:
        raise UnsupportedTower(type(root).__name__, [text for _, text in reasons])
    return tower


def refusals(module: nn.Module, *, ignore_hooks: bool = False) -> list[tuple[str, str]]:
    """Every reason why a model cannot be decomposed, as (key of :data:`REFUSALS`, sentence)."""
    inner = unwrap(module)
    return examine(inner, inner, ignore_hooks=ignore_hooks)[1]


@torch.no_grad()
def examine(
    root: nn.Module,
    trunk: nn.Module,
    head: Iterable[nn.Module] = (),
    image_size: tuple[int, int] | None = None,
    *,
    ignore_hooks: bool = False,
) -> Examined:
    """A model as a tower, or None and every reason why it cannot be one.

    Args:
        root: the model with everything in it.
        trunk: the model of timm.
        head: layers that run after it.
        image_size: height and width, where the trunk has none of its own.
        ignore_hooks: accept forward hooks.
    """
    trunk = unwrap(trunk)
    layers, computed = [folded(layer) for layer in head], folded(trunk)
    parts = Parts(next(iter(trunk.parameters()), torch.zeros(0)))
    if drops_now(root) or shifts(trunk):
        parts.note("training")
    if any(part.training for part in root.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)):
        parts.note("batch_norm")
    for patch in patches(root, ignore_hooks=ignore_hooks):
        parts.note(patch.reason, patch.place)
    fields = _fields(parts, computed.module, [layer.module for layer in layers], image_size)
    if parts.found:
        return None, [(key, sentence(REFUSALS[key], places)) for key, places in parts.found.items()]
    tower = Tower(**fields)
    return Tower(**fields, sources=_sources(root, tower, computed.sources)), []


def _sources(root: nn.Module, tower: Tower, others: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Parameters and buffers that are not shared: tensors of the tower are views of them, or computed from them."""
    shared = set(map(id, tower.tensors()))
    held = [*root.parameters(), *(buffer for buffer in root.buffers() if buffer.is_floating_point()), *others]
    return tuple({id(tensor): tensor for tensor in held if id(tensor) not in shared}.values())


def _fields(parts: Parts, trunk: Any, head: list[nn.Module], image_size: tuple[int, int] | None) -> Fields:
    """Arguments of a tower; not to be used if anything was noted."""
    kind = plain_type(trunk)
    if kind in NETWORKS:
        return NETWORKS[kind](parts, trunk, head, image_size)
    for base in TRANSFORMERS:
        if isinstance(trunk, base) and all(getattr(kind, name, None) is getattr(base, name, None) for name in _RUN):
            return _transformer(parts, trunk, head)
    parts.note("timm_class", type(trunk).__name__)
    return {}


# --------------------------------------------------------------------------------------------- vision transformers


def _transformer(parts: Parts, vit: Any, head: list[nn.Module]) -> Fields:
    """A transformer of one of :data:`TRANSFORMERS`."""
    if not parts.expect(vit.blocks, (nn.Sequential, nn.ModuleList), "blocks"):
        return {}
    if isinstance(vit, VisionTransformerDistilled):
        fields = distilled(parts, vit) | projection(parts, [vit.head_drop, *head])
    else:
        fields = pooling(parts, vit) | projection(parts, [vit.head_drop, vit.head, *head])
    blocks = list(vit.blocks)
    has_differences = any(map(is_differential, blocks))
    if has_differences and fields.get("pooling") != "cls":
        pool = () if vit.attn_pool is None else (vit.attn_pool,)
        kept = (vit.norm, vit.fc_norm, vit.head, *pool)
        return fields | network(parts, vit, vit.patch_embed, run_transformer(vit), vit.num_prefix_tokens, kept)
    turns, bias = rotary(parts, vit), shared_bias(parts, vit)
    read = [read_block(parts, block, f"blocks.{i}", turns[i], bias) for i, block in enumerate(blocks)]
    if len(parts.heads) > 1 or len(parts.activations) > 1:
        parts.note("replaced", "blocks with different heads or activations")
    activation = next(iter(parts.activations), "gelu")
    fields |= {"blocks": cast(tuple[Block, ...], tuple(read)), "heads": next(iter(parts.heads), 1)}
    return fields | {"activation": activation} | _start(parts, vit)


def _start(parts: Parts, vit: Any) -> Fields:
    """What comes before the first block."""
    embed = vit.patch_embed
    fields = sizes(parts, embed)
    parts.idle("", pos_drop=getattr(vit, "pos_drop", None), patch_drop=getattr(vit, "patch_drop", None))
    norm_pre = getattr(vit, "norm_pre", nn.Identity())
    ln_pre = parts.norm(norm_pre, "norm_pre")
    positions = getattr(vit, "pos_embed", None)
    registers = getattr(vit, "dist_token", getattr(vit, "reg_token", None))
    prefix = sum(token.shape[1] for token in (vit.cls_token, registers) if token is not None)
    if vit.num_prefix_tokens != prefix:
        parts.note("replaced", f"num_prefix_tokens: {vit.num_prefix_tokens}, where there are {prefix}")
    if not is_one_convolution(embed):
        held = (embed, norm_pre)
        tokens = [token for token in (vit.cls_token, registers, positions) if token is not None]
        weights = (*(tensor for part in held for tensor in held_tensors(part)), *tokens)
        width = vit.embed_dim
        return fields | NO_PATCHES | {"embedder": Embedder(run_start(vit), weights, width, vit.num_prefix_tokens)}
    if embed.proj.in_channels != 3:
        parts.note("channels")
    if positions is None and isinstance(vit, VisionTransformer) and not parts.found:
        rows, columns = embed.grid_size
        patches = parts.like.new_zeros(1, rows, columns, vit.embed_dim)
        x = vit._pos_embed(patches if vit.dynamic_img_size else patches.flatten(1, 2))
        if x.shape[1] != rows * columns + vit.num_prefix_tokens:  # early versions of timm left it out
            parts.note("replaced", "pos_embed: without it the class token is left out")
    return fields | {
        "patch_weight": embed.proj.weight,
        "patch_bias": embed.proj.bias,
        "class_embedding": None if vit.cls_token is None else vit.cls_token[0, 0],
        "registers": None if registers is None else registers[0],
        "positional_embedding": None if positions is None else positions[0],
        "ln_pre": ln_pre,
    }


# ------------------------------------------------------------------------------------------- the module's own forward


@torch.no_grad()
def own_forward(root: nn.Module, trunk: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """A module's own embeddings, and its residual stream as its forward passes.

    Args:
        root: the module.
        trunk: the model of timm in it, or the same.
        images: ``[B, 3, height, width]``.

    Returns:
        ``[B, D]``, and the stream before the first block and after each, ``[B, N, W]``; None for a part that did not
        run. Of a network of another kind, its last feature map as tokens.
    """
    inner = cast(Any, unwrap(trunk))
    is_read = isinstance(inner, TRANSFORMERS) and not any(map(is_differential, inner.blocks))
    blocks = list(inner.blocks) if is_read else []
    stream: list[Tensor | None] = [None] * (1 + len(blocks))

    def after(index: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            stream[index] = output.clone()

        return record

    def before(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stream[0] = as_tokens(inner, inputs[0]).clone()

    if isinstance(inner, (*TRANSFORMERS, *SWINS)):
        last = inner.norm
    else:
        last = inner.head if isinstance(getattr(inner, "head", None), nn.Module) else inner.global_pool
    first = blocks[0] if blocks else last
    handles = [first.register_forward_pre_hook(before)]
    handles += [block.register_forward_hook(after(index)) for index, block in enumerate(blocks, 1)]
    try:
        with torch.autocast(images.device.type, enabled=False):
            out = cast(Tensor, root._call_impl(images))  # a forward that was compiled in place would not run the hooks
    finally:
        for handle in handles:
            handle.remove()
    return out, stream
