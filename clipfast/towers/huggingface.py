"""Vision towers of Hugging Face's transformers as plain tensors.

Two layouts of modules are read: that of CLIP (CLIP, MetaCLIP 2, AltCLIP, Chinese CLIP) and that of ViT (DINOv2, ViT).
A model is taken as it is, whole or its vision part alone. What cannot be decomposed exactly is refused with every
reason at once. Embeddings are those of ``get_image_features``; of a vision model without a projection they are the
final LayerNorm of the class token.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from clipfast.errors import InputError, UnsupportedTower
from clipfast.towers.patches import CHANGED, drops_now, patches, replacement, sentence
from clipfast.towers.tower import Activation, Block, LayerNorm, Linear, Tower
from clipfast.towers.wrappers import unwrap

logger = logging.getLogger("clipfast")

CLIP_LIKE = (
    *(f"{family}{kind}" for family in ("CLIP", "MetaClip2") for kind in ("VisionModel", "VisionModelWithProjection")),
    *(f"{family}{kind}" for family in ("AltCLIP", "ChineseCLIP") for kind in ("VisionModel",)),
    *("CLIPModel", "MetaClip2Model", "AltCLIPModel", "ChineseCLIPModel"),
    "CLIPVisionTransformer",  # before transformers 5
)
VIT_LIKE = ("Dinov2Model", "Dinov2WithRegistersModel", "ViTModel")
"""Classes that are read, by layout."""

REFUSALS: dict[str, str] = {
    "class": "not one of the classes that are read",
    "activation": "an activation other than GELU and QuickGELU",
    "gated": "a gated MLP",
} | CHANGED
"""Why a tower is refused, by a short key."""

Reasons = dict[str, list[str]]  # key of REFUSALS → places


def _name(module: nn.Module) -> str:
    """The name of a module's class in transformers; of a user's subclass, that of the class it inherits from."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.")), "")


def _vision(module: nn.Module) -> nn.Module:
    """The vision transformer inside a model."""
    inner = unwrap(module)
    while isinstance(getattr(inner, "vision_model", None), nn.Module):
        inner = unwrap(cast(nn.Module, inner.vision_model))
    return inner


def vision_module(module: nn.Module) -> nn.Module:
    """The vision transformer and, where there is one, the projection after it."""
    inner = unwrap(module)
    projection = getattr(inner, "visual_projection", None)
    vision = _vision(inner)
    if not isinstance(projection, nn.Module):
        return vision
    kept = _VISION_PARTS.get(inner)
    if kept is None or [*kept.children()] != [vision, projection]:
        kept = nn.ModuleDict({"vision_model": vision, "visual_projection": projection})
        _VISION_PARTS[inner] = kept
    kept.training = vision.training  # of this dictionary alone: train() would reach into the model
    return kept


_VISION_PARTS: WeakKeyDictionary[nn.Module, nn.ModuleDict] = WeakKeyDictionary()


def read(module: nn.Module, *, ignore_hooks: bool = False) -> Tower:
    """Reads a model of transformers, or its vision part, into a :class:`Tower` that shares its parameters.

    Args:
        module: the model.
        ignore_hooks: accept forward hooks.

    Raises:
        UnsupportedTower: with every reason.
    """
    reasons = [text for _, text in refusals(module, ignore_hooks=ignore_hooks)]
    if reasons:
        raise UnsupportedTower(type(unwrap(module)).__name__, reasons)
    vision = cast(Any, _vision(module))
    projection = getattr(unwrap(module), "visual_projection", None)
    parts = _Parts(vision)
    return Tower(
        patch_weight=parts.patches.weight,
        patch_bias=parts.patches.bias,
        class_embedding=parts.class_embedding,
        registers=parts.registers,
        positional_embedding=parts.positions,
        ln_pre=None if parts.ln_pre is None else _norm(parts.ln_pre),
        blocks=tuple(_Layer(layer).block() for layer in parts.layers),
        ln_post=_norm(parts.ln_post),
        projection=None if projection is None else projection.weight.T,
        heads=_Layer(parts.layers[0]).heads,
        activation=cast(Activation, _activation(_Layer(parts.layers[0]).activation)),
        pooling="cls",
        image_size=_pair(parts.image_size),
        patch_size=_pair(parts.patches.kernel_size),
    )


class _Parts:
    """The parts of a vision transformer, under one name for both layouts."""

    def __init__(self, vision: Any) -> None:
        embeddings, encoder = vision.embeddings, vision.encoder if hasattr(vision, "encoder") else vision
        self.layers = list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)
        self.is_clip = hasattr(embeddings, "class_embedding")
        if self.is_clip:
            self.patches = embeddings.patch_embedding
            self.class_embedding = embeddings.class_embedding
            self.positions = embeddings.position_embedding.weight
            self.image_size = embeddings.image_size
            self.registers = None
            self.ln_pre, self.ln_post = vision.pre_layrnorm, vision.post_layernorm
        else:
            self.patches = embeddings.patch_embeddings.projection
            self.class_embedding = embeddings.cls_token[0, 0]
            registers = getattr(embeddings, "register_tokens", None)
            self.registers = None if registers is None or not registers.shape[1] else registers[0]
            self.positions = embeddings.position_embeddings[0]
            self.image_size = embeddings.patch_embeddings.image_size
            self.ln_pre, self.ln_post = None, vision.layernorm
        self.start = vision.pre_layrnorm if self.is_clip else embeddings


