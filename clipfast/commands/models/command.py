"""``clipfast models``: which models there are, and which can be decomposed."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from clipfast.commands import console
from clipfast.commands.models.options import Options
from clipfast.model import BUNDLED
from clipfast.towers import openclip_models


@dataclass(frozen=True)
class Listed:
    """A model by name.

    Attributes:
        name: as ``clipfast.load`` takes it.
        supported: whether it can be decomposed.
        refusals: every reason why not.
        size: its image tower in a few words.
        image_size: side of its input in pixels, None where its package decides.
        tags: pretrained weights open_clip knows.
    """

    name: str
    supported: bool
    refusals: list[str]
    size: str
    image_size: int | None
    tags: list[str]


def listed(name: str) -> Listed:
    """Looks a model up by its config, without building its weights."""
    if name in BUNDLED:
        return Listed(name, True, [], "bundled", 64, ["bundled"])
    refusals = [reason for _, reason in openclip_models.supports(name)]
    vision = openclip_models.vision_config(name)
    side = vision.get("image_size")
    return Listed(
        name=name,
        supported=not refusals,
        refusals=refusals,
        size=_size(vision),
        image_size=side[0] if isinstance(side, list | tuple) else side,
        tags=openclip_models.tags(name),
    )


def _size(vision: dict[str, Any]) -> str:
    """An image tower in a few words: layers × heads, width, patch."""
    if "timm_model_name" in vision:
        return str(vision["timm_model_name"])
    width, layers = vision.get("width", 768), vision.get("layers", 12)
    if isinstance(layers, list):
        return f"ResNet {'-'.join(map(str, layers))}, width {width}"
    heads = width // vision.get("head_width", 64)
    return f"{layers} layers x {heads} heads, width {width}, patch {vision.get('patch_size', 16)}"


def run(options: Options) -> int:
    """Lists the models whose names contain the filter; returns the exit code.

    Without a filter and ``all`` only those that can be decomposed.
    """
    part = (options.filter or "").lower()
    names = [*BUNDLED, *openclip_models.names()]
    chosen = [name for name in names if part in name.lower()]
    models = []
    with console.progress("reading configs", len(chosen)) as advance:
        for name in chosen:
            models.append(listed(name))
            advance(1)
    shown = models if options.all or part else [model for model in models if model.supported]
    if options.json:
        console.say(json.dumps([asdict(model) for model in shown], indent=2))
        return 0
    rows = [
        [
            model.name,
            "yes" if model.supported else f"no: {'; '.join(model.refusals)}",
            str(model.image_size or "-"),
            model.size,
            " ".join(model.tags) or "-",
        ]
        for model in shown
    ]
    console.table(["model", "decomposes", "image", "image tower", "pretrained"], rows)
    hidden = len(models) - len(shown)
    console.note(f"{len(shown)} models" + (f"; {hidden} more are refused: --all shows why" if hidden else ""))
    return 0
