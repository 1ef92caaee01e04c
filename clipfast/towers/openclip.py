"""open_clip's vision towers as plain tensors.

A tower is read from an unmodified module of open_clip's own ``VisionTransformer`` class. What cannot be decomposed
exactly is refused with every reason at once; ``REFUSALS`` is the list of them, shown in the README.
"""

from typing import Any, cast

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    CustomResidualAttentionBlock,
    LayerNormFp32,
    LayerScale,
    PatchDropout,
    QuickGELU,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from open_clip.transformer import LayerNorm as OpenClipLayerNorm
from torch import Tensor, nn

from clipfast.errors import UnsupportedTower
from clipfast.towers.tower import Activation, Block, LayerNorm, Pooling, Tower

REFUSALS: dict[str, str] = {
    "resnet": "a ModifiedResNet: convolutions are no sum over heads and patches",
    "timm": "a timm trunk: not read yet",
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
    "training": "patch dropout in training mode: call .eval() first",
    "replaced": "a layer that has been replaced or re-parametrised",
}
"""Why a tower is refused, by a short key."""


def vision_module(module: nn.Module) -> nn.Module:
    """The image tower of a CLIP model, or the module itself when it is one."""
    return cast(nn.Module, module.visual) if hasattr(module, "visual") else module


def read(module: nn.Module) -> Tower:
    """Reads a CLIP model or its ``.visual`` into a :class:`Tower` that shares its parameters.

    Raises:
        UnsupportedTower: with every reason.
    """
    visual = vision_module(module)
    reasons = [text for _, text in refusals(visual)]
    if reasons:
        raise UnsupportedTower(type(visual).__name__, reasons)
    vit = cast(Any, visual)
    blocks = tuple(_block(block) for block in vit.transformer.resblocks)
    first = vit.transformer.resblocks[0]
    pooling: Pooling = "mean" if vit.pool_type == "avg" else "cls"
    return Tower(
        patch_weight=vit.conv1.weight,
        class_embedding=vit.class_embedding,
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
    )


def refusals(visual: nn.Module) -> list[tuple[str, str]]:
    """Every reason why a vision module cannot be decomposed, as (key of :data:`REFUSALS`, sentence)."""
    if isinstance(visual, ModifiedResNet):
        return [("resnet", REFUSALS["resnet"])]
    if isinstance(visual, TimmModel):
        return [("timm", f"{REFUSALS['timm']} ({type(visual.trunk).__name__})")]
    if type(visual) is not VisionTransformer:
        return [("class", f"{REFUSALS['class']} but {type(visual).__module__}.{type(visual).__qualname__}")]
    vit = cast(Any, visual)
    found: list[str] = []
    if vit.attn_pool is not None:
        found.append("attentional_pool")
    elif vit.pool_type == "none":
        found.append("pool")
    elif vit.pool_type == "avg" and not vit.final_ln_after_pool:
        found.append("norm_before_pool")
    if vit.proj is None:
        found.append("projection")
    if isinstance(vit.patch_dropout, PatchDropout) and vit.training:
        found.append("training")
    blocks = list(vit.transformer.resblocks)
    for block in blocks:
        found += [key for key in _block_refusals(block) if key not in found]
    if "replaced" not in found and not (_is_plain_frame(vit) and _are_alike(blocks)):
        found.append("replaced")
    return [(key, REFUSALS[key]) for key in found]


def _block_refusals(block: Any) -> list[str]:
    if type(block) not in (ResidualAttentionBlock, CustomResidualAttentionBlock):
        return ["replaced"]
    found = []
    if type(block) is CustomResidualAttentionBlock:
        attn = block.attn
        flags = {
            "scale_attn": not isinstance(block.ln_attn, nn.Identity),
            "scale_fc": not isinstance(block.mlp.ln, nn.Identity),
        }
        if type(attn) is Attention:
            flags |= {
                "qk_norm": not isinstance(attn.ln_q, nn.Identity),
                "scaled_cosine": attn.scaled_cosine,
                "scale_heads": attn.head_scale is not None,
                "scale_attn_inner": not isinstance(attn.ln_inner, nn.Identity),
            }
        found += [key for key, wanted in flags.items() if wanted]
    if _activation(block.mlp.gelu) is None:
        found.append("activation")
    if not _is_plain_block(block):
        found.append("replaced")
    return found


def _is_plain_frame(vit: Any) -> bool:
    """Whether what surrounds the blocks is what its class came with."""
    return (
        type(vit.conv1) is nn.Conv2d
        and vit.conv1.bias is None
        and type(vit.transformer) is Transformer
        and (_is_plain_norm(vit.ln_pre) or type(vit.ln_pre) is nn.Identity)
        and _is_plain_norm(vit.ln_post)
    )


def _is_plain_block(block: Any) -> bool:
    """Whether a block's layers are the ones its class came with: no adapters, quantised layers, parametrisations."""
    custom = type(block) is CustomResidualAttentionBlock
    children = {name for name, _ in block.named_children()} - ({"ln_attn"} if custom else set())
    inner = [name for name, _ in block.mlp.named_children() if not (custom and name == "ln")]
    if children != {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"} or inner != ["c_fc", "gelu", "c_proj"]:
        return False
    linears = (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)
    return (
        type(block.attn) in (nn.MultiheadAttention, Attention)
        and isinstance(block.attn.in_proj_weight, nn.Parameter)
        and getattr(block.attn, "bias_k", None) is None
        and not getattr(block.attn, "add_zero_attn", False)
        and all(type(layer) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear) for layer in linears)
        and all(layer.bias is not None for layer in linears)
        and all(_is_plain_norm(norm) for norm in (block.ln_1, block.ln_2))
        and all(type(scale) in (nn.Identity, LayerScale) for scale in (block.ls_1, block.ls_2))
    )


def _is_plain_norm(norm: Any) -> bool:
    known = type(norm) in (OpenClipLayerNorm, LayerNormFp32, nn.LayerNorm)
    return known and norm.weight is not None and norm.bias is not None


def _are_alike(blocks: list[Any]) -> bool:
    """Whether all blocks have the same heads and activation, as a :class:`Tower` says of them."""
    return len({(block.attn.num_heads, _activation(block.mlp.gelu)) for block in blocks}) <= 1


def _activation(module: nn.Module) -> str | None:
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