class _Layer:
    """The parts of one layer, under one name for both layouts and all versions of transformers since 4.57."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attention
        inner = getattr(attention, "attention", attention)  # before transformers 5
        self.query, self.key, self.value = (
            getattr(inner, short, None) or getattr(inner, long) for short, long in _PROJECTIONS
        )
        self.out = _first(attention, "out_proj", "o_proj") or attention.output.dense
        self.heads = int(_first(inner, "num_heads", "num_attention_heads"))
        self.ln_1 = _first(layer, "layer_norm1", "norm1", "layernorm_before")
        self.ln_2 = _first(layer, "layer_norm2", "norm2", "layernorm_after")
        mlp: Any = getattr(layer, "mlp", None)
        self.mlp_in: Any = (
            mlp.fc1 if hasattr(mlp, "fc1") else getattr(getattr(layer, "intermediate", None), "dense", None)
        )
        self.mlp_out: Any = mlp.fc2 if hasattr(mlp, "fc2") else getattr(getattr(layer, "output", None), "dense", None)
        of = mlp if mlp is not None else layer.intermediate
        self.activation = _first(of, "activation_fn", "activation", "intermediate_act_fn")
        self.scales = tuple(getattr(getattr(layer, f"layer_scale{i}", None), "lambda1", None) for i in (1, 2))

    def linears(self) -> dict[str, Any]:
        """The layers that multiply, by name."""
        names = ("query", "key", "value", "out", "mlp_in", "mlp_out")
        return {name: getattr(self, name) for name in names}

    def block(self) -> Block:
        """The same as plain tensors."""
        projections = (self.query, self.key, self.value)
        query, key, value = (Linear(each.weight, each.bias) for each in projections)
        return Block(
            ln_1=_norm(self.ln_1),
            in_weight=(query.weight, key.weight, value.weight),
            in_bias=(query.bias, key.bias, value.bias),
            out_weight=self.out.weight,
            out_bias=self.out.bias,
            attention_scale=self.scales[0],
            ln_2=_norm(self.ln_2),
            mlp_in_weight=self.mlp_in.weight,
            mlp_in_bias=self.mlp_in.bias,
            mlp_out_weight=self.mlp_out.weight,
            mlp_out_bias=self.mlp_out.bias,
            mlp_scale=self.scales[1],
        )


_PROJECTIONS = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))


def _first(module: Any, *names: str) -> Any:
    """The first of these attributes that there is, None for none."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _norm(module: Any) -> LayerNorm:
    return LayerNorm(module.weight, module.bias, module.eps)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _activation(module: object) -> str | None:
    from transformers import activations

    if type(module) is activations.QuickGELUActivation:
        return "quick_gelu"
    if type(module) is activations.GELUActivation:
        return "gelu" if getattr(module, "act", None) is nn.functional.gelu else None
    if type(module) is activations.GELUTanh or module is nn.functional.gelu:
        return "gelu_tanh" if module is not nn.functional.gelu else "gelu"
    return None


# ------------------------------------------------------------------------------------------------------- refusals


def refusals(module: nn.Module, *, ignore_hooks: bool = False) -> list[tuple[str, str]]:
    """Every reason why a model cannot be decomposed, as (key of :data:`REFUSALS`, sentence)."""
    inner = unwrap(module)
    if _name(inner) not in (*CLIP_LIKE, *VIT_LIKE):
        return [("class", f"{REFUSALS['class']} ({', '.join((*CLIP_LIKE, *VIT_LIKE))}) but {type(inner).__name__}")]
    vision = _vision(inner)
    reasons: Reasons = {}
    if drops_now(vision):
        reasons["training"] = []
    for key, place in _replaced(inner, vision):
        reasons.setdefault(key, []).append(place)
    for patch in patches(vision_module(inner), ignore_hooks=ignore_hooks):
        reasons.setdefault(patch.reason, []).append(patch.place)
    return [(key, sentence(REFUSALS[key], places)) for key, places in reasons.items()]


def _replaced(model: nn.Module, vision: nn.Module) -> Iterator[tuple[str, str]]:
    """Layers that are not those of the class, with their places."""
    home = next(kind.__module__ for kind in type(vision).__mro__ if kind.__module__.startswith("transformers."))
    for path, part in vision.named_modules():
        is_own = type(part).__module__ in (home, "transformers.activations")
        if not is_own and part is not vision and type(part) not in _TORCH:
            yield replacement(part), f"{path}: {type(part).__name__}"
    projection = getattr(model, "visual_projection", None)
    if projection is not None and type(projection) is not nn.Linear:
        yield replacement(projection), f"visual_projection: {type(projection).__name__}"
    parts = _Parts(vision)
    settings = set()
    for index, layer in enumerate(parts.layers):
        place = f"layer {index}"
        own = _Layer(layer)
        if own.mlp_in is None or own.mlp_out is None:
            yield "gated", place
            continue
        for name, linear in own.linears().items():
            if type(linear) is not nn.Linear:
                yield replacement(linear), f"{place}, {name}: {type(linear).__name__}"
            elif linear.bias is None and name not in ("query", "key", "value"):
                yield "replaced", f"{place}, {name}: no bias"
        activation = _activation(own.activation)
        if activation is None:
            yield "activation", f"{place}: {type(own.activation).__name__}"
        settings.add((own.heads, activation))
    if len(settings) > 1:
        yield "replaced", "layers with different heads or activations"


