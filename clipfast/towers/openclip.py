"""open_clip's vision towers as plain tensors.

A tower is read from an unmodified module of open_clip's own ``VisionTransformer`` or ``ModifiedResNet`` class. What
cannot be decomposed exactly is refused with every reason at once; the documentation lists ``REFUSALS``.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from open_clip.transformer import LayerNorm as OpenClipLayerNorm
from torch import Tensor, nn

from clipfast.errors import UnsupportedTower
from clipfast.towers import clip_resnet, timm_towers
from clipfast.towers.clip_layers import (
    Classes,
    Places,
    activation,
    bias_of,
    block_of,
    expect,
    expect_attention,
    expect_norm,
    expect_patches,
    have_equal_settings,
    norm,
    optional_norm,
    replaced_in_block,
)
from clipfast.towers.folding import folded
from clipfast.towers.openclip_sizes import sized
from clipfast.towers.patches import drops_now, is_replaced, patches, plain_type, sentence
from clipfast.towers.recording import record
from clipfast.towers.sizes import of_copy, pixels_of
from clipfast.towers.tower import Activation, AttentionPool, LayerNorm, Linear, Pooling, Tower
from clipfast.towers.wrappers import unwrap

REFUSALS: dict[str, str] = (
    {
        "class": "not open_clip's VisionTransformer or ModifiedResNet",
        "poolers": "two attentional poolers: open_clip gives an embedding per query, not one per image",
        "query_mean": "an average over the attentional pooler's queries: each has a LayerNorm of its own",
        "pool": "no pooling: there is no single image embedding",
        "scaled_cosine": "scaled cosine attention: open_clip's own forward cannot run it",
        "activation": "an activation other than GELU, QuickGELU and SiLU",
    }
    | clip_resnet.REFUSALS
    | timm_towers.REFUSALS
)
"""Why a tower is refused, by a short key; those of its trunks of timm, too."""

CLASSES = Classes(
    blocks=(ResidualAttentionBlock, CustomResidualAttentionBlock),
    norms=(OpenClipLayerNorm, LayerNormFp32, nn.LayerNorm),
    attentions=(nn.MultiheadAttention, Attention),
    quick_gelu=QuickGELU,
    scales=(LayerScale,),
    custom=(CustomResidualAttentionBlock,),
)
"""What its blocks are made of."""


def vision_module(module: nn.Module) -> nn.Module:
    """The image tower of a CLIP model, or the module itself when it is one, without what is wrapped around it."""
    module = unwrap(module)
    return unwrap(cast(nn.Module, module.visual)) if hasattr(module, "visual") else module


def encode_image(module: nn.Module, images: Tensor) -> Tensor:
    """The module's own image embeddings, ``[B, 3, height, width] → [B, D]``."""
    inner = unwrap(module)  # what is wrapped around the image tower stays
    visual, plain = cast(Any, inner.visual if hasattr(inner, "visual") else module), vision_module(module)
    resized = sized(plain, pixels_of(images))
    out = (visual if resized is plain else resized)(images)
    return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def read(module: nn.Module, *, ignore_hooks: bool = False, image_size: tuple[int, int] | None = None) -> Tower:
    """Reads a CLIP model or its ``.visual`` into a :class:`Tower` that shares its parameters.

    Args:
        module: the model.
        ignore_hooks: accept forward hooks.
        image_size: height and width of the images; positions are resampled as open_clip does it. None for the tower's.

    Raises:
        UnsupportedTower: with every reason.
        InputError: an image size that the tower cannot be given.
    """
    visual = vision_module(module)
    reasons = [text for _, text in refusals(visual, ignore_hooks=ignore_hooks)] + _replaced_encoder(unwrap(module))
    if reasons:
        raise UnsupportedTower(type(visual).__name__, reasons)
    if isinstance(visual, TimmModel):
        return timm_towers.read_at(visual, image_size, lambda model, _: _timm(model, ignore_hooks), sized)
    if isinstance(visual, ModifiedResNet):
        return clip_resnet.read(sized(visual, image_size), visual.image_size)
    plain, computed_from = folded(visual)
    vit = cast(Any, sized(plain, image_size))
    blocks, sources = zip(*(block_of(block) for block in vit.transformer.resblocks), strict=True)
    first = vit.transformer.resblocks[0]
    pooling, ln_post, pool = _pooling(vit)
    tower = Tower(
        patch_weight=vit.conv1.weight,
        patch_bias=vit.conv1.bias,
        class_embedding=vit.class_embedding,
        registers=None,
        positional_embedding=vit.positional_embedding,
        ln_pre=optional_norm(vit.ln_pre),
        blocks=blocks,
        ln_post=ln_post,
        projection=vit.proj,
        heads=first.attn.num_heads,
        activation=cast(Activation, activation(first.mlp.gelu, CLASSES)),
        pooling=pooling,
        image_size=tuple(vit.image_size),
        patch_size=tuple(vit.patch_size),
        pool=pool,
        sources=(
            *computed_from,
            *(part for block in sources for part in block),
            *(_query_sources(vit) if pool else ()),
        ),
    )
    return tower if vit is plain else of_copy(tower, plain, vit)


