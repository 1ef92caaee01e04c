"""Loading timm's models by name, their preprocessing, and what else a package has to offer."""

import difflib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from clipfast.errors import InputError, ModelError, UnsupportedTower
from clipfast.towers import timm_towers
from clipfast.towers.loaded import Loaded, without_weights
from clipfast.towers.sizes import pixels_of
from clipfast.towers.timm_sizes import sized
from clipfast.towers.timm_towers import read, refusals
from clipfast.towers.wrappers import unwrap

__all__ = ["read"]  # of timm's towers, beside what is below

logger = logging.getLogger("clipfast")

PREFIX = "timm:"
"""Before the name of one of timm's models."""
DEFAULT = "default"
"""In place of a tag: the one that timm takes by default."""
_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")
"""Before names of models that bring their own weights."""


def create(name: str, pretrained: str | None, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Loads a model the way timm does; weights are neither downloaded nor read for one that is refused.

    Args:
        name: ``timm:`` and a name that timm knows, with a tag (``vit_base_patch16_224.augreg_in21k``) or without, or
            ``hf-hub:…`` or ``local-dir:…`` as timm takes them.
        pretrained: a tag, ``"default"`` for the tag that timm takes by default, the path of a checkpoint
            (safetensors, or a pickle read weights-only), or None for the tag in the name, else random weights.
        device: where to put it.
        dtype: of the weights.

    Raises:
        ModelError: unknown name or tag, a checkpoint that is missing, damaged or does not fit.
        UnsupportedTower: a model that cannot be decomposed, with every reason.
    """
    if not dtype.is_floating_point:
        raise InputError(f"dtype {dtype} is not supported: choose float32, bfloat16, float16 or float64")
    source, has_weights, checkpoint = _source(name.removeprefix(PREFIX), pretrained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with without_weights():
                unread = timm.create_model(source)
        except Exception as error:  # timm, its hub client and its models raise different types
            raise ModelError(f"cannot load {name}: {_line(error)}") from error
        reasons = [text for _, text in refusals(unread.eval(), ignore_hooks=True)]
        if reasons:
            raise UnsupportedTower(name, reasons)
        try:
            module = timm.create_model(source, pretrained=has_weights, checkpoint_path=checkpoint)
        except Exception as error:
            raise ModelError(f"cannot load {name}{f' with {checkpoint}' * bool(checkpoint)}: {_line(error)}") from error
    if not (has_weights or checkpoint):
        logger.warning("%s has random weights: give pretrained=TAG or a checkpoint's path", name)
    module = module.to(device, dtype).eval()
    return Loaded(module, preprocess_of(module), None, bool(has_weights or checkpoint))


def _source(name: str, pretrained: str | None) -> tuple[str, bool, str | None]:
    """A name as timm takes it, whether timm has weights to load for it, and the path of a checkpoint."""
    if name.startswith(_ELSEWHERE):
        if pretrained is not None:
            raise ModelError(f"{name} brings its own weights: leave pretrained={pretrained!r} out")
        return name, True, None
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all"
        raise ModelError(f"timm has no model called {base!r}: {hint}")
    if pretrained is not None and Path(pretrained).is_file():
        _check_tag(base, tag)
        return name, False, pretrained
    if pretrained == DEFAULT and not tag:
        return base, True, None
    if pretrained not in (None, DEFAULT, tag):
        if tag:
            raise ModelError(f"{name} names the tag {tag}: leave pretrained={pretrained!r} out")
        tag = str(pretrained)
    _check_tag(base, tag)
    return f"{base}.{tag}" if tag else base, bool(tag), None


def _check_tag(base: str, tag: str) -> None:
    known = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in known:
        listed = f"its tags are {', '.join(known)}" if known else "it has no tags"
        raise ModelError(f"{tag!r} is neither a file nor a tag of timm's {base}: {listed}")


def _line(error: Exception) -> str:
    """An error of timm or torch in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def preprocess_of(module: nn.Module, image_size: tuple[int, int] | None = None) -> Callable[[Image.Image], Tensor]:
    """Timm's own preprocessing for a model, at the size of images that the model takes, or at another."""
    config = resolve_model_data_config(module)
    size = image_size or getattr(getattr(module, "patch_embed", None), "img_size", None)
    if size is not None:
        config["input_size"] = (3, *size)
    return Preprocess(create_transform(**config, is_training=False))


class Preprocess:
    """A transform of timm as a function of one image.

    Args:
        transform: that of timm.
    """

    def __init__(self, transform: Callable[[Image.Image], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image → ``[3, height, width]``."""
        return cast(Tensor, self.transform(image.convert("RGB")))


# -------------------------------------------------------------------------------------------------- models by name


def names() -> list[str]:
    """Every name of timm's files that make models of the classes that are read, as :func:`create` takes it."""
    return [f"{PREFIX}{name}" for name in timm.list_models() if _makes_what_is_read(_home(name))]


def _home(name: str) -> str:
    """The module of timm that makes a named model."""
    return str(timm.models.model_entrypoint(name).__module__)


def _makes_what_is_read(home: str) -> bool:
    return any(hasattr(sys.modules[home], kind) for kind in timm_towers.READ)


def tags(name: str) -> list[str]:
    """Every pretrained tag that timm knows for a name."""
    base = name.removeprefix(PREFIX)
    return [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]


def unread(name: str, *, quick: bool = False) -> nn.Module:
    """A model on the meta device.

    Args:
        name: a name of :func:`names`.
        quick: build one block of a vision transformer, which stands for all others.
    """
    base = name.removeprefix(PREFIX)
    with warnings.catch_warnings(), without_weights():
        warnings.simplefilter("ignore")
        if quick and _home(base) in _ALIKE:
            with suppress(Exception):  # a model that takes no such depth
                return cast(nn.Module, timm.create_model(base, depth=1).eval())
        return cast(nn.Module, timm.create_model(base).eval())


_ALIKE = ("timm.models.vision_transformer", "timm.models.eva", "timm.models.deit")
"""Files whose models have blocks that are all alike."""


# ----------------------------------------------------------------------------------------------- as every package


def vision_module(module: nn.Module) -> nn.Module:
    """The model itself, without what is wrapped around it."""
    return unwrap(module)


def encode_image(module: nn.Module, images: Tensor) -> Tensor:
    """What the module's own forward gives, ``[B, 3, height, width] → [B, D]``."""
    inner = unwrap(module)
    resized = sized(inner, pixels_of(images))
    return cast(Tensor, module(images) if resized is inner else resized(images))


def own_forward(module: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The module's own embeddings, and its residual stream before the first block and after each."""
    inner = sized(unwrap(module), pixels_of(images))
    return timm_towers.own_forward(inner, inner, images)


def has_text_encoder(module: nn.Module) -> bool:
    """False: timm's models have none."""
    return False


def encode_text(module: nn.Module, tokens: object, device: torch.device) -> Tensor:
    """Raises InputError: timm's models have no text encoder."""
    raise InputError("timm's models have no text encoder: pass texts as features [T, D]")


def default_tokenizer(module: nn.Module) -> Callable[[Sequence[str]], Tensor] | None:
    """None: timm's models read no texts."""
    return None


def default_preprocess(module: nn.Module) -> Callable[[Image.Image], Tensor]:
    """Timm's own preprocessing for the model."""
    return preprocess_of(unwrap(module))


def resized_preprocess(
    module: nn.Module, image_size: tuple[int, int], preprocess: Callable[[Image.Image], Tensor] | None = None
) -> Callable[[Image.Image], Tensor]:
    """Timm's own preprocessing for the model, at another image size."""
    return preprocess_of(unwrap(module), image_size)
