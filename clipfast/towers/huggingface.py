"""Vision towers of Hugging Face's transformers as plain tensors.

Three layouts of modules are read: that of CLIP (CLIP, MetaCLIP 2, AltCLIP, Chinese CLIP), that of SigLIP (SigLIP and
SigLIP 2) and that of ViT (DINOv2, DINOv3, ViT, DeiT, ViT-MSN, I-JEPA). A model is taken as it is, whole or its vision
part alone. What cannot be decomposed exactly is refused with every reason at once.

Embeddings are those of ``get_image_features``. Of a vision model without a projection they are its pooled output before
any further layer: the final LayerNorm of the class token, or the output of SigLIP's attention pool. Where a model has
neither, as I-JEPA, they are the mean of ``last_hidden_state`` over its tokens.

SigLIP 2 (NaFlex) takes rows of patches, padded to one length, with a mask. Here all images of a call share one grid, so
there is no padding: pixels are ``[B, 3, height, width]`` as for all other models, whole patches high and wide, and the
module's own forward gets their patches with a mask of ones. What padding cannot influence is then not computed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from clipfast.errors import InputError, UnsupportedTower
from clipfast.towers import huggingface_processors as processors
from clipfast.towers.folding import folded
from clipfast.towers.huggingface_layouts import (
    CLASSES,
    SIGLIP_LIKE,
    VIT_LIKE,
    Layer,
    Parts,
    activation,
    norm,
)
from clipfast.towers.patches import CHANGED, drops_now, patches, replacement, sentence
from clipfast.towers.recording import record
from clipfast.towers.tower import Activation, Tower
from clipfast.towers.wrappers import unwrap

logger = logging.getLogger("clipfast")

REFUSALS: dict[str, str] = {
    "class": "not one of the classes that are read",
    "activation": "an activation other than GELU, QuickGELU and SiLU",
} | CHANGED
"""Why a tower is refused, by a short key."""

Reasons = dict[str, list[str]]  # key of REFUSALS → places


def _name(module: nn.Module) -> str:
    """The name of a module's class in transformers; of a user's subclass, that of the class it inherits from."""
    return next((kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("transformers.")), "")


def vision_transformer(module: nn.Module) -> nn.Module:
    """The vision transformer inside a model."""
    inner = unwrap(module)
    while isinstance(getattr(inner, "vision_model", None), nn.Module):
        inner = unwrap(cast(nn.Module, inner.vision_model))
    return inner


def vision_module(module: nn.Module) -> nn.Module:
    """The vision transformer and, where there is one, the projection after it."""
    inner = unwrap(module)
    projection = getattr(inner, "visual_projection", None)
    vision = vision_transformer(inner)
    if not isinstance(projection, nn.Module):
        return vision
    kept = _VISION_PARTS.get(inner)
    if kept is None or [*kept.children()] != [vision, projection]:
        kept = nn.ModuleDict({"vision_model": vision, "visual_projection": projection})
        _VISION_PARTS[inner] = kept
    kept.training = vision.training  # of this dictionary alone: train() would reach into the model
    return kept


_TEXT = ("text_model", "text_projection")
"""Parts of a model that no image reaches."""
_VISION_PARTS: WeakKeyDictionary[nn.Module, nn.ModuleDict] = WeakKeyDictionary()


@torch.no_grad()
def read(module: nn.Module, *, ignore_hooks: bool = False, image_size: tuple[int, int] | None = None) -> Tower:
    """Reads a model of transformers, or its vision part, into a :class:`Tower` that shares its parameters.

    Args:
        module: the model.
        ignore_hooks: accept forward hooks.
        image_size: height and width of the images; positions are interpolated as the module does it. None for the size
            that they are for.

    Raises:
        UnsupportedTower: with every reason.
        InputError: images smaller than a patch, or of SigLIP 2 (NaFlex) not divided into patches evenly.
    """
    reasons = [text for _, text in refusals(module, ignore_hooks=ignore_hooks)]
    if reasons:
        raise UnsupportedTower(type(unwrap(module)).__name__, reasons)
    plain, computed = folded(unwrap(module), _TEXT)
    projection = getattr(plain, "visual_projection", None)
    parts = Parts(vision_transformer(plain))
    size = parts.image_size if image_size is None else image_size
    layers = [Layer(layer) for layer in parts.layers]
    rotary, positions, pool = parts.rotary(size), parts.positions(size), parts.pool()
    tower = Tower(
        patch_weight=parts.patch_weight,
        patch_bias=parts.patches.bias,
        class_embedding=parts.class_embedding,
        registers=parts.registers,
        positional_embedding=positions,
        ln_pre=None if parts.ln_pre is None else norm(parts.ln_pre),
        blocks=tuple(layer.block(rotary) for layer in layers),
        ln_post=norm(parts.ln_post),
        projection=None if projection is None else projection.weight.T,
        heads=layers[0].heads,
        activation=cast(Activation, activation(layers[0].activation)),
        pooling=parts.pooling,
        image_size=size,
        patch_size=parts.patch_size,
        pool=pool,
        sources=(*parts.sources(positions), *computed),
    )
    return replace(tower, sources=_with_views(tower, parts.vision, projection))


def _with_views(tower: Tower, *modules: nn.Module | None) -> tuple[Tensor, ...]:
    """A tower's sources, and the parameters that it has views of: other memory of them is no change of a view."""
    listed = {id(tensor): tensor for tensor in tower.sources}
    shared = set(map(id, tower.tensors()))
    held = (parameter for module in modules if module is not None for parameter in module.parameters())
    return tuple((listed | {id(tensor): tensor for tensor in held if id(tensor) not in shared}).values())


