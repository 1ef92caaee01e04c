"""The flags of public models on the Hugging Face hub, as numbers, and small models that have them.

A line is one model's ``config.json``: width, hidden width of its MLPs, heads, image size, patch size, and what differs
from the family's other models. Depth is not listed. A small model has two layers of two heads: the head_dim, the ratio
of the MLP and the remainder of image size over patch size stay what they are.
"""

from typing import Any

import transformers
from torch import nn

CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
GELU = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
DINOV2 = {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True, "layerscale_value": 1.0, "mlp_ratio": 4}
SWIGLU = DINOV2 | {"use_swiglu_ffn": True}
REGISTERS = DINOV2 | {"num_register_tokens": 4}
DINOV3 = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "layerscale_value": 1.0,
    "rope_theta": 100.0,
    "query_bias": True,
    "key_bias": False,
    "value_bias": True,
    "proj_bias": True,
    "mlp_bias": True,
    "num_register_tokens": 4,
    "pos_embed_rescale": 2.0,
    "use_gated_mlp": False,
}
GATED = DINOV3 | {"hidden_act": "silu", "use_gated_mlp": True}
VIT = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True}
MSN = VIT | {"layer_norm_eps": 1e-6}

Numbers = tuple[int, int, int, int, int]  # width, hidden, heads, image size, patch size

CONFIGS: dict[str, tuple[str, Numbers, dict[str, Any]]] = {
    "openai/clip-vit-base-patch32": ("CLIPModel", (768, 3072, 12, 224, 32), CLIP),
    "openai/clip-vit-base-patch16": ("CLIPModel", (768, 3072, 12, 224, 16), CLIP),
    "openai/clip-vit-large-patch14": ("CLIPModel", (1024, 4096, 16, 224, 14), CLIP),
    "openai/clip-vit-large-patch14-336": ("CLIPModel", (1024, 4096, 16, 336, 14), CLIP),
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": ("CLIPModel", (768, 3072, 12, 224, 32), GELU),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": ("CLIPModel", (1024, 4096, 16, 224, 14), GELU),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("CLIPModel", (1280, 5120, 16, 224, 14), GELU),
    "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": ("CLIPModel", (1408, 6144, 16, 224, 14), GELU),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ("CLIPModel", (1664, 8192, 16, 224, 14), GELU),
    "facebook/metaclip-b32-400m": ("CLIPModel", (768, 3072, 12, 224, 32), CLIP),
    "facebook/metaclip-l14-fullcc2.5b": ("CLIPModel", (1024, 4096, 16, 224, 14), CLIP),
    "facebook/metaclip-h14-fullcc2.5b": ("CLIPModel", (1280, 5120, 16, 224, 14), CLIP),
    "facebook/metaclip-2-worldwide-huge-quickgelu": ("MetaClip2Model", (1280, 5120, 16, 224, 14), CLIP),
    "facebook/metaclip-2-worldwide-huge-378": ("MetaClip2Model", (1280, 5120, 16, 378, 14), GELU),
    "facebook/metaclip-2-worldwide-giant": ("MetaClip2Model", (1664, 8192, 16, 224, 14), GELU),
    "facebook/metaclip-2-worldwide-giant-378": ("MetaClip2Model", (1664, 8192, 16, 378, 14), GELU),
    "BAAI/AltCLIP": ("AltCLIPModel", (1024, 4096, 16, 224, 14), CLIP),
    "OFA-Sys/chinese-clip-vit-base-patch16": ("ChineseCLIPModel", (768, 3072, 12, 224, 16), CLIP),
    "OFA-Sys/chinese-clip-vit-large-patch14": ("ChineseCLIPModel", (1024, 4096, 16, 224, 14), CLIP),
    "OFA-Sys/chinese-clip-vit-large-patch14-336px": ("ChineseCLIPModel", (1024, 4096, 16, 336, 14), CLIP),
    "google/siglip-base-patch16-224": ("SiglipModel", (768, 3072, 12, 224, 16), SIGLIP),
    "google/siglip-base-patch16-384": ("SiglipModel", (768, 3072, 12, 384, 16), SIGLIP),
    "google/siglip-base-patch16-256-multilingual": ("SiglipModel", (768, 3072, 12, 256, 16), SIGLIP),
    "google/siglip-large-patch16-256": ("SiglipModel", (1024, 4096, 16, 256, 16), SIGLIP),
    "google/siglip-so400m-patch14-384": ("SiglipModel", (1152, 4304, 16, 384, 14), SIGLIP),
    "google/siglip-so400m-patch14-224": ("SiglipModel", (1152, 4304, 16, 224, 14), SIGLIP),
    "google/siglip2-base-patch16-224": ("SiglipModel", (768, 3072, 12, 224, 16), SIGLIP),
    "google/siglip2-base-patch32-256": ("SiglipModel", (768, 3072, 12, 256, 32), SIGLIP),
    "google/siglip2-large-patch16-384": ("SiglipModel", (1024, 4096, 16, 384, 16), SIGLIP),
    "google/siglip2-so400m-patch14-384": ("SiglipModel", (1152, 4304, 16, 384, 14), SIGLIP),
    "google/siglip2-so400m-patch16-512": ("SiglipModel", (1152, 4304, 16, 512, 16), SIGLIP),
    "google/siglip2-giant-opt-patch16-256": ("SiglipModel", (1536, 6144, 16, 256, 16), SIGLIP),
    "google/siglip2-base-patch16-naflex": ("Siglip2Model", (768, 3072, 12, 256, 16), SIGLIP),
    "google/siglip2-so400m-patch16-naflex": ("Siglip2Model", (1152, 4304, 16, 256, 16), SIGLIP),
    "facebook/dinov2-small": ("Dinov2Model", (384, 1536, 6, 518, 14), DINOV2),
    "facebook/dinov2-base": ("Dinov2Model", (768, 3072, 12, 518, 14), DINOV2),
    "facebook/dinov2-large": ("Dinov2Model", (1024, 4096, 16, 518, 14), DINOV2),
    "facebook/dinov2-giant": ("Dinov2Model", (1536, 4096, 24, 518, 14), SWIGLU),
    "microsoft/rad-dino": ("Dinov2Model", (768, 3072, 12, 518, 14), DINOV2),
    "facebook/dinov2-with-registers-small": ("Dinov2WithRegistersModel", (384, 1536, 6, 518, 14), REGISTERS),
    "facebook/dinov2-with-registers-base": ("Dinov2WithRegistersModel", (768, 3072, 12, 518, 14), REGISTERS),
    "facebook/dinov2-with-registers-large": ("Dinov2WithRegistersModel", (1024, 4096, 16, 518, 14), REGISTERS),
    "facebook/dinov2-with-registers-giant": (
        "Dinov2WithRegistersModel",
        (1536, 4096, 24, 518, 14),
        SWIGLU | {"num_register_tokens": 4},
    ),
    "facebook/dinov3-vits16-pretrain-lvd1689m": ("DINOv3ViTModel", (384, 1536, 6, 224, 16), DINOV3),
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": ("DINOv3ViTModel", (384, 1536, 6, 224, 16), GATED),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": ("DINOv3ViTModel", (768, 3072, 12, 224, 16), DINOV3),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": ("DINOv3ViTModel", (1024, 4096, 16, 224, 16), DINOV3),
    "facebook/dinov3-vith16plus-pretrain-lvd1689m": ("DINOv3ViTModel", (1280, 5120, 20, 224, 16), GATED),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": (
        "DINOv3ViTModel",
        (4096, 8192, 32, 224, 16),
        GATED | {"query_bias": False, "value_bias": False},
    ),
    "google/vit-base-patch16-224": ("ViTModel", (768, 3072, 12, 224, 16), VIT),
    "google/vit-base-patch16-384": ("ViTModel", (768, 3072, 12, 384, 16), VIT),
    "google/vit-base-patch32-384": ("ViTModel", (768, 3072, 12, 384, 32), VIT),
    "google/vit-large-patch16-224": ("ViTModel", (1024, 4096, 16, 224, 16), VIT),
    "google/vit-large-patch32-384": ("ViTModel", (1024, 4096, 16, 384, 32), VIT),
    "google/vit-huge-patch14-224-in21k": ("ViTModel", (1280, 5120, 16, 224, 14), VIT),
    "facebook/dino-vits16": ("ViTModel", (384, 1536, 6, 224, 16), VIT),
    "facebook/dino-vits8": ("ViTModel", (384, 1536, 6, 224, 8), VIT),
    "facebook/dino-vitb8": ("ViTModel", (768, 3072, 12, 224, 8), VIT),
    "WinKawaks/vit-tiny-patch16-224": ("ViTModel", (192, 768, 3, 224, 16), VIT),
    "facebook/deit-tiny-distilled-patch16-224": ("DeiTModel", (192, 768, 3, 224, 16), VIT),
    "facebook/deit-base-distilled-patch16-384": ("DeiTModel", (768, 3072, 12, 384, 16), VIT),
    "facebook/vit-msn-base": ("ViTMSNModel", (768, 3072, 12, 224, 16), MSN),
    "facebook/vit-msn-large-7": ("ViTMSNModel", (1024, 4096, 16, 224, 7), MSN),
    "facebook/ijepa_vith14_1k": ("IJepaModel", (1280, 5120, 16, 224, 14), MSN),
    "facebook/ijepa_vith16_1k": ("IJepaModel", (1280, 5120, 16, 448, 16), MSN),
    "facebook/ijepa_vitg16_22k": ("IJepaModel", (1408, 6144, 16, 224, 16), MSN),
}
"""Name on the hub → class, numbers, flags."""

