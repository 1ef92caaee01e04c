"""open_clip's vision towers as plain tensors.

A tower is read from an unmodified module of open_clip's own ``VisionTransformer`` class. What cannot be decomposed
exactly is refused with every reason at once; the documentation lists ``REFUSALS``.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
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
from clipfast.towers import timm_towers
from clipfast.towers.folding import folded
from clipfast.towers.openclip_sizes import sized
from clipfast.towers.patches import drops_now, patches, plain_type, replacement, sentence
from clipfast.towers.sizes import of_copy, pixels_of
from clipfast.towers.tower import Activation, Block, LayerNorm, Pooling, Tower
from clipfast.towers.wrappers import unwrap

REFUSALS: dict[str, str] = {
    "resnet": "a ModifiedResNet: convolutions are no sum over heads and patches",
    "class": "not open_clip's VisionTransformer",
    "attentional_pool": "attentional pooling: it reads the residual stream through a LayerNorm per token",
    "norm_before_pool": "average pooling after the final LayerNorm: every token has a mean and variance of its own",
    "pool": "no pooling: there is no single image embedding",
    "qk_norm": "LayerNorm on queries and keys",
    "scaled_cosine": "scaled cosine attention",
    "scale_heads": "learned scales of the heads",
    "scale_attn_inner": "a LayerNorm between heads and output projection",
    "scale_attn": "a LayerNorm after the attention",
    "scale_fc": "a LayerNorm inside the MLP",
    "activation": "an activation other than GELU and QuickGELU",
    "projection": "no linear projection to the joint space",
} | timm_towers.REFUSALS
"""Why a tower is refused, by a short key; those of its trunks of timm, too."""


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
    plain, sources = folded(visual)
    vit = cast(Any, sized(plain, image_size))
    blocks = tuple(_block(block) for block in vit.transformer.resblocks)
    first = vit.transformer.resblocks[0]
    pooling: Pooling = "mean" if vit.pool_type == "avg" else "cls"
    tower = Tower(
        patch_weight=vit.conv1.weight,
        patch_bias=None,
        class_embedding=vit.class_embedding,
        registers=None,
        positional_embedding=vit.positional_embedding,
        ln_pre=None if isinstance(vit.ln_pre, nn.Identity) else _norm(vit.ln_pre),
        blocks=blocks,
        ln_post=_norm(vit.ln_post),
        projection=vit.proj,
        heads=first.attn.num_heads,
        activation=cast(Activation, _activation(first.mlp.gelu)),
        pooling=pooling,
        image_size=tuple(vit.image_size),
        patch_size=tuple(vit.patch_size),
        sources=sources,
    )
    return tower if vit is plain else of_copy(tower, plain, vit)


@torch.no_grad()
def own_forward(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The module's own image embeddings, and its residual stream as its forward passes.

    Args:
        module: the model.
        images: ``[B, 3, height, width]``.

    Returns:
        ``[B, D]``, and the stream before the first block and after each, ``[B, N, W]``; None for a part that did not
        run.
    """
    visual = cast(Any, sized(vision_module(module), pixels_of(images)))
    if isinstance(visual, TimmModel):
        return timm_towers.own_forward(visual, visual.trunk, images)
    parts = [visual.ln_pre, *visual.transformer.resblocks]
    stream: list[Tensor | None] = [None] * len(parts)
    tokens_first = not getattr(visual.transformer, "batch_first", True)

    def record(index: int, output: Tensor) -> None:
        stream[index] = output.transpose(0, 1).clone() if tokens_first and index else output.clone()

    def hook(index: int) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: record(index, output)

    handles = [part.register_forward_hook(hook(index)) for index, part in enumerate(parts)]
    try:
        with torch.autocast(images.device.type, enabled=False):
            out = visual._call_impl(images)  # a forward that was compiled in place would not run the hooks
    finally:
        for handle in handles:
            handle.remove()
    return out[0] if isinstance(out, tuple) else out, stream


def _replaced_encoder(module: nn.Module) -> list[str]:
    """The reason for refusing a CLIP whose ``encode_image`` is not open_clip's own."""
    own = CLIP.encode_image if isinstance(module, CLIP) else CustomTextCLIP.encode_image
    subclassed = isinstance(module, CLIP | CustomTextCLIP) and type(module).encode_image is not own
    if subclassed or "encode_image" in vars(module):
        return [sentence(REFUSALS["forward"], [f"{type(module).__name__}.encode_image"])]
    return []


