"""Vision towers of OpenAI's ``clip`` package as plain tensors: its ``VisionTransformer`` and ``ModifiedResNet``.

Its classes are known by module and name, so the package need not be installed. They are taken as they are: in half
precision with LayerNorms in float32, too, as the package has them on a GPU.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from clipfast.errors import InputError, UnsupportedTower
from clipfast.towers import clip_resnet, openclip_models
from clipfast.towers.clip_layers import (
    Classes,
    Places,
    activation,
    block_of,
    expect,
    expect_norm,
    expect_patches,
    have_equal_settings,
    norm,
    optional_norm,
    replaced_in_block,
)
from clipfast.towers.folding import copy_with, folded
from clipfast.towers.openai_code import changed_methods
from clipfast.towers.patches import CHANGED, drops_now, is_replaced, patches, plain_type, sentence
from clipfast.towers.recording import record
from clipfast.towers.sizes import Size, check_patches, of_copy, pixels_of, resampled, size_of
from clipfast.towers.tower import Activation, Tower
from clipfast.towers.wrappers import unwrap

MODULE = "clip.model"
TOWERS = ("VisionTransformer", "VisualTransformer", "ModifiedResNet")
"""Names of the classes that are read, in :data:`MODULE`; the second is what the first was called at the beginning."""

REFUSALS: dict[str, str] = (
    {
        "class": "not the VisionTransformer or ModifiedResNet of OpenAI's clip package",
        "mask": "an attention mask in the image tower",
    }
    | clip_resnet.REFUSALS
    | CHANGED
)
"""Why a tower is refused, by a short key."""


def vision_module(module: nn.Module) -> nn.Module:
    """The image tower of a CLIP, or the module itself when it is one, without what is wrapped around it."""
    module = unwrap(module)
    return unwrap(cast(nn.Module, module.visual)) if hasattr(module, "visual") else module


def encode_image(module: nn.Module, images: Tensor) -> Tensor:
    """The module's own image embeddings, ``[B, 3, height, width] → [B, D]``."""
    inner = unwrap(module)  # what is wrapped around the image tower stays
    visual, plain = cast(Any, inner.visual if hasattr(inner, "visual") else module), cast(Any, vision_module(module))
    resized = sized(plain, pixels_of(images))
    return cast(Tensor, (visual if resized is plain else resized)(images.type(plain.conv1.weight.dtype)))


def read(module: nn.Module, *, ignore_hooks: bool = False, image_size: Size | None = None) -> Tower:
    """Reads a CLIP or its ``.visual`` into a :class:`Tower` that shares its parameters.

    Args:
        module: the model.
        ignore_hooks: accept forward hooks.
        image_size: height and width of the images; see :func:`sized`. None for the tower's.

    Raises:
        UnsupportedTower: with every reason.
        InputError: an image size that the tower cannot be given.
    """
    visual = cast(Any, vision_module(module))
    reasons = [text for _, text in refusals(visual, ignore_hooks=ignore_hooks)] + _replaced_encoder(unwrap(module))
    if reasons:
        raise UnsupportedTower(type(visual).__name__, reasons)
    changed = changed_methods(visual, MODULE)
    if changed:
        text = "is not the code that OpenAI published: model.verify(images) shows whether it computes the same"
        warnings.warn(f"{', '.join(changed)} {text}", UserWarning, stacklevel=2)
    if _name(visual) == "ModifiedResNet":
        return clip_resnet.read(sized(visual, image_size), visual.input_resolution)
    plain, sources = folded(visual)
    vit = cast(Any, sized(plain, image_size))
    first = vit.transformer.resblocks[0]
    tower = Tower(
        patch_weight=vit.conv1.weight,
        patch_bias=vit.conv1.bias,
        class_embedding=vit.class_embedding,
        registers=None,
        positional_embedding=vit.positional_embedding,
        ln_pre=norm(vit.ln_pre),
        blocks=tuple(block_of(block)[0] for block in vit.transformer.resblocks),
        ln_post=optional_norm(vit.ln_post),
        projection=vit.proj,
        heads=first.attn.num_heads,
        activation=cast(Activation, activation(first.mlp.gelu, _classes(visual))),
        pooling="cls",
        image_size=size_of(vit.input_resolution),
        patch_size=vit.conv1.kernel_size,
        sources=sources,
    )
    return tower if vit is plain else of_copy(tower, plain, vit)