_TORCH = (
    *(nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.Dropout, nn.Identity, nn.ModuleList),
    *(nn.GELU, nn.Tanh),
)


# ---------------------------------------------------------------------------------------------- the module's own


def encode_image(module: nn.Module, images: Tensor) -> Tensor:
    """The module's own image embeddings, ``[B, 3, height, width] → [B, D]``."""
    inner = cast(Any, unwrap(module))
    if hasattr(inner, "get_image_features"):
        out = inner.get_image_features(pixel_values=images)
        return cast(Tensor, out if isinstance(out, Tensor) else out.pooler_output)
    out = cast(Any, module)(pixel_values=images)
    if hasattr(out, "image_embeds"):
        return cast(Tensor, out.image_embeds)
    if _name(inner) in VIT_LIKE:
        return cast(Tensor, out.last_hidden_state[:, 0])  # ViT's pooler has a tanh after it
    return cast(Tensor, out.pooler_output)


@torch.no_grad()
def own_forward(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The module's own image embeddings, and its residual stream as its forward passes.

    Args:
        module: the model.
        images: ``[B, 3, height, width]``.

    Returns:
        ``[B, D]``, and the stream before the first layer and after each, ``[B, N, W]``; None for what did not run.
    """
    parts = _Parts(_vision(module))
    recorded = [parts.start, *parts.layers]
    stream: list[Tensor | None] = [None] * len(recorded)

    def hook(index: int) -> Callable[[nn.Module, object, Any], None]:
        def record(_module: nn.Module, _inputs: object, output: Any) -> None:
            stream[index] = (output[0] if isinstance(output, tuple) else output).clone()

        return record

    handles = [part.register_forward_hook(hook(index)) for index, part in enumerate(recorded)]
    try:
        with torch.autocast(images.device.type, enabled=False):
            embedding = encode_image(module, images)
    finally:
        for handle in handles:
            handle.remove()
    return embedding, stream


# ----------------------------------------------------------------------------------------------- text and pixels


def has_text_encoder(module: nn.Module) -> bool:
    """Whether a module is a whole model, not its vision part alone."""
    return hasattr(unwrap(module), "get_text_features")


def encode_text(module: nn.Module, tokens: object, device: torch.device) -> Tensor:
    """Text features ``[T, D]`` of tokens ``[T, context]``, not normalised.

    Raises:
        InputError: tokens that the text encoder cannot read.
    """
    inner = cast(Any, unwrap(module))
    config = inner.config.text_config
    if not isinstance(tokens, Tensor):
        raise InputError(
            f"the tokenizer gives {type(tokens).__name__}: expected integers [texts, context] as one tensor"
        )
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise InputError(f"the tokenizer gives {tokens.dtype} {list(tokens.shape)}: expected integers [texts, context]")
    tokens = tokens.to(device)
    if tokens.shape[1] > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise InputError(f"the tokenizer gives {tokens.shape[1]} tokens, the model reads {limit}: use the model's own")
    padding = getattr(config, "pad_token_id", None)
    is_causal = _name(inner) in ("CLIPModel", "MetaClip2Model")  # there padding comes after what is read
    mask = None if is_causal or padding is None else (tokens != padding).long()
    out = inner.get_text_features(input_ids=tokens, attention_mask=mask)
    return cast(Tensor, out if isinstance(out, Tensor) else out.pooler_output)


def default_tokenizer(module: nn.Module) -> Callable[[Sequence[str]], Tensor] | None:
    """None: a module does not say which tokenizer is its own."""
    return None


def default_preprocess(module: nn.Module) -> Callable[[Image.Image], Tensor]:
    """CLIP's, or ImageNet's for the ViT layout, at the tower's image size."""
    from transformers import CLIPImageProcessor

    vision = _vision(module)
    parts = _Parts(vision)
    size = _pair(parts.image_size)
    if size[0] != size[1]:
        raise InputError(f"no preprocessing is known for images of {size[0]} × {size[1]} pixels: pass tensors")
    options: dict[str, Any] = {"size": {"shortest_edge": size[0]}, "crop_size": {"height": size[0], "width": size[1]}}
    if not parts.is_clip:
        options |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return Preprocess(CLIPImageProcessor(**options))


class Preprocess:
    """An image processor of transformers as a function of one image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image → ``[3, height, width]``."""
        return cast(Tensor, self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0])