def _pooling(vit: Any) -> tuple[Pooling, LayerNorm | None, AttentionPool | None]:
    """How the embedding reads the last residual stream, the LayerNorm of its tokens or of the pooled row, the pool."""
    last = optional_norm(vit.ln_post)
    if vit.attn_pool is not None:
        return "attention", norm(vit.attn_pool.ln_k), _attention_pool(vit.attn_pool, last)
    if vit.pool_type == "tok":
        return "cls", last, None
    return "mean" if vit.final_ln_after_pool else "normed_mean", last, None


def _attention_pool(pooler: Any, last: LayerNorm | None) -> AttentionPool:
    """open_clip's pooler: of its queries the embedding reads the first."""
    query, key, value = _projections(pooler.attn)
    return AttentionPool(
        query=_query(pooler, query),
        key_weight=key.weight,
        key_bias=key.bias,
        value_weight=value.weight,
        value_bias=value.bias,
        out_weight=pooler.attn.out_proj.weight,
        out_bias=bias_of(pooler.attn.out_proj),
        heads=pooler.attn.num_heads,
        norm=last,
    )


def _projections(attention: Any) -> tuple[Linear, Linear, Linear]:
    """Query, key and value of one of torch's attention layers, which packs them where their widths are equal."""
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    else:
        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    biases = (None, None, None) if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
    query, key, value = (Linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    return query, key, value


@torch.no_grad()
def _query(pooler: Any, projection: Linear) -> Tensor:
    """The first query after its LayerNorm and its projection, ``[D]``."""
    dtype = torch.promote_types(projection.weight.dtype, torch.float32)
    weight, bias, eps = pooler.ln_q.weight.to(dtype), bias_of(pooler.ln_q).to(dtype), pooler.ln_q.eps
    normed = F.layer_norm(pooler.query[0].to(dtype), weight.shape, weight, bias, eps)
    offset = None if projection.bias is None else projection.bias.to(dtype)
    return F.linear(normed, projection.weight.to(dtype), offset).to(projection.weight.dtype)


def _query_sources(vit: Any) -> tuple[Tensor, ...]:
    """What :func:`_query` is computed from."""
    pooler = vit.attn_pool
    parts = (pooler.query, pooler.ln_q.weight, pooler.ln_q.bias, *_projections(pooler.attn)[0])
    return tuple(part for part in parts if part is not None)


@torch.no_grad()
def own_forward(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The module's own image embeddings, and its residual stream as its forward passes.

    Args:
        module: the model.
        images: ``[B, 3, height, width]``.

    Returns:
        ``[B, D]``, and the stream before the first block and after each, ``[B, N, W]``; None for a part that did not
        run. Of a ResNet it is what its attention pool reads.
    """
    visual = cast(Any, sized(vision_module(module), pixels_of(images)))
    if isinstance(visual, TimmModel):
        return timm_towers.own_forward(visual, visual.trunk, images)
    if isinstance(visual, ModifiedResNet):
        return clip_resnet.own_forward(visual, images)
    parts = [visual.ln_pre, *visual.transformer.resblocks]
    tokens_first = not getattr(visual.transformer, "batch_first", True)
    # A forward that was compiled in place would not run the hooks.
    return record(parts, lambda: visual._call_impl(images), images.device, tokens_first=tokens_first)


def _replaced_encoder(module: nn.Module) -> list[str]:
    """The reason for refusing a CLIP whose ``encode_image`` is not open_clip's own."""
    kind: Any = type(module)
    own = next((each.encode_image for each in (CLIP, CustomTextCLIP, CoCa) if isinstance(module, each)), None)
    subclassed = own is not None and kind.encode_image is not own
    if subclassed or is_replaced(module, "encode_image"):
        return [sentence(REFUSALS["forward"], [f"{kind.__name__}.encode_image"])]
    return []


def _timm(visual: nn.Module, ignore_hooks: bool) -> tuple[Tower | None, list[tuple[str, str]]]:
    """The tower of a trunk of timm with open_clip's projection after it, or None and every reason against it."""
    model = cast(Any, visual)
    size = model.image_size[0], model.image_size[1]
    return timm_towers.examine(visual, model.trunk, model.head, size, ignore_hooks=ignore_hooks)


def refusals(visual: nn.Module, *, ignore_hooks: bool = False) -> list[tuple[str, str]]:
    """Every reason why a vision module cannot be decomposed, as (key of :data:`REFUSALS`, sentence)."""
    kind = plain_type(visual)
    if kind is TimmModel:
        return _timm(visual, ignore_hooks)[1]
    if kind not in (VisionTransformer, ModifiedResNet):
        return [("class", f"{REFUSALS['class']} but {kind.__module__}.{kind.__qualname__}")]
    reasons: dict[str, list[str]] = {}  # key → places
    if drops_now(visual):
        reasons["training"] = []
    runs: list[nn.Module] = []
    if kind is VisionTransformer:
        vit = folded(visual).module
        for key in _pooling_reasons(vit):
            reasons[key] = []
        for key, place in _replaced(vit):
            reasons.setdefault(key, []).append(place)
    else:
        runs = clip_resnet.trunk(visual)
        for key, place in clip_resnet.replaced(visual, (AttentionPool2d,)):
            reasons.setdefault(key, []).append(place)
    for patch in patches(visual, ignore_hooks=ignore_hooks, runs=runs):
        reasons.setdefault(patch.reason, []).append(patch.place)
    return [(key, sentence(REFUSALS[key], filter(None, places))) for key, places in reasons.items()]


def _pooling_reasons(vit: Any) -> list[str]:
    """Keys of the reasons that a vision transformer's pooling gives."""
    if vit.attn_pool is not None and vit.attn_pool_contrastive is not None:
        return ["poolers"]
    if vit.pool_type == "none":
        return ["pool"]
    return ["query_mean"] if vit.attn_pool is not None and vit.pool_type != "tok" else []


def _replaced(vit: Any) -> Places:
    """Settings that cannot be decomposed, with no place, and layers that are not those of open_clip's class."""
    wrong = expect_patches(vit.conv1, tuple(vit.patch_size)) + expect(vit.transformer, (Transformer,), "transformer")
    for name in ("ln_pre", "ln_post"):
        if type(getattr(vit, name)) is not nn.Identity:
            wrong += expect_norm(getattr(vit, name), CLASSES, name)
    if vit.attn_pool is not None:
        wrong += _replaced_in_pooler(vit.attn_pool)
    blocks = list(vit.transformer.resblocks)
    in_blocks: Places = []
    for index, block in enumerate(blocks):
        in_blocks += replaced_in_block(block, f"transformer.resblocks.{index}", CLASSES)
        if plain_type(block) in CLASSES.blocks and activation(getattr(block.mlp, "gelu", None), CLASSES) is None:
            wrong.append(("activation", ""))
        if getattr(block.attn if hasattr(block, "attn") else None, "scaled_cosine", False):
            wrong.append(("scaled_cosine", ""))
    if not in_blocks and not have_equal_settings(blocks, CLASSES):
        in_blocks.append(("replaced", "blocks with different heads or activations"))
    return wrong + in_blocks


def _replaced_in_pooler(pooler: Any) -> Places:
    """The same for the attentional pooler."""
    wrong = expect(pooler, (AttentionalPooler,), "attn_pool")
    if wrong:
        return wrong
    wrong += expect(pooler.attn, (nn.MultiheadAttention,), "attn_pool.attn")
    if not wrong:
        wrong += expect_attention(pooler.attn, "attn_pool.attn")
    for name in ("ln_q", "ln_k"):
        wrong += expect_norm(getattr(pooler, name), CLASSES, f"attn_pool.{name}")
    return wrong
