"""Every activation of a module's own forward under TransformerLens's name, from forward hooks; nothing of clipfast."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from builders import randomise, vision_tower
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

Record = Callable[[nn.Module, str], None]


@dataclass
class Case:
    """A module and which of its parts give which names.

    Attributes:
        module: the model.
        run: its embeddings of images.
        parts: name → module, whose output is recorded; names that end in ``<`` record its input.
        heads: heads per block.
        derive: adds the names that no module gives by itself.
    """

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    parts: dict[str, nn.Module]
    heads: int
    derive: Callable[[dict[str, Tensor]], None]

    @torch.no_grad()
    def record(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The embedding and every activation."""
        kept: dict[str, Tensor] = {}
        handles = []
        for name, part in self.parts.items():
            if name.endswith("<"):
                hook = part.register_forward_pre_hook(
                    lambda _module, args, name=name[:-1]: kept.__setitem__(name, args[0].clone())
                )
            else:
                hook = part.register_forward_hook(
                    lambda _module, _args, out, name=name: kept.__setitem__(
                        name, (out[0] if isinstance(out, tuple) else out).clone()
                    )
                )
            handles.append(hook)
        try:
            embedding = self.run(images)
        finally:
            for handle in handles:
                handle.remove()
        self.derive(kept)
        return embedding, {name: value for name, value in kept.items() if not name.startswith("_")}


