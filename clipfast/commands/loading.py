"""Loading the model that a command's options name, and the versions of the software it runs with."""

import platform
from importlib import metadata

import torch

import clipfast
from clipfast.commands import console
from clipfast.commands.options import DTYPE, MODEL, ImageOptions, parse_size, size_text
from clipfast.errors import InputError
from clipfast.loading import load
from clipfast.model import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def parse_device(name: str) -> torch.device:
    """A device by name, whether it is here or not.

    Raises:
        InputError: no device has such a name.
    """
    try:
        return torch.device(name)
    except RuntimeError:
        raise InputError(f"no device is called {name!r}: try cpu, cuda or cuda:0") from None


def check_device(name: str | None) -> torch.device | None:
    """A device by name, or None to choose.

    Raises:
        InputError: no such device here.
    """
    if name is None:
        return None
    device = parse_device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(f"there is no device {name}: {count} CUDA devices found, see `clipfast doctor`")
    elif device.type not in ("cpu", "mps"):
        raise InputError(f"device {name!r} is not supported: try cpu, cuda or cuda:0")
    return device


def load_model(
    name: str,
    pretrained: str | None,
    device: torch.device | None,
    dtype: str = "fp32",
    image_size: tuple[int, int] | None = None,
) -> Model:
    """:func:`clipfast.load` behind a spinner; says on stderr which device the model runs on.

    Raises:
        ModelError: as :func:`clipfast.load`.
        InputError: an image size that the model cannot be given.
    """
    with console.status(f"loading {name}"):
        model = load(name, pretrained, device=device, dtype=DTYPES[dtype], image_size=image_size)
    size = "" if image_size is None else f", images of {size_text(image_size)}"
    console.note(f"model {name} on {model.device}, {dtype}{size}")
    return model


def load_model_of(options: ImageOptions) -> Model:
    """The model that a command's options name, on the device they name.

    Raises:
        ClipfastError: no such device, or a model that cannot be loaded.
    """
    name, dtype = options.model or MODEL, options.dtype or DTYPE
    size = parse_size(options.image_size)
    return load_model(name, options.pretrained, check_device(options.device), dtype, size)


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
