"""Loading the model a command was asked for, and what is said about the software it ran with."""

import platform
from collections.abc import Sequence
from importlib import metadata

import torch
from torch import Tensor

import clipfast
from clipfast.commands import console
from clipfast.errors import InputError
from clipfast.model import Model, load

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

_TEXTS_AT_ONCE = 128


def check_device(name: str | None) -> torch.device | None:
    """A device by name, or None to choose.

    Raises:
        InputError: no such device here.
    """
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"no device is called {name!r}: try cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(f"there is no device {name}: {count} CUDA devices found, see `clipfast doctor`")
    elif device.type not in ("cpu", "mps"):
        raise InputError(f"device {name!r} is not supported: try cpu, cuda or cuda:0")
    return device


def load_model(name: str, pretrained: str | None, device: torch.device | None, dtype: str = "fp32") -> Model:
    """:func:`clipfast.load` behind a spinner.

    Raises:
        ModelError: as :func:`clipfast.load`.
    """
    with console.status(f"loading {name}"):
        return load(name, pretrained, device=device, dtype=DTYPES[dtype])


def encode_texts(model: Model, texts: Sequence[str]) -> Tensor:
    """Text features ``[T, D]``, unit norm, some texts at a time.

    Raises:
        InputError: a text that is too long, or a model without a text encoder.
    """
    parts = [model.encode_text(texts[at : at + _TEXTS_AT_ONCE]) for at in range(0, len(texts), _TEXTS_AT_ONCE)]
    return torch.cat(parts) if parts else torch.empty(0, model.tower.embed_dim, device=model.device)


def versions() -> dict[str, str | None]:
    """Versions of what computes; None for what is not installed."""
    packages = {
        "torch": "torch",
        "triton": "triton",
        "open_clip": "open_clip_torch",
        "numpy": "numpy",
        "pillow": "pillow",
        "safetensors": "safetensors",
    }
    return {"clipfast": clipfast.__version__, "python": platform.python_version()} | {
        name: _version(package) for name, package in packages.items()
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