def scale(x: Tensor, eps: float) -> Tensor:
    return (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def attention_names(
    kept: dict[str, Tensor], at: str, weights: Any, heads: int, pattern: Tensor | None = None, rows: Any = 1.0
) -> None:
    """Names of an attention from its queries, keys and values, ``weights`` those of its output projection."""
    q, k, v = (kept[f"{at}.attn.hook_{name}"] for name in "qkv")
    kept[f"{at}.attn.hook_attn_scores"] = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.shape[-1] ** 0.5
    if pattern is None:
        pattern = kept[f"{at}.attn.hook_attn_scores"].softmax(-1)
    kept[f"{at}.attn.hook_pattern"] = pattern
    z = kept.setdefault(f"{at}.attn.hook_z", torch.einsum("bhqk,bkhe->bqhe", pattern, v))
    kept[f"{at}.attn.hook_result"] = torch.einsum("bnhe,whe->bnhw", z, weights.unflatten(1, (heads, -1))) * rows


def open_clip(dtype: torch.dtype, **changes: Any) -> Case:
    visual: Any = vision_tower(seed=3, dtype=dtype, **changes)
    parts: dict[str, nn.Module] = {"_patches": visual.conv1, "hook_ln_pre": visual.ln_pre, "_pre<": visual.ln_pre}
    if not visual.final_ln_after_pool:
        parts |= {"ln_final.hook_normalized": visual.ln_post, "_last<": visual.ln_post}
    for layer, block in enumerate(visual.transformer.resblocks):
        at = f"blocks.{layer}"
        parts |= {
            f"{at}.hook_resid_pre<": block,
            f"{at}.ln1.hook_normalized": block.ln_1,
            f"{at}.hook_attn_out": block.ls_1,
            f"{at}.hook_resid_mid<": block.ln_2,
            f"{at}.ln2.hook_normalized": block.ln_2,
            f"{at}.mlp.hook_pre": block.mlp.c_fc,
            f"{at}.mlp.hook_post": block.mlp.gelu,
            f"{at}.hook_mlp_out": block.ls_2,
            f"{at}.hook_resid_post": block,
        }

    def derive(kept: dict[str, Tensor]) -> None:
        patches = kept["_patches"].flatten(2).transpose(1, 2)
        first = visual.class_embedding.expand(len(patches), 1, -1)
        kept["hook_embed"] = torch.cat([first, patches], 1)
        kept["hook_pos_embed"] = visual.positional_embedding.expand(len(patches), -1, -1)
        kept["hook_full_embed"] = kept["_pre"]
        kept["ln_pre.hook_normalized"] = kept["hook_ln_pre"]
        kept["ln_pre.hook_scale"] = scale(kept["_pre"], visual.ln_pre.eps)
        if "_last" in kept:
            kept["ln_final.hook_scale"] = scale(kept["_last"], visual.ln_post.eps)
        else:
            last = kept[f"blocks.{len(visual.transformer.resblocks) - 1}.hook_resid_post"][:, 1:].mean(1, keepdim=True)
            kept["ln_final.hook_scale"] = scale(last, visual.ln_post.eps)
            kept["ln_final.hook_normalized"] = visual.ln_post(last)
        for layer, block in enumerate(visual.transformer.resblocks):
            at, attn = f"blocks.{layer}", block.attn
            kept[f"{at}.ln1.hook_scale"] = scale(kept[f"{at}.hook_resid_pre"], block.ln_1.eps)
            kept[f"{at}.ln2.hook_scale"] = scale(kept[f"{at}.hook_resid_mid"], block.ln_2.eps)
            normed = kept[f"{at}.ln1.hook_normalized"]
            qkv = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
            for index, name in enumerate("qkv"):
                kept[f"{at}.attn.hook_{name}"] = qkv[:, :, index]
            _, pattern = attn(normed, normed, normed, need_weights=True, average_attn_weights=False)
            rows = getattr(block.ls_1, "gamma", 1.0)
            attention_names(kept, at, attn.out_proj.weight, attn.num_heads, pattern, rows)

    return Case(visual, visual, parts, 2, derive)


def huggingface(dtype: torch.dtype) -> Case:
    """CLIP of transformers, whose queries, keys and values are outputs of its own modules.

    So are its attention weights in float32; its own softmax is in float32 always, too coarse for float64.
    """
    eager = dtype == torch.float32
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
        intermediate_size=64,
        projection_dim=20,
        attn_implementation="eager" if eager else "sdpa",
    )
    model: Any = randomise(transformers.CLIPVisionModelWithProjection(config), 3).to(dtype).eval()
    vision = model.vision_model
    parts: dict[str, nn.Module] = {
        "hook_full_embed": vision.embeddings,
        "hook_ln_pre": vision.pre_layrnorm,
        "_patches": vision.embeddings.patch_embedding,
    }
    for layer, block in enumerate(vision.encoder.layers):
        at, attn = f"blocks.{layer}", block.self_attn
        parts |= {
            f"{at}.hook_resid_pre<": block,
            f"{at}.ln1.hook_normalized": block.layer_norm1,
            f"{at}.attn.hook_q": attn.q_proj,
            f"{at}.attn.hook_k": attn.k_proj,
            f"{at}.attn.hook_v": attn.v_proj,
            f"{at}.attn.hook_z<": attn.out_proj,
            f"{at}.hook_attn_out": attn.out_proj,
            f"{at}.hook_resid_mid<": block.layer_norm2,
            f"{at}.ln2.hook_normalized": block.layer_norm2,
            f"{at}.mlp.hook_pre": block.mlp.fc1,
            f"{at}.mlp.hook_post": block.mlp.activation_fn,
            f"{at}.hook_mlp_out": block.mlp,
            f"{at}.hook_resid_post": block,
        }
    patterns: list[Tensor | None] = []

    def run(images: Tensor) -> Tensor:
        out = model(images, output_attentions=eager)
        patterns[:] = out.attentions or [None] * 3
        return out.image_embeds

    def derive(kept: dict[str, Tensor]) -> None:
        patches = kept["_patches"].flatten(2).transpose(1, 2)
        first = vision.embeddings.class_embedding.expand(len(patches), 1, -1)
        kept["hook_embed"] = torch.cat([first, patches], 1)
        kept["hook_pos_embed"] = vision.embeddings.position_embedding.weight.expand(len(patches), -1, -1)
        kept["ln_pre.hook_normalized"] = kept["hook_ln_pre"]
        kept["ln_pre.hook_scale"] = scale(kept["hook_full_embed"], config.layer_norm_eps)
        last = kept["blocks.2.hook_resid_post"]
        kept["ln_final.hook_scale"] = scale(last, config.layer_norm_eps)
        kept["ln_final.hook_normalized"] = vision.post_layernorm(last)
        for layer, block in enumerate(vision.encoder.layers):
            at = f"blocks.{layer}"
            for name in "qkvz":
                kept[f"{at}.attn.hook_{name}"] = kept[f"{at}.attn.hook_{name}"].unflatten(-1, (2, -1))
            kept[f"{at}.ln1.hook_scale"] = scale(kept[f"{at}.hook_resid_pre"], config.layer_norm_eps)
            kept[f"{at}.ln2.hook_scale"] = scale(kept[f"{at}.hook_resid_mid"], config.layer_norm_eps)
            attention_names(kept, at, block.self_attn.out_proj.weight, 2, patterns[layer])

    return Case(model, run, parts, 2, derive)


