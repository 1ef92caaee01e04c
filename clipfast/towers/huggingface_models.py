"""Loading models of Hugging Face's transformers: folders, hub names, tokenizers, image processors."""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.errors import InputError, MissingExtra, ModelError, UnsupportedTower
from clipfast.towers.huggingface import CLIP_LIKE, VIT_LIKE, Preprocess, default_preprocess, refusals
from clipfast.towers.loaded import Loaded

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
    return Loaded(module, _preprocess(source, module), _tokenizer(source, module), True)


def _class_of(config: Any) -> Any:
    """The class that a model was saved from, where it is one that is read, else the one its config belongs to."""
    import transformers

    saved = next((each for each in config.architectures or () if each in (*CLIP_LIKE, *VIT_LIKE)), None)
    return transformers.AutoModel._model_mapping[type(config)] if saved is None else getattr(transformers, saved)


def _explain(source: str, error: Exception) -> str:
    """One line about an error of transformers."""
    text = " ".join(str(error).split())
    if not Path(source).is_dir():
        return f"cannot load {source} from the Hugging Face hub: {type(error).__name__}: {text[:160]}"
    return f"cannot read the model in {source}: {type(error).__name__}: {text[:200]}"


def _preprocess(source: str, module: nn.Module) -> Callable[[Any], Tensor]:
    from transformers import AutoImageProcessor

    try:
        return Preprocess(AutoImageProcessor.from_pretrained(source))
    except Exception as error:
        reason = type(error).__name__
        logger.warning("no image processor in %s (%s): taking the one that its class is trained with", source, reason)
        return default_preprocess(module)


def _tokenizer(source: str, module: nn.Module) -> Callable[[Sequence[str]], Tensor] | None:
    if not hasattr(module, "get_text_features"):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        logger.warning("no tokenizer in %s (%s): texts must be given as features", source, type(error).__name__)
        return None
    longest = int(cast(Any, module).config.text_config.max_position_embeddings)
    return Tokenize(tokenizer, longest)


class Tokenize:
    """A tokenizer of transformers as a function of texts.

    Args:
        tokenizer: of the model.
        context: how many tokens the model reads.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens ``[T, longest]``; a text that would be cut off is an error."""
        rows = self.tokenizer(list(texts))["input_ids"]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.context:
                raise InputError(
                    f"a text has {len(row)} tokens, the model reads {self.context}: shorten {text[:60]!r}…"
                )
        return cast(Tensor, self.tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"])
