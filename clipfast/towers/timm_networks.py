"""timm's networks of other kinds up to their last feature map, which their own layers give.

ResNets, EfficientNets, ConvNeXt, Swin, FastViT, transformers with differential attention; and stems of vision
transformers that are not one convolution.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import timm.models
import torch
from timm.layers import AttentionPool2d, PatchEmbed
from timm.models.convnext import ConvNeXt
from timm.models.fastvit import FastVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from clipfast.towers.patches import plain_type
from clipfast.towers.timm_parts import Parts, classes
from clipfast.towers.timm_pools import classifier, map_pool, map_tokens, plain_classifier, projection
from clipfast.towers.tower import Embedder

Fields = dict[str, Any]
"""Arguments of :class:`Tower`."""

SWINS = (SwinTransformer, SwinTransformerV2)

NO_PATCHES: Fields = dict.fromkeys(
    ("patch_weight", "patch_bias", "class_embedding", "registers", "positional_embedding", "ln_pre")
)


def is_one_convolution(embed: Any) -> bool:
    """Whether patches are embedded by one convolution whose stride is its kernel."""
    if plain_type(embed) is not PatchEmbed or plain_type(embed.proj) is not nn.Conv2d:
        return False
    conv = embed.proj
    is_plain = conv.padding == (0, 0) and conv.dilation == (1, 1) and conv.groups == 1
    return is_plain and conv.kernel_size == conv.stride and type(embed.norm) is nn.Identity


def sizes(parts: Parts, embed: Any) -> Fields:
    """The size of an image and of the part of it that one token stands for."""
    image, grid = tuple(embed.img_size), tuple(embed.grid_size)
    patch = tuple(embed.proj.kernel_size) if is_one_convolution(embed) else _divided(image, grid)
    pads = getattr(embed, "dynamic_img_pad", False) and _divided(image, patch) != tuple(
        -(-length // side) for length, side in zip(image, patch, strict=True)
    )
    if pads or _divided(image, patch) != grid:
        parts.note("grid", f"{image[0]} × {image[1]} pixels")
    return {"image_size": image, "patch_size": patch}


def _divided(lengths: Sequence[int], by: Sequence[int]) -> tuple[int, int]:
    return lengths[0] // by[0], lengths[1] // by[1]


def network(
    parts: Parts,
    trunk: nn.Module,
    sized: Any,
    run: Callable[[Tensor], Tensor],
    prefix_tokens: int,
    kept: Sequence[nn.Module] = (),
) -> Fields:
    """A network up to its last feature map, which its own layers give.

    Args:
        parts: notes what cannot be read.
        trunk: the network.
        sized: what has its ``img_size`` and ``grid_size``.
        run: images → tokens.
        prefix_tokens: tokens before the patches.
        kept: layers after the feature map.
    """
    after = {id(tensor) for layer in kept for tensor in held_tensors(layer)}
    weights = tuple(tensor for tensor in held_tensors(trunk) if id(tensor) not in after)
    embedder = Embedder(run, weights, int(cast(Any, trunk).num_features), prefix_tokens)
    shape: Fields = {"blocks": (), "heads": 1, "activation": "gelu", "embedder": embedder}
    return shape | NO_PATCHES | sizes(parts, sized)


def held_tensors(module: nn.Module) -> list[Tensor]:
    """What a module computes with: weights that multiply first."""
    held = [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
    return sorted(held, key=lambda tensor: tensor.ndim < 2)


class _FeatureMap:
    """The size of an image, and of the feature map that a convolutional network makes of it."""

    proj = norm = None

    def __init__(self, parts: Parts, trunk: Any, image_size: tuple[int, int] | None) -> None:
        reduction = trunk.feature_info[-1]["reduction"]
        size = image_size or trunk.pretrained_cfg["input_size"][1:]
        self.img_size = size[0], size[1]
        self.grid_size = _divided(self.img_size, (reduction, reduction))
        if any(length % reduction for length in self.img_size):
            parts.note("grid", f"{size[0]} × {size[1]} pixels")


def _convolutional(parts: Parts, trunk: Any, head: list[nn.Module], image_size: tuple[int, int] | None) -> Fields:
    attends = plain_type(trunk.head) is AttentionPool2d
    if attends:
        fields = map_pool(parts, trunk.head, "head") | projection(parts, head)
    else:
        fields = classifier(parts, trunk.head, head)
    sized = _FeatureMap(parts, trunk, image_size)
    return fields | network(parts, trunk, sized, _run_channels_first(trunk), int(attends), (trunk.head,))


def _fastvit(parts: Parts, trunk: Any, head: list[nn.Module], image_size: tuple[int, int] | None) -> Fields:
    if trunk.fork_feat:
        parts.note("no_pool")
        return {}
    return _convolutional(parts, trunk, head, image_size)


def _plain(parts: Parts, trunk: Any, head: list[nn.Module], image_size: tuple[int, int] | None) -> Fields:
    """A network whose pooling and classifier are layers of its own."""
    if trunk.training and getattr(trunk, "drop_rate", 0) > 0:  # no layer, but a function
        parts.note("training")
    after = trunk.get_classifier()
    fields = plain_classifier(parts, trunk.global_pool, after, head)
    sized = _FeatureMap(parts, trunk, image_size)
    return fields | network(parts, trunk, sized, _run_channels_first(trunk), 0, (after,))


def _swin(parts: Parts, trunk: Any, head: list[nn.Module], _: tuple[int, int] | None) -> Fields:
    fields = classifier(parts, trunk.head, head)
    fields |= {"pooling": "normed_mean", "ln_post": parts.norm(trunk.norm, "norm")}
    sized = _FeatureMap(parts, trunk, tuple(trunk.patch_embed.img_size))
    return fields | network(parts, trunk, sized, _run_swin(trunk), 0, (trunk.norm, trunk.head))


_HEADS = (
    *("ByobNet", "CspNet", "CspNext", "EdgeNeXt", "NormFreeNet", "RegNet", "ResNetV2", "RexNet", "TResNet", "VovNet"),
    "XceptionAligned",
)
_PLAIN = ("DenseNet", "EfficientNet", "ResNet")
NETWORKS: dict[type, Callable[..., Fields]] = {
    ConvNeXt: _convolutional,
    FastVit: _fastvit,
    SwinTransformer: _swin,
    SwinTransformerV2: _swin,
    **dict.fromkeys(classes(timm.models, *_HEADS), _convolutional),
    **dict.fromkeys(classes(timm.models, *_PLAIN), _plain),
}


# ------------------------------------------------------------------------------------------- the module's own layers


def run_start(vit: Any) -> Callable[[Tensor], Tensor]:
    """A transformer up to its first block."""

    def run(images: Tensor) -> Tensor:
        x = vit.patch_embed(images)
        if not hasattr(vit, "_pos_embed"):  # relative positions alone
            return x if vit.cls_token is None else torch.cat((vit.cls_token.expand(len(x), -1, -1), x), 1)
        x = vit._pos_embed(x)
        x = x[0] if isinstance(x, tuple) else vit.patch_drop(x)  # Eva gives rotary positions, too
        return cast(Tensor, vit.norm_pre(x)).contiguous()

    return run


def run_transformer(vit: Any) -> Callable[[Tensor], Tensor]:
    """A transformer up to its final norm."""
    start = run_start(vit)

    def run(images: Tensor) -> Tensor:
        x = start(images)
        for block in vit.blocks:
            x = block(x)
        return x.contiguous()

    return run


def _run_channels_first(trunk: Any) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        return as_tokens(trunk, trunk.forward_features(images))

    return run


def _run_swin(trunk: Any) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        return as_tokens(trunk, trunk.layers(trunk.patch_embed(images)))

    return run


def as_tokens(trunk: nn.Module, x: Tensor) -> Tensor:
    """A feature map as tokens ``[B, N, W]``: Swin has channels last, others have them first."""
    if x.ndim == 3:
        return x.contiguous()
    if isinstance(getattr(trunk, "head", None), AttentionPool2d):
        return map_tokens(trunk.head, x).contiguous()
    return x.flatten(1, 2).contiguous() if isinstance(trunk, SWINS) else x.flatten(2).mT.contiguous()