# ------------------------------------------------------------------------------------------------------- refusals


def refusals(module: nn.Module, *, ignore_hooks: bool = False) -> list[tuple[str, str]]:
    """Every reason why a model cannot be decomposed, as (key of :data:`REFUSALS`, sentence)."""
    inner = unwrap(module)
    if _name(inner) not in CLASSES:
        return [("class", f"{REFUSALS['class']} ({', '.join(CLASSES)}) but {type(inner).__name__}")]
    vision = vision_transformer(inner)
    reasons: Reasons = {}
    if drops_now(vision):
        reasons["training"] = []
    plain = folded(inner, _TEXT).module
    for key, place in _replaced(plain, vision_transformer(plain)):
        reasons.setdefault(key, []).append(place)
    for patch in patches(vision_module(inner), ignore_hooks=ignore_hooks):
        reasons.setdefault(patch.reason, []).append(patch.place)
    return [(key, sentence(REFUSALS[key], places)) for key, places in reasons.items()]


def _replaced(model: nn.Module, vision: nn.Module) -> Iterator[tuple[str, str]]:
    """Layers that are not those of the class, with their places."""
    home = next(kind.__module__ for kind in type(vision).__mro__ if kind.__module__.startswith("transformers."))
    for path, part in vision.named_modules():
        is_own = type(part).__module__ in (home, "transformers.activations")
        is_read = part is not vision and not path.startswith("pooler.")  # ViT's pooler comes after the embedding
        if is_read and not is_own and type(part) not in _TORCH:
            yield replacement(part), f"{path}: {type(part).__name__}"
    projection = getattr(model, "visual_projection", None)
    if projection is not None and type(projection) is not nn.Linear:
        yield replacement(projection), f"visual_projection: {type(projection).__name__}"
    if (attention := _foreign_attention(vision)) is not None:
        yield "replaced", f"attention by {attention}"
    parts = Parts(vision)
    if parts.has_random_positions:
        yield "training", "rope_embeddings: random positions"
    for name, layer_norm in (("norm before the layers", parts.ln_pre), ("final norm", parts.ln_post)):
        yield from _replaced_norm(layer_norm, name)
    settings = set()
    for index, layer in enumerate(parts.layers):
        place = f"layer {index}"
        own = Layer(layer)
        for name, linear in own.linears().items():
            if type(linear) is not nn.Linear:
                yield replacement(linear), f"{place}, {name}: {type(linear).__name__}"
        for name, layer_norm in (("first norm", own.ln_1), ("second norm", own.ln_2)):
            yield from _replaced_norm(layer_norm, f"{place}, {name}")
        used = activation(own.activation)
        if used is None:
            yield "activation", f"{place}: {_kind(own.activation)}"
        if own.is_causal:
            yield "replaced", f"{place}: causal attention"
        if type(own.out) is nn.Linear:
            head_dim = own.out.in_features / own.heads
            if own.head_dim not in (None, head_dim):
                yield "replaced", f"{place}: {own.heads} heads, but head_dim {own.head_dim}"
            if own.scale and abs(own.scale * head_dim**0.5 - 1) > 1e-9:
                yield "replaced", f"{place}: its attention is scaled by {own.scale:.4g}"
        settings.add((own.heads, used))
    if len(settings) > 1:
        yield "replaced", "layers with different heads or activations"
    if parts.head is not None:
        yield from _replaced_in_pool(parts.head)


