"""Loading open_clip's models: names, tags, checkpoints, tokenizers, preprocessing."""

import difflib
import json
import logging
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.constants import OPENAI_DATASET_MEAN as OPENAI_MEAN
from open_clip.constants import OPENAI_DATASET_STD as OPENAI_STD
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn

from clipfast.errors import InputError, MissingExtra, ModelError, UnsupportedTower
from clipfast.towers import archives
from clipfast.towers.loaded import Loaded, without_weights
from clipfast.towers.openclip import encode_image, own_forward, read, refusals, vision_module
from clipfast.towers.wrappers import unwrap

__all__ = ["encode_image", "own_forward", "read", "vision_module"]  # of open_clip's towers, beside what is below

logger = logging.getLogger("clipfast")

CONFIG = "open_clip_config.json"
"""File of a model folder that describes the model."""

OPENAI = "openai:"
"""Before the path of OpenAI's weights."""

MERGES = "bpe_merges.txt.gz"
"""File of a model folder with its own byte-pair merges; optional."""


WEIGHTS = (".safetensors", ".bin", ".pth")
"""Endings of the weights in a model folder."""


VOCABULARY = 49408
"""Tokens of CLIP's own tokenizer."""

_SIZES = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's checkpoints hold beside weights."""

PRECISION = {torch.float32: "fp32", torch.bfloat16: "pure_bf16", torch.float16: "pure_fp16", torch.float64: "fp32"}


def names() -> list[str]:
    """Every model name open_clip knows."""
    return list(open_clip.list_models())


def tags(name: str) -> list[str]:
    """Every pretrained tag open_clip knows for a name."""
    return list(open_clip.list_pretrained_tags_by_model(name))


def vision_config(name: str) -> dict[str, Any]:
    """open_clip's description of a named model's image tower."""
    return dict(open_clip.get_model_config(name)["vision_cfg"])


def supports(name: str) -> list[tuple[str, str]]:
    """The reasons why a named model is refused, from its config alone, without building its weights."""
    return _config_refusals(open_clip.get_model_config(name))


def unread(name: str, *, quick: bool = False) -> nn.Module:
    """The image tower of a named model on the meta device.

    Args:
        name: a name of :func:`names`.
        quick: build one block of open_clip's own transformers, which stands for all others.
    """
    config = open_clip.get_model_config(name)
    vision = dict(config["vision_cfg"])
    if quick and isinstance(vision.get("layers"), int):
        vision["layers"] = 1
    with without_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build: Any = open_clip.model._build_vision_tower
        tower: nn.Module = build(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))
        return tower.eval()


