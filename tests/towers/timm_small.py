"""Small random models of timm: of every name, with its flags, and of flags that no name has."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from timm.layers import GluMlp, RmsNorm, SwiGLU
from timm.models import vision_transformer as vits
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn

from clipfast.towers.timm_towers import TRANSFORMERS as TRANSFORMER_CLASSES


def entrypoint(name: str) -> Callable[..., nn.Module]:
    """timm's function that makes a model."""
    make: Callable[..., nn.Module] = timm.model_entrypoint(name)
    return make


def class_of(name: str) -> Any:
    """The class that timm says a name is of."""
    return inspect.signature(entrypoint(name)).return_annotation


TRANSFORMERS = [
    name
    for name in timm.list_models()
    if inspect.isclass(class_of(name)) and issubclass(class_of(name), TRANSFORMER_CLASSES)
]
"""Every name of timm whose class is, or inherits from, one that is read block by block."""


def has_network(name: str) -> bool:
    """Whether a convolutional network comes before the blocks: it keeps its own size."""
    return entrypoint(name).__module__.endswith(("vitamin", "hybrid")) or "_mci_" in name


def _overrides(name: str) -> dict[str, Any]:
    """Two layers and two heads, four patches a side; every other flag as it is."""
    module = entrypoint(name).__module__.rpartition(".")[2]
    if module == "convnext":
        return {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}
    if module == "swin_transformer":
        return {"depths": (1, 1, 1, 1), "embed_dim": 8, "num_heads": (1, 1, 2, 2), "img_size": 64, "window_size": 2}
    if module == "fastvit":
        stages = 5 if name.endswith(("mci3", "mci4")) else 4
        return {"layers": (1,) * stages, "embed_dims": (16, 32, 32, 64, 64)[:stages]}
    if module == "vitamin" or "_mci_" in name:
        return {"depth": 2, "img_size": 64}
    if module in ("vision_transformer_relpos", "beit"):
        return {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64}
    patch = re.search(r"patch(\d+)", name)
    width = 96 if "_giant_" in name else 64  # where a hidden layer must be even
    heads = {"num_kv_heads": (1, 2)} if "sapiens2" in name else {}
    side = 4 * int(patch[1]) if patch and module != "vision_transformer_hybrid" else 64
    return {"depth": 2, "embed_dim": width, "num_heads": 2, "img_size": side, **heads}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A small model with a name's flags, random, in eval mode."""
    return randomised(timm.create_model(name, **_overrides(name), **changes)).to(dtype).eval()


@contextmanager
def small_trunks() -> Iterator[None]:
    """Models of timm that are made inside are as small as those of :func:`build`."""
    create = timm.create_model

    def make(name: str, **options: Any) -> nn.Module:
        return create(name, **{**_overrides(name), **options})

    with mock.patch.object(timm, "create_model", make):
        yield


def trunk_of(name: str) -> dict[str, Any] | None:
    """open_clip's description of a trunk of timm; None for a model without one."""
    vision: dict[str, Any] = open_clip.get_model_config(name)["vision_cfg"]
    return vision if "timm_model_name" in vision else None


def build_open_clip(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """open_clip's image tower of a name, with a small trunk, random, in eval mode."""
    config = open_clip.get_model_config(name)
    vision = {**config["vision_cfg"], "image_size": 64}
    with small_trunks():
        tower = open_clip.model._build_vision_tower(24, vision, False)
    return randomised(tower).to(dtype).eval()


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter and every statistic a random value of its natural size: no bias is 0, no scale is 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        if parameter.ndim == 1 and ("weight" in last or "gamma" in last):
            parameter.normal_(1.0, 0.3, generator=generator)
        elif parameter.ndim < 2 or last in ("pos_embed", "cls_token", "reg_token", "latent", "freqs"):
            parameter.normal_(0.0, 0.3, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[1:].numel() ** -0.5, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0.0, 0.3, generator=generator)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0, generator=generator)
    return model


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
vit = partial(VisionTransformer, **SMALL)
eva = partial(Eva, **SMALL)
rotary = partial(eva, use_rot_pos_emb=True, attn_type="rope")
parallel = partial(vit, block_fn=vits.ParallelScalingBlock)
relative = partial(VisionTransformerRelPos, **SMALL)
beit = partial(Beit, **SMALL)
distilled = partial(VisionTransformerDistilled, **SMALL)


def deeper_pool() -> nn.Module:
    """An attention pool with several queries, the first of which is read, and norms on queries and keys."""
    model = vit(global_pool="map", class_token=False)
    pool = timm.layers.AttentionPoolLatent(
        32, num_heads=4, latent_len=3, qk_norm=True, norm_layer=timm.layers.LayerNorm
    )
    model.attn_pool = pool
    return model


def several_queries() -> nn.Module:
    """An attention pool that averages what three queries and their MLP give, with norms on queries and keys."""
    model = vit(global_pool="map", class_token=False, num_classes=5)
    settings = {"qk_norm": True, "norm_layer": timm.layers.LayerNorm, "pool_type": "avg"}
    model.attn_pool = timm.layers.AttentionPoolLatent(32, num_heads=4, latent_len=3, **settings)
    return model


