"""Features of texts, encoded some at a time and kept on disk.

Long lists are cut into blocks, and each block's features are kept in ``texts/`` of the cache folder
(``$CLIPFAST_CACHE``, default ``~/.cache/clipfast``), in one file under a digest of everything that they depend on: the
text encoder's weights and layers, its dtype and device, and the tokens. A block is always encoded whole, so features
from the cache have the bits of fresh ones. Files are written atomically, so processes may share the folder; a damaged
file is encoded anew.
"""

import contextlib
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn

from clipfast import storage
from clipfast.commands import console
from clipfast.commands.outcome import memory_for
from clipfast.errors import InputError
from clipfast.fingerprint import tensor_bytes
from clipfast.kernels import tuning
from clipfast.model import Model

FORMAT = "clipfast.texts/1"
BLOCK = 128
"""Texts that are encoded together."""
MIN_CACHED = 64
"""Shorter lists are encoded faster than a model's weights are read for their digest."""
MAX_BYTES = 1 << 30
"""What the folder may hold; the files that were not used for longest are removed."""

_digests: "WeakKeyDictionary[nn.Module, str]" = WeakKeyDictionary()


def encode_texts(model: Model, texts: Sequence[str]) -> Tensor:
    """Text features ``[T, D]``, unit norm; with a progress bar where there are several blocks.

    Raises:
        InputError: a text that is too long, or a model without a text encoder.
        OutOfMemory: the texts do not fit in memory.
    """
    if not texts:
        return torch.empty(0, model.tower.embed_dim, device=model.device)
    folder = cache_folder() if len(texts) >= MIN_CACHED and _can_tokenize(model) else None
    blocks = [texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK)]
    parts = []
    with console.progress("encoding texts", len(texts)) as advance, memory_for(len(texts), str(model.device), "texts"):
        for block in blocks:
            parts.append(model.encode_text(block) if folder is None else _cached(model, block, folder))
            advance(len(block))
    if folder is not None:
        _trim(folder)
    return torch.cat(parts)


@cache
def cache_folder() -> Path | None:
    """Where features are kept, created if need be; None where that is not possible."""
    folder = tuning.folder() / "texts"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder


def _can_tokenize(model: Model) -> bool:
    try:
        model.tokenize(["a"])
    except InputError:
        return False
    return True


def _cached(model: Model, texts: Sequence[str], folder: Path) -> Tensor:
    """Features of a block, from its file or else encoded and written there."""
    path = folder / f"{_key(model, texts)}.safetensors"
    shape = (len(texts), model.tower.embed_dim)
    with contextlib.suppress(InputError, OSError):
        _, tensors = storage.read(path, FORMAT, "clipfast", model.device)
        kept = tensors.get("features")
        if kept is not None and tuple(kept.shape) == shape:
            with contextlib.suppress(OSError):
                os.utime(path)  # used now: see _trim
            return kept
    features = model.encode_text(texts)
    with contextlib.suppress(OSError):  # a full disk costs the time of encoding again, no more
        storage.write(path, {"format": FORMAT}, {"features": features})
    return features


def _key(model: Model, texts: Sequence[str]) -> str:
    """A digest of what the features of texts depend on."""
    digest = xxhash.xxh3_128(f"{_encoder_digest(model)} {model.device.type} {torch.__version__}\n".encode())
    tokens = model.tokenize(texts)
    digest.update(f"{tokens.dtype} {list(tokens.shape)}\n".encode())
    digest.update(tensor_bytes(tokens))
    return digest.hexdigest()


def _encoder_digest(model: Model) -> str:
    """A digest of the layers and weights of a model without its vision tower; computed once for a module."""
    module = model.module
    if module not in _digests:
        digest = xxhash.xxh3_128()
        for name, child in module.named_children():
            if name != "visual":
                digest.update(f"{name} {child!r}\n".encode())  # activations and widths, which no weight tells
        for name, tensor in module.state_dict().items():
            if not name.startswith("visual."):
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor_bytes(tensor))
        _digests[module] = digest.hexdigest()
    return _digests[module]


def _trim(folder: Path) -> None:
    """Removes the files that were not used for longest until the others take at most :data:`MAX_BYTES`."""
    files = []
    with contextlib.suppress(OSError):
        for path in folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # another process removed it
                state = path.stat()
                files.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MAX_BYTES:
            break
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
