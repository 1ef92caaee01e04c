"""Loading models of Hugging Face's transformers from folders and from the hub."""

import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipfast.errors import MissingExtra, ModelError, UnsupportedTower
from clipfast.towers import huggingface_processors as processors
from clipfast.towers.huggingface import has_text_encoder, refusals, vision_transformer
from clipfast.towers.huggingface_layouts import CLASSES, Parts
from clipfast.towers.loaded import Loaded, without_weights

logger = logging.getLogger("clipfast")

CONFIG = "config.json"
"""File of a model folder that describes the model."""
PREFIX = "hf:"
"""Before the name of a model on the hub."""


def is_folder(name: str) -> bool:
    """Whether transformers wrote a folder: its ``config.json`` names a ``model_type``, and open_clip did not."""
    if (Path(name) / "open_clip_config.json").exists():
        return False
    try:
        config = json.loads((Path(name) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "model_type" in config


def create(name: str, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Loads a model; its weights are not read where it is refused.

    Args:
        name: a folder that transformers wrote, or ``hf:`` and a name on the hub.
        device: where to put it.
        dtype: of the weights.

    Raises:
        ModelError: no such model, or one that cannot be read.
        UnsupportedTower: a vision tower that cannot be decomposed, with every reason.
        MissingExtra: transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise MissingExtra("transformers", "hf", f"the model {name}")
    import transformers

    source = name.removeprefix(PREFIX)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = transformers.AutoConfig.from_pretrained(source)
            kind = _class_of(config)
            with torch.device("meta"):
                unread = kind(config)
        except Exception as error:  # transformers, its hub client and its configs raise different types
            raise ModelError(_explain(source, error)) from error
        reasons = [reason for _, reason in refusals(unread.eval(), ignore_hooks=True)]
        if reasons:
            raise UnsupportedTower(name, reasons)
        shows_progress = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        try:
            module = kind.from_pretrained(source, dtype=dtype).to(device).eval()
        except Exception as error:
            raise ModelError(_explain(source, error)) from error
        finally:
            if shows_progress:
                transformers.utils.logging.enable_progress_bar()
    parts = Parts(vision_transformer(module))
    preprocess = processors.preprocess(source, parts, download=True)
    if preprocess is None:
        logger.warning("no image processor in %s: taking the one that its class is trained with", source)
        preprocess = processors.of_class(module, parts)
    tokenize = processors.tokenizer(source, module, download=True) if has_text_encoder(module) else None
    if tokenize is None and has_text_encoder(module):
        logger.warning("no tokenizer in %s: texts must be given as features", source)
    return Loaded(module, preprocess, tokenize, True, _other_size(preprocess, parts))


def _other_size(preprocess: processors.Preprocess, parts: Parts) -> tuple[int, int] | None:
    """The size of the images that a processor gives, where positions must be interpolated for it."""
    size = preprocess.image_size  # DINOv2's is 224 × 224, and its positions are for 518 × 518
    return None if size == parts.image_size else size


def _class_of(config: Any) -> Any:
    """The class that a model was saved from, where it is one that is read, else the one its config belongs to."""
    import transformers

    saved = next((each for each in config.architectures or () if each in CLASSES), None)
    return transformers.AutoModel._model_mapping[type(config)] if saved is None else getattr(transformers, saved)


def _explain(source: str, error: Exception) -> str:
    """One line about an error of transformers."""
    text = " ".join(str(error).split())
    if not Path(source).is_dir():
        return f"cannot load {source} from the Hugging Face hub: {type(error).__name__}: {text[:160]}"
    return f"cannot read the model in {source}: {type(error).__name__}: {text[:200]}"


# -------------------------------------------------------------------------------------------------- models by class


def names() -> list[str]:
    """The classes that are read, of those that this version of transformers has."""
    import transformers

    return [name for name in CLASSES if hasattr(transformers, name)]


def tags(name: str) -> list[str]:
    """None: a folder, or a repository on the hub, holds a model of a class."""
    return []


def unread(name: str, *, quick: bool = False) -> nn.Module:
    """A model of a class on the meta device, of the sizes that its config has by default."""
    import transformers

    kind: Any = getattr(transformers, name)
    shown = logging.getLogger("transformers").level
    transformers.utils.logging.set_verbosity_error()  # of remarks about the default config
    try:
        with without_weights():
            model: nn.Module = kind(kind.config_class()).eval()
    finally:
        transformers.utils.logging.set_verbosity(shown)
    return model