def _config_refusals(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    vision = dict(config["vision_cfg"])
    with without_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build = open_clip.model._build_vision_tower
        visual = build(config["embed_dim"], vision, quick_gelu=config.get("quick_gelu", False))
        return refusals(visual.eval(), ignore_hooks=True)


def create(name: str, pretrained: str | None, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Loads a model the way open_clip does; weights are neither downloaded nor read for a tower that is refused.

    Args:
        name: a name of :func:`names`, ``local-dir:…`` or ``hf-hub:…``, a folder with an ``open_clip_config.json``, or
            ``openai:`` and the path of OpenAI's weights, see :func:`clipfast.towers.openai_models.create`.
        pretrained: a tag, a checkpoint (safetensors, a pickle or a TorchScript archive, read weights-only), or None.
        device: where to put it.
        dtype: float32, float64, bfloat16 or float16.

    Raises:
        ModelError: unknown name or tag, a checkpoint that is missing, damaged or does not fit.
        UnsupportedTower: a vision tower that cannot be decomposed, with every reason.
        MissingExtra: a text encoder of Hugging Face without transformers.
        InputError: a dtype that is no floating-point one.
    """
    if dtype not in PRECISION:
        raise InputError(f"dtype {dtype} is not supported: choose float32, bfloat16, float16 or float64")
    if name.startswith(OPENAI):
        from clipfast.towers import openai_models

        return openai_models.create(name, pretrained, device, dtype)
    name = resolve_name(name)
    local = Path(name.removeprefix("local-dir:")) if name.startswith("local-dir:") else None
    if pretrained is not None:
        if local is not None:
            raise ModelError(f"{name} brings its own weights: leave pretrained={pretrained!r} out")
        _check_pretrained(name, pretrained)
    config = _config(name, local)
    reasons = [text for _, text in _config_refusals(config)] if config is not None else []
    if reasons:
        raise UnsupportedTower(name, reasons)
    if _text_encoder_needs_transformers(name) and find_spec("transformers") is None:
        raise MissingExtra("transformers", "hf", f"the text encoder of {name}")
    mismatch = activation_mismatch(name, pretrained)
    if mismatch:
        warnings.warn(mismatch, UserWarning, stacklevel=3)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            root = logging.getLogger()
            level = root.level
            root.setLevel(logging.CRITICAL)  # open_clip logs to the root logger; clipfast logs the same itself
            try:
                module, preprocess = _build(name, pretrained, device, dtype)
                own_merges = {"bpe_path": str(local / MERGES)} if local and (local / MERGES).is_file() else {}
                tokenizer = _tokenizer(name, own_merges)
            finally:
                root.setLevel(level)
    except ModelError:
        raise
    except Exception as error:  # open_clip, torch and safetensors raise different types
        raise ModelError(explain(name, pretrained or _checkpoint_in(local), error)) from error
    module = module.to(dtype).eval()
    has_weights = pretrained is not None or ":" in name
    if not has_weights:
        logger.warning("%s has random weights: give pretrained=TAG or a checkpoint's path", name)
    return Loaded(module, preprocess, tokenizer, has_weights)


def _config(name: str, folder: Path | None) -> Mapping[str, Any] | None:
    """A model's config where no download is needed: of a known name, or in a folder."""
    if folder is None:
        return open_clip.get_model_config(name) if ":" not in name else None
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        dict(config["vision_cfg"]), config["embed_dim"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: it is not the config of an open_clip model ({error})") from error
    return cast(Mapping[str, Any], config)


def _checkpoint_in(folder: Path | None) -> str | None:
    """The weights that open_clip reads from a model folder."""
    return None if folder is None else open_clip.factory._find_checkpoint_in_dir(folder)


def _build(name: str, pretrained: str | None, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """open_clip's model with its weights, and its preprocessing."""
    checkpoint = pretrained if pretrained is not None and os.path.isfile(pretrained) else None
    if name.startswith("local-dir:"):
        checkpoint = _checkpoint_in(Path(name.removeprefix("local-dir:")))
    options: dict[str, Any] = {"precision": PRECISION[dtype], "device": device, "weights_only": True}
    if checkpoint is None:
        module, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, **options)
        return module, preprocess
    module, _, preprocess = open_clip.create_model_and_transforms(
        name, load_weights=False, pretrained_text=False, **options
    )
    handle = module.register_load_state_dict_pre_hook(strip_names)
    try:
        if archives.is_archive(checkpoint):
            _load_archive(module, checkpoint)
        else:
            open_clip.load_checkpoint(module, checkpoint)
    finally:
        handle.remove()
    return module, preprocess


def _load_archive(module: nn.Module, path: str) -> None:
    """Gives a model the weights of a TorchScript archive, as open_clip gives it those of a checkpoint."""
    state = archives.read(path).weights
    if "positional_embedding" in state and not hasattr(module, "positional_embedding"):
        state = open_clip.model.convert_to_custom_text_state_dict(state)
    open_clip.model.resize_pos_embed(state, module)
    open_clip.model.resize_text_pos_embed(state, module)
    module.load_state_dict(state)


def strip_names(_module: nn.Module | None, state: dict[str, Tensor], *_: object) -> None:
    """Takes the names of what was wrapped around a model out of its weights' names, in place.

    ``torch.compile`` writes ``_orig_mod``, ``DataParallel`` and ``DistributedDataParallel`` write ``module``, before
    the model's own names or, where the image tower alone was wrapped, after ``visual``. OpenAI's archives have sizes
    and the mask of the text encoder among their weights.
    """
    for name in list(state):
        if name in _SIZES or name.split(".")[-1] == "attn_mask":
            del state[name]
            continue
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        while parts[:1] == ["module"]:
            parts = parts[1:]
        while parts[:2] == ["visual", "module"]:
            parts = ["visual", *parts[2:]]
        if ".".join(parts) != name:
            state[".".join(parts)] = state.pop(name)


def resolve_name(name: str) -> str:
    """A name as open_clip takes it; nothing is built or downloaded.

    Raises:
        ModelError: no such name, with those that are near, or a folder that holds no model.
    """
    if name.startswith("hf-hub:"):
        return name
    if name.startswith("local-dir:") or Path(name).is_dir():
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / CONFIG).is_file():
            raise ModelError(f"the folder {folder} holds no {CONFIG}")
        if not any(next(folder.glob(f"*{suffix}"), None) for suffix in WEIGHTS):
            raise ModelError(f"the folder {folder} holds no weights ({', '.join(WEIGHTS)})")
        return f"local-dir:{folder}"
    known = names()
    name = name.replace("/", "-")
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "scenes"], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "see `clipfast models`"
        raise ModelError(f"no model is called {name!r}: {hint}")
    return name


def _text_encoder_needs_transformers(name: str) -> bool:
    config = open_clip.get_model_config(name) if ":" not in name else None
    return bool(config and config["text_cfg"].get("hf_model_name"))


def _check_pretrained(name: str, pretrained: str) -> None:
    known = tags(name)
    if pretrained in known or open_clip.get_pretrained_cfg(name, pretrained):
        return
    if os.path.isdir(pretrained):
        hint = _hugging_face_hint(Path(pretrained))
        raise ModelError(f"pretrained={pretrained} is a folder, not a checkpoint file{hint}")
    if not os.path.isfile(pretrained):
        listed = f"its tags are {', '.join(known)}" if known else "it has no tags"
        raise ModelError(f"pretrained={pretrained!r} is neither a file nor a tag of {name}: {listed}")


_HUGGING_FACE = "open_clip's own format is needed: load the same model by its open_clip name and tag"


def _hugging_face_hint(folder: Path) -> str:
    """What to say of a folder that Hugging Face's transformers wrote."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f": it is a Hugging Face model (model_type {str(kind)[:40]}): load the folder by itself"


def explain(name: str, checkpoint: str | None, error: Exception) -> str:
    """One line about an error of a loader."""
    text = " ".join(str(error).split())
    source = f"{name} with {checkpoint}" if checkpoint else name
    if any(sign in text for sign in ("Error(s) in loading state_dict", "size mismatch", "width changed")):
        if '"vision_model.' in text or '"text_model.' in text:
            return f"the checkpoint {checkpoint} holds a Hugging Face model's weights: {_HUGGING_FACE}"
        return f"the checkpoint {checkpoint} does not fit {name}: {text.split(': ', 1)[-1][:160]}"
    archive = _archive(checkpoint)
    if archive:
        return f"the checkpoint {checkpoint} is {archive}"
    refused = "Weights only load failed" in text or "Unpickling" in type(error).__name__
    if refused and checkpoint is not None and _may_be_a_checkpoint(checkpoint):
        return f"the checkpoint {checkpoint} holds more than weights and is not loaded: convert it to safetensors"
    if refused:
        return f"cannot read the checkpoint {checkpoint}: neither safetensors nor a file that torch wrote"
    if "download" in text:
        return f"cannot download the weights of {source}: check the network, or give a checkpoint's path"
    if checkpoint is not None and os.path.isfile(checkpoint):
        return f"cannot read the checkpoint {checkpoint}: damaged, or not a checkpoint ({text[:160]})"
    return f"cannot load {source}: {type(error).__name__}: {text[:200]}"


def _archive(path: str | None) -> str | None:
    """What a zip archive is that holds no weights of torch's, and what to do; None for any other file."""
    if path is None or not os.path.isfile(path) or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return None
    if not any(name.endswith("data.pkl") for name in inside):
        return "a zip archive without weights of torch's: unpack it and give the file of weights in it"
    return None


def _may_be_a_checkpoint(path: str) -> bool:
    """Whether a file begins as torch writes them: a zip archive or a pickle."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def activation_mismatch(name: str, pretrained: str | None) -> str | None:
    """A warning when weights were trained with another activation than the model's, else None.

    QuickGELU and GELU differ little per layer and ruin every number together.
    """
    config = open_clip.get_model_config(name) if ":" not in name else None
    if pretrained is None or config is None:
        return None
    built_quick = bool(config.get("quick_gelu", False))
    known = open_clip.get_pretrained_cfg(name, pretrained)
    in_archive = None
    if archives.is_archive(pretrained):
        in_archive = archives.uses_quick_gelu(archives.read(pretrained, tensors=False).classes)
    if known or in_archive is not None:
        trained_quick = bool(known.get("quick_gelu", False)) if known else bool(in_archive)
    else:
        stem = Path(pretrained).stem.lower()
        if not any(word in stem for word in ("openai", "quickgelu", "quick_gelu")):
            return None
        trained_quick = True
    if trained_quick == built_quick:
        return None
    words = ("QuickGELU", "GELU")
    trained, built = words if trained_quick else words[::-1]
    other = f"{name}-quickgelu" if trained_quick else name.removesuffix("-quickgelu")
    advice = f"use {other}" if other != name and other in names() else "its numbers will be off"
    return f"{pretrained} was trained with {trained}, but {name} is built with {built}: {advice}"


def trained_on(name: str, pretrained: str | None) -> dict[str, Any] | None:
    """Mean and standard deviation of the images that weights were trained with, as open_clip's list of tags has them.

    Args:
        name: of the model.
        pretrained: a tag; or a checkpoint's path, whose images are those of all tags of the name where these agree.

    Returns:
        ``mean`` and ``std``, or None where neither is known.
    """
    if pretrained is None or ":" in name or name not in names():
        return None
    listed = [pretrained] if open_clip.get_pretrained_cfg(name, pretrained) else tags(name)
    found = []
    for tag in listed:
        config = open_clip.get_pretrained_cfg(name, tag)
        found.append({"mean": config.get("mean") or OPENAI_MEAN, "std": config.get("std") or OPENAI_STD})
    return found[0] if found and all(each == found[0] for each in found) else None


# ------------------------------------------------------------------------------------------------ text and pixels


def _tokenizer(name: str, options: dict[str, str]) -> Callable[[Sequence[str]], Tensor] | None:
    try:
        tokenizer = open_clip.get_tokenizer(name, **options)
    except Exception as error:  # a tokenizer from the hub that cannot be fetched: images still work
        logger.warning("no tokenizer for %s (%s): texts must be given as features", name, type(error).__name__)
        return None
    return partial(_tokenize, tokenizer)


def default_tokenizer(module: nn.Module) -> Callable[[Sequence[str]], Tensor] | None:
    """open_clip's own tokenizer where a module's vocabulary is that tokenizer's, else None."""
    module = unwrap(module)
    text: Any = getattr(module, "text", module)
    if isinstance(module, CLIP | CustomTextCLIP | CoCa) and getattr(text, "vocab_size", None) == VOCABULARY:
        return tokenizer_of(text.context_length)
    return None


def tokenizer_of(context: int) -> Callable[[Sequence[str]], Tensor]:
    """CLIP's tokenizer for a model that reads this many tokens."""
    return partial(_tokenize, open_clip.SimpleTokenizer(context_length=context))


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Tokens ``[T, context]``; a text that would be cut off is an error, not a silent truncation."""
    context = tokenizer.context_length
    for text in texts:
        if hasattr(tokenizer, "encode"):
            length = len(tokenizer.encode(text)) + 2
        else:
            length = len(tokenizer.tokenizer(text)["input_ids"])
        if length > context:
            raise InputError(f"a text has {length} tokens, the model reads {context}: shorten {text[:60]!r}…")
    return cast(Tensor, tokenizer(list(texts)))


def has_text_encoder(module: nn.Module) -> bool:
    """Whether a module is a whole CLIP, not an image tower alone."""
    return hasattr(unwrap(module), "encode_text")


def encode_text(module: nn.Module, tokens: object, device: torch.device) -> Tensor:
    """Text features ``[T, D]`` of tokens ``[T, context]``, not normalised.

    Raises:
        InputError: tokens that the text encoder cannot read.
    """
    inner = cast(Any, unwrap(module))
    return cast(Tensor, inner.encode_text(check_tokens(inner, tokens).to(device), normalize=False))


def check_tokens(module: nn.Module, tokens: object) -> Tensor:
    """Tokens ``[T, context]`` that a model's text encoder can read.

    Raises:
        InputError: something else than integers in two axes, more tokens than the context, or a token that the
            vocabulary does not have.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or tokens.is_complex():
        shape = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError(f"the tokenizer gives {shape}: expected integers [texts, context] as one tensor")
    text = getattr(module, "text", module)
    context, vocabulary = getattr(text, "context_length", None), getattr(text, "vocab_size", None)
    if isinstance(context, int) and tokens.shape[1] > context:
        raise InputError(
            f"the tokenizer gives {tokens.shape[1]} tokens, the model reads {context}: use the model's own"
        )
    if isinstance(vocabulary, int) and tokens.numel():
        wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
        if len(wrong):
            number = int(wrong[0])
            raise InputError(f"the tokenizer gives token {number}, the model knows {vocabulary}: use the model's own")
    return tokens


def default_preprocess(module: nn.Module) -> Callable[[Image.Image], Tensor]:
    """The transform open_clip attached to a model it created, else its default at the tower's image size."""
    visual = vision_module(module)
    return preprocess_of(getattr(visual, "preprocess_cfg", None) or {"size": getattr(visual, "image_size", 224)})


def resized_preprocess(
    module: nn.Module, image_size: tuple[int, int], preprocess: Callable[[Image.Image], Tensor] | None = None
) -> Callable[[Image.Image], Tensor]:
    """The transform open_clip attached to a model it created, else its default, at another image size."""
    config = getattr(vision_module(module), "preprocess_cfg", None) or {}
    return preprocess_of({**config, "size": image_size})


def preprocess_of(config: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """open_clip's transform by its settings; those that are missing are CLIP's own."""
    return cast(Callable[[Image.Image], Tensor], image_transform_v2(PreprocessCfg(**config), is_train=False))
