"""Small random models of Hugging Face's transformers, one per class that is read."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _whole(family: str, text: dict[str, Any] | None = None, **vision: Any) -> nn.Module:
    config = getattr(transformers, f"{family}Config")
    settings = {"vision_config": VISION | vision, "text_config": TEXT | (text or {}), "projection_dim": 20}
    model: nn.Module = getattr(transformers, f"{family}Model")(config(**settings))
    return model


def _vision(family: str, kind: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{family}VisionConfig")(**VISION, projection_dim=20, **changes)
    model: nn.Module = getattr(transformers, f"{family}{kind}")(config)
    return model


def _siglip(family: str, kind: str, **changes: Any) -> nn.Module:
    """SigLIP has one size for both encoders' features; SigLIP 2 (NaFlex) counts patches instead of pixels."""
    vision = VISION | changes
    if family == "Siglip2":
        vision["num_patches"] = (vision.pop("image_size") // vision["patch_size"]) ** 2
    if kind == "VisionModel":
        config = getattr(transformers, f"{family}VisionConfig")(**vision)
    else:
        text = TEXT | {"hidden_size": 32, "projection_size": 32}
        config = getattr(transformers, f"{family}Config")(vision_config=vision, text_config=text)
    model: nn.Module = getattr(transformers, f"{family}{kind}")(config)
    return model


def _vit(family: str, **changes: Any) -> nn.Module:
    vision = {name: value for name, value in VISION.items() if "Dinov2" not in family or name != "intermediate_size"}
    model: nn.Module = getattr(transformers, f"{family}Model")(
        getattr(transformers, f"{family}Config")(**vision, **changes)
    )
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "CLIPModel": lambda: _whole("CLIP"),
    "CLIPModel, gelu": lambda: _whole("CLIP", hidden_act="gelu"),
    "CLIPVisionModel": lambda: _vision("CLIP", "VisionModel"),
    "CLIPVisionModelWithProjection": lambda: _vision("CLIP", "VisionModelWithProjection"),
    "MetaClip2Model": lambda: _whole("MetaClip2"),
    "MetaClip2VisionModel": lambda: _vision("MetaClip2", "VisionModel"),
    "MetaClip2VisionModelWithProjection": lambda: _vision("MetaClip2", "VisionModelWithProjection"),
    "AltCLIPModel": lambda: _whole("AltCLIP", {"project_dim": 20}),
    "AltCLIPVisionModel": lambda: _vision("AltCLIP", "VisionModel"),
    "ChineseCLIPModel": lambda: _whole("ChineseCLIP"),
    "ChineseCLIPVisionModel": lambda: _vision("ChineseCLIP", "VisionModel"),
    "Dinov2Model": lambda: _vit("Dinov2"),
    "Dinov2Model, no biases": lambda: _vit("Dinov2", qkv_bias=False),
    "Dinov2WithRegistersModel": lambda: _vit("Dinov2WithRegisters", num_register_tokens=4),
    "Dinov2Model, SwiGLU": lambda: _vit("Dinov2", use_swiglu_ffn=True),
    "Dinov2WithRegistersModel, SwiGLU": lambda: _vit("Dinov2WithRegisters", use_swiglu_ffn=True),
    "DINOv3ViTModel": lambda: _vit("DINOv3ViT", num_register_tokens=4),
    "DINOv3ViTModel, gated": lambda: _vit("DINOv3ViT", use_gated_mlp=True, hidden_act="silu", mlp_bias=False),
    "DINOv3ViTModel, no biases": lambda: _vit(
        "DINOv3ViT", query_bias=False, value_bias=False, proj_bias=False, mlp_bias=False, num_register_tokens=2
    ),
    "ViTModel": lambda: _vit("ViT"),
    "ViTModel, other flags": lambda: _vit("ViT", qkv_bias=False, hidden_act="gelu_new", pooler_act="relu"),
    "DeiTModel": lambda: _vit("DeiT"),
    "ViTMSNModel": lambda: _vit("ViTMSN"),
    "IJepaModel": lambda: _vit("IJepa"),
    "SiglipModel": lambda: _siglip("Siglip", "Model", hidden_act="gelu_pytorch_tanh"),
    "SiglipModel, no head": lambda: _siglip("Siglip", "Model", vision_use_head=False),
    "SiglipVisionModel": lambda: _siglip("Siglip", "VisionModel"),
    "Siglip2Model": lambda: _siglip("Siglip2", "Model"),
    "Siglip2VisionModel": lambda: _siglip("Siglip2", "VisionModel"),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model of :data:`MODELS`, random, in eval mode: no bias is 0, no scale is 1."""
    return randomised(MODELS[name](), seed).to(dtype).eval()


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter random values: no bias is 0, no scale is 1."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if parameter.ndim:
            is_scale = parameter.ndim == 1 and ("norm" in path or "lambda" in path) and not path.endswith("bias")
            parameter.normal_(float(is_scale), 0.2, generator=generator)
    return model


def pixels(count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images of the models' size."""
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