LAYERS, HEADS, GRID = 2, 2, 3


def small(name: str) -> tuple[nn.Module, int]:
    """A model with the flags of a public one, with its image size; its parameters are as the class makes them."""
    kind, (width, hidden, heads, image_size, patch_size), flags = CONFIGS[name]
    narrow = HEADS * (width // heads)
    size = GRID * patch_size + image_size % patch_size
    settings = flags | {
        "hidden_size": narrow,
        "intermediate_size": hidden * narrow // width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": size,
        "patch_size": patch_size,
    }
    family = kind.removesuffix("Model")
    if family.startswith("Dinov2"):  # it takes a ratio, and three numbers for SwiGLU
        del settings["intermediate_size"]
    if family == "Siglip2":
        settings["num_patches"] = GRID**2
        del settings["image_size"]
    config = getattr(transformers, f"{family}Config")
    if "CLIP" in family or "Clip" in family:
        return getattr(transformers, kind)(config(vision_config=settings, text_config=_TEXT, projection_dim=20)), size
    if family.startswith("Siglip"):
        text = _TEXT | {"hidden_size": narrow, "projection_size": narrow}
        return getattr(transformers, kind)(config(vision_config=settings, text_config=text)), size
    return getattr(transformers, kind)(config(**settings)), size


_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "project_dim": 20,  # of AltCLIP
}
