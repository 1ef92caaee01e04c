"""Models of other packages at their full size, random and seeded, and the calls that ``bench_towers.py`` compares."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import clipfast
from benchmarks.cases import TEXTS, randomize, unit_texts
from clipfast import Contributions, Model
from clipfast.bench.inputs import module as open_clip_module

__all__ = ["TEXTS"]


def _siglip() -> nn.Module:
    config = transformers.SiglipVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    )
    return transformers.SiglipVisionModel(config)


def _dinov2() -> nn.Module:
    config = transformers.Dinov2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=14
    )
    return transformers.Dinov2Model(config)


def _clip() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        projection_dim=512,
    )
    return transformers.CLIPVisionModelWithProjection(config)


def _eva02() -> nn.Module:
    visual: nn.Module = open_clip_module("EVA02-B-16", "cpu").visual  # type: ignore[assignment]
    return visual


MODELS: dict[str, Callable[[], nn.Module]] = {
    "SigLIP B/16": _siglip,
    "DINOv2 B/14": _dinov2,
    "CLIP B/16": _clip,
    "EVA02 B/16": _eva02,
}
"""Name → model: the first three of transformers, the last of open_clip and timm."""


def start(name: str, batch: int, threads: int) -> tuple[nn.Module, Model, Tensor, Tensor]:
    """The module, the wrapped model, images and texts."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    randomize(module)
    model = clipfast.wrap(module)
    images = torch.randn(batch, 3, *model.tower.image_size, generator=torch.Generator().manual_seed(1))
    return module, model, images, unit_texts(model.tower.embed_dim, "cpu")


def plain(module: nn.Module, images: Tensor) -> Tensor:
    """The module's own forward."""
    with torch.inference_mode():
        out: Any = module(images)
    return out if isinstance(out, Tensor) else out[0]


def explain(model: Model, images: Tensor, texts: Tensor) -> tuple[Contributions, Tensor]:
    """The decomposed forward with attention and summed maps, and every head's contribution."""
    contributions = model.decompose(images, texts=texts, attention=True)
    return contributions, contributions.heads()


def upstream(model: Model, images: Tensor) -> tuple[Contributions, Tensor]:
    """Every term of the blocks before an attention pool."""
    contributions = model.decompose(images, depth="all")
    return contributions, contributions.heads()


# --------------------------------------------------------------------------------- calls that a new process can build


def plain_call(name: str, batch: int, threads: int) -> Callable[[], object]:
    """:func:`plain`, ready to run."""
    module, _, images, _ = start(name, batch, threads)
    return lambda: plain(module, images)


def explain_call(name: str, batch: int, threads: int) -> Callable[[], object]:
    """:func:`explain`, ready to run."""
    _, model, images, texts = start(name, batch, threads)
    return lambda: explain(model, images, texts)


def upstream_call(name: str, batch: int, threads: int) -> Callable[[], object]:
    """:func:`upstream`, ready to run."""
    _, model, images, _ = start(name, batch, threads)
    return lambda: upstream(model, images)
