"""open_clip's vision towers as models of other packages, with the same weights.

open_clip packs query, key and value into one matrix and multiplies by the projection from the right. Tensors are shared
where the other layout is a view.
"""

from typing import Any

import torch
from torch import Tensor, nn

import clipfast
from benchmarks.peers.question import NotPossible

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
"""clipfast's names → those of transformers."""


def to_transformers(visual: nn.Module, attention: str = "sdpa") -> Any:
    """A ``CLIPVisionModelWithProjection``.

    Args:
        visual: open_clip's vision tower with a class token and a norm before the blocks.
        attention: implementation: ``"eager"`` returns weights, ``"sdpa"`` is faster.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = clipfast.wrap(visual).tower
    block = tower.blocks[0]
    if tower.pooling != "cls" or block.ln_1 is None or getattr(visual, "ln_pre", None) is None:
        raise NotPossible("transformers' CLIP has a class token and a norm before the blocks, this model has not")
    config = CLIPVisionConfig(
        hidden_size=tower.width,
        intermediate_size=block.mlp_in_weight.shape[0],
        projection_dim=tower.embed_dim,
        num_hidden_layers=tower.layers,
        num_attention_heads=tower.heads,
        image_size=tower.image_size[0],
        patch_size=tower.image_size[0] // tower.grid[0],
        hidden_act=ACTIVATIONS[tower.activation],
        layer_norm_eps=block.ln_1.eps,
    )
    config._attn_implementation = attention
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    model.load_state_dict(transformers_state(visual.state_dict()), assign=True)
    embeddings = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(tower.tokens)[None]  # a buffer that no state has
    return model.eval()


def transformers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of open_clip's tower by the names of transformers."""
    converted = {
        "vision_model.embeddings.class_embedding": state["class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "visual_projection.weight": state["proj"].T,
    }
    parts = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}  # as transformers spells it
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    inner["attn.out_proj"] = "self_attn.out_proj"
    for kind in ("weight", "bias"):
        converted |= {f"vision_model.{new}.{kind}": state[f"{old}.{kind}"] for old, new in parts.items()}
        layer = 0
        while f"transformer.resblocks.{layer}.attn.in_proj_weight" in state:
            old, new = f"transformer.resblocks.{layer}", f"vision_model.encoder.layers.{layer}"
            converted |= {f"{new}.{name}.{kind}": state[f"{old}.{own}.{kind}"] for own, name in inner.items()}
            packed = state[f"{old}.attn.in_proj_{kind}"].chunk(3)
            names = ("q_proj", "k_proj", "v_proj")
            converted |= {f"{new}.self_attn.{name}.{kind}": part for name, part in zip(names, packed, strict=True)}
            layer += 1
    return converted


def to_prisma(visual: nn.Module) -> Any:
    """A ``HookedViT`` of ViT-Prisma, by its own conversion from transformers."""
    from vit_prisma.configs.HookedViTConfig import HookedViTConfig
    from vit_prisma.models.base_vit import HookedViT
    from vit_prisma.prisma_tools.loading_from_pretrained import convert_clip_weights

    source = to_transformers(visual)
    config = source.config
    if config.hidden_act != "gelu":
        raise NotPossible(f"ViT-Prisma has no activation {config.hidden_act}")
    prisma = HookedViTConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_head=config.hidden_size // config.num_attention_heads,
        d_mlp=config.intermediate_size,
        n_heads=config.num_attention_heads,
        activation_name="gelu",
        eps=config.layer_norm_eps,
        patch_size=config.patch_size,
        image_size=config.image_size,
        n_classes=config.projection_dim,
        layer_norm_pre=True,
        return_type="class_logits",  # which is the projection
        use_wandb=False,
    )
    model = HookedViT(prisma)
    model.load_state_dict(
        convert_clip_weights(source.vision_model.state_dict(), source.visual_projection.state_dict(), prisma)
    )
    return model.eval()