TIMM = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def siglip(dtype: torch.dtype) -> Case:
    """SigLIP as timm has it: no class token, no norm before the blocks, an attention pool; layer scale besides."""
    model: Any = timm.models.vision_transformer.VisionTransformer(
        **TIMM, num_classes=0, global_pool="map", class_token=False, init_values=0.5
    )
    randomise(model, 3).to(dtype).eval()
    parts: dict[str, nn.Module] = {
        "hook_embed": model.patch_embed,
        "hook_full_embed": model.pos_drop,
        "ln_final.hook_normalized": model.norm,
        "_last<": model.norm,
    }
    for layer, block in enumerate(model.blocks):
        block.attn.fused_attn = False  # so that attention weights pass through a module
        at = f"blocks.{layer}"
        parts |= {
            f"{at}.hook_resid_pre<": block,
            f"{at}.ln1.hook_normalized": block.norm1,
            f"_{at}.qkv": block.attn.qkv,
            f"_{at}.pattern": block.attn.attn_drop,
            f"{at}.attn.hook_z<": block.attn.proj,
            f"{at}.hook_attn_out": block.ls1,
            f"{at}.hook_resid_mid<": block.norm2,
            f"{at}.ln2.hook_normalized": block.norm2,
            f"{at}.mlp.hook_pre": block.mlp.fc1,
            f"{at}.mlp.hook_post": block.mlp.act,
            f"{at}.hook_mlp_out": block.ls2,
            f"{at}.hook_resid_post": block,
        }

    def derive(kept: dict[str, Tensor]) -> None:
        kept["hook_pos_embed"] = model.pos_embed.expand(len(kept["hook_embed"]), -1, -1)
        kept["ln_final.hook_scale"] = scale(kept["_last"], model.norm.eps)
        for layer, block in enumerate(model.blocks):
            at = f"blocks.{layer}"
            qkv = kept[f"_{at}.qkv"].unflatten(-1, (3, 2, -1))
            for index, name in enumerate("qkv"):
                kept[f"{at}.attn.hook_{name}"] = qkv[:, :, index]
            kept[f"{at}.attn.hook_z"] = kept[f"{at}.attn.hook_z"].unflatten(-1, (2, -1))
            kept[f"{at}.ln1.hook_scale"] = scale(kept[f"{at}.hook_resid_pre"], block.norm1.eps)
            kept[f"{at}.ln2.hook_scale"] = scale(kept[f"{at}.hook_resid_mid"], block.norm2.eps)
            attention_names(kept, at, block.attn.proj.weight, 2, kept[f"_{at}.pattern"], block.ls1.gamma)

    return Case(model, model, parts, 2, derive)


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "open_clip, gelu": lambda dtype: open_clip(dtype, image_size=(24, 16)),
    "open_clip, quick_gelu": lambda dtype: open_clip(dtype, act_layer=QuickGELU),
    "open_clip, layer scale": lambda dtype: open_clip(dtype, ls_init_value=0.5),
    "open_clip, mean": lambda dtype: open_clip(dtype, pool_type="avg", final_ln_after_pool=True),
    "transformers": huggingface,
    "timm, SigLIP": siglip,
}