def _timm(visual: nn.Module, ignore_hooks: bool) -> tuple[Tower | None, list[tuple[str, str]]]:
    """The tower of a trunk of timm with open_clip's projection after it, or None and every reason against it."""
    model = cast(Any, visual)
    size = model.image_size[0], model.image_size[1]
    return timm_towers.examine(visual, model.trunk, model.head, size, ignore_hooks=ignore_hooks)


def refusals(visual: nn.Module, *, ignore_hooks: bool = False) -> list[tuple[str, str]]:
    """Every reason why a vision module cannot be decomposed, as (key of :data:`REFUSALS`, sentence)."""
    kind = plain_type(visual)
    if isinstance(visual, ModifiedResNet):
        return [("resnet", REFUSALS["resnet"])]
    if kind is TimmModel:
        return _timm(visual, ignore_hooks)[1]
    if kind is not VisionTransformer:
        return [("class", f"{REFUSALS['class']} but {kind.__module__}.{kind.__qualname__}")]
    vit = folded(visual).module
    reasons: dict[str, list[str]] = {}  # key → places
    if vit.attn_pool is not None:
        reasons["attentional_pool"] = []
    elif vit.pool_type == "none":
        reasons["pool"] = []
    elif vit.pool_type == "avg" and not vit.final_ln_after_pool:
        reasons["norm_before_pool"] = []
    if vit.proj is None:
        reasons["projection"] = []
    if drops_now(visual):
        reasons["training"] = []
    blocks = list(vit.transformer.resblocks)
    for index, block in enumerate(blocks):
        for key in _block_settings(block):
            reasons.setdefault(key, [])
        for key, place in _replaced_in_block(block, f"transformer.resblocks.{index}"):
            reasons.setdefault(key, []).append(place)
    for key, place in _replaced_around_blocks(vit):
        reasons.setdefault(key, []).append(place)
    if not {"replaced", "adapter", "quantised"} & reasons.keys() and not _have_equal_settings(blocks):
        reasons["replaced"] = ["blocks with different heads or activations"]
    for patch in patches(visual, ignore_hooks=ignore_hooks):
        reasons.setdefault(patch.reason, []).append(patch.place)
    return [(key, sentence(REFUSALS[key], places)) for key, places in reasons.items()]


def _block_settings(block: Any) -> list[str]:
    """Keys of the settings of a block that cannot be decomposed."""
    keys = []
    if plain_type(block) is CustomResidualAttentionBlock:
        attn = block.attn
        settings = {
            "scale_attn": not isinstance(block.ln_attn, nn.Identity),
            "scale_fc": not isinstance(getattr(block.mlp, "ln", nn.Identity()), nn.Identity),
        }
        if plain_type(attn) is Attention:
            settings |= {
                "qk_norm": not isinstance(attn.ln_q, nn.Identity),
                "scaled_cosine": attn.scaled_cosine,
                "scale_heads": attn.head_scale is not None,
                "scale_attn_inner": not isinstance(attn.ln_inner, nn.Identity),
            }
        keys += [key for key, is_set in settings.items() if is_set]
    if plain_type(block) in BLOCKS and _activation(getattr(block.mlp, "gelu", None)) is None:
        keys.append("activation")
    return keys


BLOCKS = (ResidualAttentionBlock, CustomResidualAttentionBlock)
LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
NORMS = (OpenClipLayerNorm, LayerNormFp32, nn.LayerNorm)
Places = list[tuple[str, str]]  # (key of REFUSALS, place)


def _expect(module: Any, kinds: tuple[type, ...], place: str) -> Places:
    """A reason, with its place, when a module is of none of the expected classes."""
    if isinstance(module, nn.Module) and plain_type(module) in kinds:
        return []
    kind, expected = type(module), kinds[0].__name__
    name = f"{kind.__module__}.{kind.__name__}" if kind.__name__ == expected else kind.__name__
    return [(replacement(module), f"{place}: {name} in place of {expected}")]