def _replaced_norm(layer_norm: object, place: str) -> Iterator[tuple[str, str]]:
    if layer_norm is not None and type(layer_norm) is not nn.LayerNorm:
        yield replacement(layer_norm), f"{place}: {type(layer_norm).__name__}"


def _foreign_attention(vision: Any) -> str | None:
    """The attention function that a model is set to, where it is neither of transformers nor a kernel on the hub."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = str(getattr(vision.config, "_attn_implementation", None))
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    home = getattr(function, "__module__", None) or "transformers"
    return name if home.partition(".")[0] != "transformers" and "/" not in name else None


def _replaced_in_pool(head: Any) -> Iterator[tuple[str, str]]:
    attention = head.attention
    if type(attention) is not nn.MultiheadAttention:
        yield replacement(attention), f"head.attention: {type(attention).__name__}"
    elif attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        yield "replaced", "head.attention: options that its class does not set"
    yield from _replaced_norm(head.layernorm, "head.layernorm")
    if not hasattr(head.mlp, "activation_fn"):
        yield replacement(head.mlp), f"head.mlp: {type(head.mlp).__name__}"
        return
    if activation(head.mlp.activation_fn) is None:
        yield "activation", f"head.mlp: {_kind(head.mlp.activation_fn)}"
    for name, linear in (("fc1", head.mlp.fc1), ("fc2", head.mlp.fc2)):
        if type(linear) is not nn.Linear:
            yield replacement(linear), f"head.mlp.{name}: {type(linear).__name__}"


def _kind(function: object) -> str:
    return type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "unknown")


_TORCH = (
    *(nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.Dropout, nn.Identity, nn.ModuleList),
    *(nn.GELU, nn.SiLU, nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear),
)


# ---------------------------------------------------------------------------------------------- the module's own


def encode_image(module: nn.Module, images: Tensor) -> Tensor:
    """The module's own image embeddings, ``[B, 3, height, width] → [B, D]``."""
    inner = cast(Any, unwrap(module))
    parts = Parts(vision_transformer(inner))
    inputs = _inputs(parts, images, _name(inner))
    is_whole = hasattr(inner, "get_image_features")
    if is_whole and parts.pooling != "normed_mean":
        out = inner.get_image_features(**inputs)
        return cast(Tensor, out if isinstance(out, Tensor) else out.pooler_output)
    out = cast(Any, vision_transformer(inner) if is_whole else module)(**inputs)
    if hasattr(out, "image_embeds"):
        return cast(Tensor, out.image_embeds)
    if parts.pooling == "normed_mean":
        return cast(Tensor, out.last_hidden_state.mean(1))
    if _name(inner) in VIT_LIKE:
        return cast(Tensor, out.last_hidden_state[:, 0])  # ViT's pooler has a tanh after it
    return cast(Tensor, out.pooler_output)