@torch.no_grad()
def sized(visual: nn.Module, size: Size | None) -> nn.Module:
    """An image tower for images of a size: itself where it is for them, else a copy that shares all but the positions.

    The package itself resamples no positions: they are resampled as open_clip does it.

    Args:
        visual: of one of the package's classes.
        size: height and width; None for its own.

    Raises:
        InputError: not whole patches, or a ResNet.
    """
    own = size_of(cast(Any, visual).input_resolution)
    if size is None or size == own:
        return visual
    if hasattr(visual, "attnpool"):
        raise InputError(
            f"images of {size[0]} × {size[1]} pixels: the positions of a ResNet's attention pool are not resampled, "
            f"and these are for {own[0]} × {own[1]}"
        )
    vit: Any = folded(visual, without=dict(visual.named_children())).module
    patch = vit.conv1.kernel_size
    check_patches(size, patch)
    old, new = ((side[0] // patch[0], side[1] // patch[1]) for side in (own, size))
    copy = copy_with(vit, {"positional_embedding": resampled(vit.positional_embedding, old, new)})
    copy.input_resolution = size
    return cast(nn.Module, copy)


def _name(visual: nn.Module) -> str:
    """The name of a tower's class where it is one of the package's own, else nothing."""
    kind = plain_type(visual)
    return kind.__name__ if kind.__module__ == MODULE and kind.__name__ in TOWERS else ""


def _own(visual: nn.Module, name: str) -> type:
    """A class of the package that a tower belongs to."""
    return cast(type, vars(plain_type(visual))["__init__"].__globals__[name])


def _classes(visual: nn.Module) -> Classes:
    """What the package makes blocks of."""
    return Classes(
        blocks=(_own(visual, "ResidualAttentionBlock"),),
        norms=(_own(visual, "LayerNorm"), nn.LayerNorm),
        attentions=(nn.MultiheadAttention,),
        quick_gelu=_own(visual, "QuickGELU"),
    )


# ------------------------------------------------------------------------------------------------------- refusals


def refusals(visual: nn.Module, *, ignore_hooks: bool = False) -> list[tuple[str, str]]:
    """Every reason why a vision module cannot be decomposed, as (key of :data:`REFUSALS`, sentence)."""
    name = _name(visual)
    if not name:
        kind = plain_type(visual)
        return [("class", f"{REFUSALS['class']} but {kind.__module__}.{kind.__qualname__}")]
    reasons: dict[str, list[str]] = {}  # key → places
    if drops_now(visual):
        reasons["training"] = []
    is_resnet = name == "ModifiedResNet"
    wrong = clip_resnet.replaced(visual, (_own(visual, "AttentionPool2d"),)) if is_resnet else _replaced(visual)
    for key, place in wrong:
        reasons.setdefault(key, []).append(place)
    runs = clip_resnet.trunk(visual) if is_resnet else []
    for patch in patches(visual, ignore_hooks=ignore_hooks, runs=runs):
        reasons.setdefault(patch.reason, []).append(patch.place)
    return [(key, sentence(REFUSALS[key], filter(None, places))) for key, places in reasons.items()]


def _replaced(visual: Any) -> Places:
    """Layers of a vision transformer that are not those of the package's class."""
    classes, visual = _classes(visual), folded(visual).module
    wrong = expect(visual.transformer, (_own(visual, "Transformer"),), "transformer")
    wrong += expect_patches(visual.conv1, getattr(visual.conv1, "kernel_size", (0, 0)))
    wrong += expect_norm(visual.ln_pre, classes, "ln_pre")
    if type(visual.ln_post) is not nn.Identity:
        wrong += expect_norm(visual.ln_post, classes, "ln_post")
    if wrong:
        return wrong
    wrong += expect(visual.transformer.resblocks, (nn.Sequential,), "transformer.resblocks")
    blocks = list(visual.transformer.resblocks)
    for index, block in enumerate(blocks):
        place = f"transformer.resblocks.{index}"
        wrong += replaced_in_block(block, place, classes)
        if getattr(block, "attn_mask", None) is not None:
            wrong.append(("mask", place))
    if not wrong and not have_equal_settings(blocks, classes):
        wrong.append(("replaced", "blocks with different heads or activations"))
    if not wrong and activation(blocks[0].mlp.gelu, classes) is None:
        wrong.append(("replaced", f"mlp.gelu: {type(blocks[0].mlp.gelu).__name__} in place of QuickGELU"))
    return wrong


def _replaced_encoder(module: Any) -> list[str]:
    """The reason for refusing a CLIP whose ``encode_image`` is not that of the package."""
    own = next((kind for kind in type(module).__mro__ if kind.__module__ == MODULE and kind.__name__ == "CLIP"), None)
    subclassed = own is not None and type(module).encode_image is not vars(own)["encode_image"]
    if subclassed or is_replaced(module, "encode_image"):
        return [sentence(REFUSALS["forward"], [f"{type(module).__name__}.encode_image"])]
    return []


# ---------------------------------------------------------------------------------------------- the module's own


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
    if _name(visual) == "ModifiedResNet":
        return clip_resnet.own_forward(visual, images)
    parts = [visual.ln_pre, *visual.transformer.resblocks]
    # A forward that was compiled in place would not run the hooks. Blocks have tokens first.
    return record(parts, lambda: visual._call_impl(images), images.device, tokens_first=True)


# ------------------------------------------------------------------------------------------------ text and pixels


def has_text_encoder(module: nn.Module) -> bool:
    """Whether a module is a whole CLIP, not an image tower alone."""
    return hasattr(unwrap(module), "encode_text")


def encode_text(module: nn.Module, tokens: object, device: torch.device) -> Tensor:
    """Text features ``[T, D]`` of tokens ``[T, context]``, not normalised.

    Raises:
        InputError: tokens that the text encoder cannot read.
    """
    inner = cast(Any, unwrap(module))
    return cast(Tensor, inner.encode_text(openclip_models.check_tokens(inner, tokens).to(device)))


def default_tokenizer(module: nn.Module) -> Callable[[Sequence[str]], Tensor] | None:
    """The package's own, by open_clip's implementation of it, which gives the same tokens."""
    inner = cast(Any, unwrap(module))
    if getattr(inner, "vocab_size", None) != openclip_models.VOCABULARY:
        return None
    return openclip_models.tokenizer_of(inner.context_length)


def default_preprocess(module: nn.Module) -> Callable[[Image.Image], Tensor]:
    """The package's own transform, by open_clip's implementation of it, which gives the same pixels."""
    return openclip_models.preprocess_of({"size": cast(Any, vision_module(module)).input_resolution})


def resized_preprocess(
    module: nn.Module, image_size: Size, preprocess: Callable[[Image.Image], Tensor] | None = None
) -> Callable[[Image.Image], Tensor]:
    """The same at another image size."""
    return openclip_models.preprocess_of({"size": image_size})