def _expect_norm(norm: Any, place: str) -> Places:
    wrong = _expect(norm, NORMS, place)
    if not wrong and (norm.weight is None or norm.bias is None):
        wrong.append(("replaced", f"{place}: no weight or no bias"))
    return wrong


def _replaced_around_blocks(vit: Any) -> Places:
    """Layers outside the blocks that are not those of open_clip's class."""
    wrong = _expect(vit.conv1, (nn.Conv2d,), "conv1") + _expect(vit.transformer, (Transformer,), "transformer")
    if not wrong and vit.conv1.bias is not None:
        wrong.append(("replaced", "conv1: a bias"))
    if type(vit.ln_pre) is not nn.Identity:
        wrong += _expect_norm(vit.ln_pre, "ln_pre")
    return wrong + _expect_norm(vit.ln_post, "ln_post")


def _replaced_in_block(block: Any, place: str) -> Places:
    """Layers of a block that are not those of open_clip's class: adapters, quantised layers, other classes."""
    wrong = _expect(block, BLOCKS, place)
    if wrong:
        return wrong
    custom = plain_type(block) is CustomResidualAttentionBlock
    children = {name for name, _ in block.named_children()} - ({"ln_attn"} if custom else set()) - {"parametrizations"}
    inner = [name for name, _ in block.mlp.named_children() if not (custom and name == "ln")]
    if children != {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}:
        return [("replaced", f"{place}: has the layers {', '.join(sorted(children))}")]
    if inner != ["c_fc", "gelu", "c_proj"]:
        return [("replaced", f"{place}.mlp: has the layers {', '.join(inner)}")]
    wrong += _expect(block.mlp, (nn.Sequential,), f"{place}.mlp")
    wrong += _expect(block.attn, (nn.MultiheadAttention, Attention), f"{place}.attn")
    if not wrong:
        attn = block.attn
        linears = {"attn.out_proj": attn.out_proj, "mlp.c_fc": block.mlp.c_fc, "mlp.c_proj": block.mlp.c_proj}
        for name, layer in linears.items():
            linear = _expect(layer, LINEARS, f"{place}.{name}")
            wrong += linear or ([("replaced", f"{place}.{name}: no bias")] if layer.bias is None else [])
        if getattr(attn, "in_proj_weight", None) is None:
            wrong.append(("replaced", f"{place}.attn: separate weights for query, key and value"))
        if getattr(attn, "bias_k", None) is not None or getattr(attn, "add_zero_attn", False):
            wrong.append(("replaced", f"{place}.attn: a learned or zero key"))
    wrong += _expect_norm(block.ln_1, f"{place}.ln_1") + _expect_norm(block.ln_2, f"{place}.ln_2")
    for name in ("ls_1", "ls_2"):
        wrong += _expect(getattr(block, name), (LayerScale, nn.Identity), f"{place}.{name}")
    return wrong


def _have_equal_settings(blocks: list[Any]) -> bool:
    """Whether all blocks have the same number of heads and the same activation, as in a :class:`Tower`."""
    return len({(block.attn.num_heads, _activation(block.mlp.gelu)) for block in blocks}) <= 1


def _activation(module: nn.Module | None) -> str | None:
    if type(module) is QuickGELU:
        return "quick_gelu"
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return None


def _norm(module: Any) -> LayerNorm:
    return LayerNorm(module.weight, module.bias, module.eps)


def _scale(module: nn.Module) -> Tensor | None:
    return cast(Tensor, module.gamma) if isinstance(module, LayerScale) else None


def _block(block: Any) -> Block:
    return Block(
        ln_1=_norm(block.ln_1),
        in_weight=block.attn.in_proj_weight,
        in_bias=block.attn.in_proj_bias,
        out_weight=block.attn.out_proj.weight,
        out_bias=block.attn.out_proj.bias,
        attention_scale=_scale(block.ls_1),
        ln_2=_norm(block.ln_2),
        mlp_in_weight=block.mlp.c_fc.weight,
        mlp_in_bias=block.mlp.c_fc.bias,
        mlp_out_weight=block.mlp.c_proj.weight,
        mlp_out_bias=block.mlp.c_proj.bias,
        mlp_scale=_scale(block.ls_2),
    )