def _inputs(parts: Parts, images: Tensor, name: str) -> dict[str, Any]:
    """Images as arguments of a forward of transformers."""
    if parts.takes_patches:
        high, wide = parts.patch_size
        rows, columns = images.shape[2] // high, images.shape[3] // wide
        patches_of = images.unflatten(3, (columns, wide)).unflatten(2, (rows, high)).permute(0, 2, 4, 3, 5, 1)
        return {
            "pixel_values": patches_of.reshape(len(images), rows * columns, -1),
            "pixel_attention_mask": torch.ones(len(images), rows * columns, dtype=torch.int32, device=images.device),
            "spatial_shapes": torch.tensor([[rows, columns]], device=images.device).expand(len(images), 2),
        }
    always = name.startswith(("Dinov2", "DINOv3"))  # positions of any size, without being asked
    if always or tuple(images.shape[-2:]) == parts.image_size:
        return {"pixel_values": images}
    return {"pixel_values": images, "interpolate_pos_encoding": True}


@torch.no_grad()
def own_forward(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The module's own image embeddings, and its residual stream as its forward passes.

    Args:
        module: the model.
        images: ``[B, 3, height, width]``.

    Returns:
        ``[B, D]``, and the stream before the first layer and after each, ``[B, N, W]``; None for what did not run.
    """
    parts = Parts(vision_transformer(module))
    return record([parts.start, *parts.layers], lambda: encode_image(module, images), images.device)


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
    # CLIP reads what comes before the padding. SigLIP was trained without a mask, and reads the last token.
    is_unmasked = _name(inner) in ("CLIPModel", "MetaClip2Model", *SIGLIP_LIKE)
    mask = None if is_unmasked or padding is None else (tokens != padding).long()
    out = inner.get_text_features(input_ids=tokens, attention_mask=mask)
    return cast(Tensor, out if isinstance(out, Tensor) else out.pooler_output)


def default_tokenizer(module: nn.Module) -> Callable[[Sequence[str]], Tensor] | None:
    """That of the folder or hub name which the model was loaded from, where its files are on this machine."""
    source = _origin(module)
    return processors.tokenizer(source, unwrap(module)) if source and has_text_encoder(module) else None


def default_preprocess(module: nn.Module) -> Callable[[Image.Image], Tensor]:
    """That of the folder or hub name which the model was loaded from, where its files are on this machine.

    Where there are none, or they are for images of another size than the positions, it is the one that models of its
    class are trained with.
    """
    source, parts = _origin(module), _parts_of_known(module)
    own = processors.preprocess(source, parts) if source else None
    size = None if own is None else own.image_size
    if own is not None and size in (None, parts.image_size):
        return own
    if size is not None:
        logger.warning(
            "the image processor in %s gives %d × %d pixels, and the model is for %d × %d: images are prepared for the "
            "latter, and clipfast.load reads the model for the former",
            *(source, *size, *parts.image_size),
        )
    return processors.of_class(unwrap(module), parts)


def resized_preprocess(
    module: nn.Module, image_size: tuple[int, int], preprocess: Callable[[Image.Image], Tensor] | None = None
) -> Callable[[Image.Image], Tensor]:
    """The image processor that came with the model, else that of :func:`default_preprocess`, at another size."""
    source, parts = _origin(module), _parts_of_known(module)
    known = preprocess if isinstance(preprocess, processors.Preprocess) else None
    known = known or (processors.preprocess(source, parts) if source else None)
    return processors.resized(known or processors.of_class(unwrap(module), parts), parts, image_size)


def _parts_of_known(module: nn.Module) -> Parts:
    """The parts of a model's vision transformer; :class:`UnsupportedTower` for a class that is not read."""
    inner = unwrap(module)
    if _name(inner) not in CLASSES:
        raise UnsupportedTower(type(inner).__name__, [text for _, text in refusals(inner)])
    return Parts(vision_transformer(module))


def _origin(module: nn.Module) -> str:
    """The folder or hub name which a model was loaded from; empty for none."""
    return str(getattr(unwrap(module), "name_or_path", "") or "")
