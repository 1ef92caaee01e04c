"""Loading the weights of OpenAI's ``clip`` package by path: state dicts, and the TorchScript archives it publishes.

The model is open_clip's of the same structure, so the package itself is not needed. Nothing in a file is executed.
"""

from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from clipfast.errors import InputError, ModelError
from clipfast.towers import archives, openclip_models
from clipfast.towers.loaded import Loaded
from clipfast.towers.openclip_models import (
    OPENAI,
    PRECISION,
    default_preprocess,
    default_tokenizer,
    explain,
    strip_names,
)

_PUBLISHED = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")
_CONFIGS = {f"{OPENAI}{name}": name.replace("/", "-").replace("@336px", "-336") for name in _PUBLISHED}
"""Names that OpenAI published → those of open_clip, whose structure is the same."""
_NEEDED = ("text_projection", "positional_embedding", "token_embedding.weight", "ln_final.weight")


def create(name: str, pretrained: str | None, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Loads OpenAI's weights into a model whose sizes are those of the weights.

    Args:
        name: ``openai:`` and the path of a TorchScript archive, or of a state dict that torch or safetensors wrote.
        pretrained: None.
        device: where to put the model.
        dtype: float32, float64, bfloat16 or float16.

    Raises:
        ModelError: no such file, one that cannot be read, or other weights than those of a CLIP of OpenAI's.
        InputError: a dtype that is no floating-point one.
    """
    if dtype not in PRECISION:
        raise InputError(f"dtype {dtype} is not supported: choose float32, bfloat16, float16 or float64")
    path = name.removeprefix(OPENAI)
    if pretrained is not None:
        raise ModelError(f"{name} brings its own weights: leave pretrained={pretrained!r} out")
    if not Path(path).is_file():
        raise ModelError(f"{name}: there is no file {path}")
    state, is_quick = _state(path)
    missing = [key for key in _NEEDED if key not in state]
    if missing:
        raise ModelError(f"the checkpoint {path} is none of OpenAI's CLIP: it has no weights {', '.join(missing)}")
    try:
        build: Any = open_clip.model.build_model_from_openai_state_dict
        module = build(dict(state), quick_gelu=is_quick, cast_dtype=torch.float32).to(dtype)
        module.load_state_dict(state)  # the builder rounds to float16
    except Exception as error:  # of sizes and names that do not fit together, in many types
        raise ModelError(explain("OpenAI's CLIP", path, error)) from error
    module = module.to(device).eval()
    return Loaded(module, default_preprocess(module), default_tokenizer(module), True)


def _state(path: str) -> tuple[dict[str, Tensor], bool]:
    """The weights in a file, and whether they were trained with QuickGELU: so were all that OpenAI published."""
    if archives.is_archive(path):
        archive = archives.read(path)
        state, quick = archive.weights, archives.uses_quick_gelu(archive.classes)
    else:
        try:
            state, quick = dict(open_clip.factory.load_state_dict(path)), None
        except Exception as error:  # torch and safetensors raise different types
            raise ModelError(explain("OpenAI's CLIP", path, error)) from error
    strip_names(None, state)
    return state, quick is not False


# -------------------------------------------------------------------------------------------------- models by name


def names() -> list[str]:
    """The models that OpenAI published; they are loaded by the path of their file."""
    return list(_CONFIGS)


def tags(name: str) -> list[str]:
    """None: a file holds its weights."""
    return []


def unread(name: str, *, quick: bool = False) -> nn.Module:
    """The image tower of a model of :func:`names` on the meta device; see :func:`.openclip_models.unread`."""
    return openclip_models.unread(f"{_CONFIGS[name]}-quickgelu", quick=quick)