def direct_pool() -> nn.Module:
    """An attention pool whose latent is the query itself, without an MLP."""
    model = vit(global_pool="map", class_token=False)
    model.attn_pool = timm.layers.AttentionPoolLatent(32, num_heads=4, q_proj=False, norm_layer=timm.layers.LayerNorm)
    model.attn_pool.mlp = None
    return model


def map_pooled(**settings: Any) -> nn.Module:
    """A network with the attention pool of CLIP's ResNets."""
    model = timm.create_model("test_byobnet")
    model.head = timm.layers.AttentionPool2d(256, **{"feat_size": 5, "out_features": 24, "head_dim": 32, **settings})
    return model


FLAGS: dict[str, Callable[[], nn.Module]] = {
    "class token": vit,
    "classes": partial(vit, num_classes=7),
    "rectangular": partial(vit, img_size=(24, 40)),
    "any size": partial(vit, dynamic_img_size=True),
    "patches embedded and normed": partial(vit, embed_norm_layer=timm.layers.LayerNorm),
    "no positions": partial(vit, pos_embed="none"),
    "no final norm": partial(vit, final_norm=False),
    "no biases": partial(vit, qkv_bias=False, proj_bias=False),
    "norm after the class token": partial(vit, fc_norm=True),
    "registers": partial(vit, reg_tokens=3),
    "registers without positions": partial(vit, reg_tokens=3, no_embed_class=True),
    "registers alone": partial(vit, class_token=False, reg_tokens=2, global_pool="avg"),
    "mean, then norm": partial(vit, global_pool="avg"),
    "norm, then mean": partial(vit, global_pool="avg", fc_norm=False),
    "mean of all tokens": partial(vit, global_pool="avg", fc_norm=False, pool_include_prefix=True, reg_tokens=2),
    "mean without norm": partial(vit, global_pool="avg", final_norm=False),
    "attention pool": partial(vit, global_pool="map", class_token=False),
    "attention pool of patches": partial(vit, global_pool="map", reg_tokens=2, num_classes=5),
    "attention pool of all tokens": partial(vit, global_pool="map", pool_include_prefix=True),
    "attention pool with norms": deeper_pool,
    "attention pool without MLP": direct_pool,
    "attention pool of several queries": several_queries,
    "refined patches": partial(vit, global_pool="prr"),
    "refined patches without a class token": partial(vit, global_pool="prr", class_token=False, reg_tokens=1),
    "norms inside": partial(vit, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=0.1),
    "RMS norms": partial(vit, norm_layer=RmsNorm, qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True),
    "norms without weights": partial(vit, norm_layer=partial(timm.layers.LayerNorm, affine=False)),
    "tanh": partial(vit, act_layer=partial(nn.GELU, approximate="tanh")),
    "QuickGELU": partial(vit, act_layer="quick_gelu"),
    "SwiGLU": partial(vit, mlp_layer=SwiGLU, scale_mlp_norm=True, act_layer=nn.SiLU),
    "packed SwiGLU": partial(vit, mlp_layer=partial(GluMlp, gate_last=False), act_layer=nn.SiLU, mlp_ratio=5),
    "gate last": partial(vit, mlp_layer=GluMlp, act_layer=nn.GELU),
    "post-norm": partial(vit, block_fn=vits.ResPostBlock, init_values=0.1),
    "parallel": partial(parallel, qk_norm=True, init_values=0.1),
    "parallel without biases": partial(parallel, qkv_bias=False, global_pool="avg"),
    "parallel, one output": partial(vit, block_fn=partial(vits.ParallelScalingBlock, fuse_out_proj=True)),
    "several in parallel": partial(vit, block_fn=vits.ParallelThingsBlock, init_values=0.1, qkv_bias=False),
    "three in parallel": partial(vit, block_fn=partial(vits.ParallelThingsBlock, num_parallel=3), norm_layer=RmsNorm),
    "gates in parallel": partial(vit, block_fn=vits.ParallelThingsBlock, mlp_layer=SwiGLU, act_layer=nn.SiLU),
    "differential": partial(vit, attn_layer="diff", global_pool="avg"),
    "differential, parallel": partial(vit, block_fn=vits.DiffParallelScalingBlock, global_pool="map"),
    "Eva": eva,
    "Eva, classes": partial(eva, global_pool="token", num_classes=7),
    "Eva, registers": partial(eva, num_reg_tokens=2, global_pool="token"),
    "Eva, norm then mean": partial(eva, use_fc_norm=False),
    "Eva, attention pool": partial(eva, global_pool="map", attn_pool_num_heads=4, attn_pool_mlp_ratio=2.0),
    "Eva, post-norm": partial(eva, use_post_norm=True, scale_attn_inner=True, scale_mlp=True, swiglu_mlp=True),
    "Eva, norms inside": partial(eva, scale_attn_inner=True, scale_mlp=True, swiglu_mlp=True, init_values=0.1),
    "Eva, separate": partial(eva, qkv_fused=False, swiglu_mlp=True, attn_only_layer_scale=True, init_values=0.1),
    "Eva, keys normed": partial(eva, qk_norm=True, norm_layer=RmsNorm, swiglu_mlp=True, swiglu_align_to=8),
    "rotary": rotary,
    "rotary, EVA-02": partial(rotary, attn_type="eva", ref_feat_shape=(16, 16), img_size=(24, 40)),
    "rotary, halves": partial(rotary, rope_rotate_half=True, num_reg_tokens=2, use_abs_pos_emb=False),
    "rotary, any size": partial(rotary, dynamic_img_size=True, rope_grid_indexing="xy", rope_grid_offset=1.0),
    "rotary, mixed": partial(rotary, rope_type="mixed", rope_temperature=10.0),
    "rotary, mixed, any size": partial(rotary, rope_type="mixed", dynamic_img_size=True),
    "rotary, DINOv3": partial(rotary, rope_type="dinov3", rope_temperature=100, use_abs_pos_emb=False),
    "rotary, DINOv3, any size": partial(rotary, rope_type="dinov3", dynamic_img_size=True, rope_rotate_half=True),
    "rotary, MRoPE": partial(rotary, rope_type="mrope", rope_mrope_section=(2, 3, 3)),
    "rotary, shared keys": partial(rotary, num_kv_heads=1, qkv_fused=False),
    "ConvNeXt": partial(timm.create_model, "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 24), num_classes=5),
    "ConvNeXt, norm first": partial(
        timm.create_model, "convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 8, 16, 24), head_norm_first=True
    ),
    "Swin": partial(
        timm.create_model,
        "swin_base_patch4_window7_224",
        depths=(1, 1, 1, 1),
        embed_dim=8,
        num_heads=(1, 1, 2, 2),
        img_size=64,
        window_size=2,
    ),
    "Swin V2": partial(
        timm.create_model,
        "swinv2_tiny_window8_256",
        depths=(1, 1),
        embed_dim=8,
        num_heads=(1, 2),
        img_size=64,
        window_size=2,
    ),
    "ResNet": partial(timm.create_model, "test_resnet"),
    "CLIP's ResNet": partial(map_pooled, qkv_separate=True),
    "attention pool of a map": partial(map_pooled, class_token=True, feat_size=(4, 6)),
    "EfficientNet": partial(timm.create_model, "test_efficientnet", num_classes=0),
    "NormFreeNet": partial(timm.create_model, "test_nfnet", num_classes=7),
    "FastViT": partial(timm.create_model, "fastvit_mci0", layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64)),
    "relative, by an MLP": relative,
    "relative, by Swin's MLP": partial(relative, rel_pos_type="mlp-swin", img_size=(24, 40)),
    "relative, a table": partial(relative, rel_pos_type="bias", fc_norm=True, num_classes=5),
    "relative, shared, class token": partial(
        relative, shared_rel_pos=True, class_token=True, global_pool="token", rel_pos_dim=16
    ),
    "relative, table for the class token": partial(
        relative, rel_pos_type="bias", class_token=True, global_pool="token", qk_norm=True
    ),
    "relative, class token not read": partial(relative, rel_pos_type="bias", class_token=True),
    "relative, post-norm": partial(relative, block_fn=ResPostRelPosBlock, init_values=None),
    "relative, post-norm, class token": partial(
        relative, block_fn=ResPostRelPosBlock, class_token=True, global_pool="token", rel_pos_type="bias"
    ),
    "BEiT": partial(beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    "BEiT, class token": partial(beit, use_rel_pos_bias=True, global_pool="token", img_size=(24, 40)),
    "BEiT, shared": partial(beit, use_shared_rel_pos_bias=True, global_pool="token", qkv_bias=False, num_classes=5),
    "BEiT, shared and its own": partial(
        beit, use_shared_rel_pos_bias=True, use_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True, use_fc_norm=False
    ),
    "BEiT, absolute": beit,
    "distilled": partial(distilled, num_classes=7),
    "distilled features": distilled,
    "two norms": partial(eva, use_post_transformer_norm=True, use_fc_norm=True, num_classes=5),
    "two norms of the class token": partial(
        eva, use_post_transformer_norm=True, use_fc_norm=True, global_pool="token", num_reg_tokens=1
    ),
    "attention pool, MLP, norm": partial(vit, global_pool="map", fc_norm=True, class_token=False),
    "norm, attention pool, norm": partial(
        eva, global_pool="map", use_post_transformer_norm=True, use_fc_norm=True, num_classes=5
    ),
}
"""Flags that matter to the reader, by what they change; those of names are walked over, too."""


def flagged(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of :data:`FLAGS`, random, in eval mode."""
    torch.manual_seed(0)
    return randomised(FLAGS[name]()).to(dtype).eval()


def pixels(size: tuple[int, int], count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random preprocessed images."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
