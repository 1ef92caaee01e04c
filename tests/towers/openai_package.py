"""OpenAI's ``clip`` package, whose setup asks for a module that setuptools no longer has."""

import importlib
import sys
from types import ModuleType
from typing import Any

import packaging.version
import pytest
import torch
from builders import randomise
from torch import Tensor

SIDE = 64
"""Pixels of an image's side: 2 × 2 positions of a ResNet's last feature map."""


def package() -> Any:
    """The package; the test is skipped where it is not installed."""
    if importlib.util.find_spec("clip") is None:
        pytest.skip("OpenAI's clip package is not installed", allow_module_level=True)
    if "clip" not in sys.modules and importlib.util.find_spec("pkg_resources") is None:
        # clip.clip imports packaging from it.
        stand_in = ModuleType("pkg_resources")
        stand_in.packaging = packaging  # type: ignore[attr-defined]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "pkg_resources", stand_in)
            return importlib.import_module("clip")
    return importlib.import_module("clip")


def build(layers: int | tuple[int, ...] = 3, seed: int = 0, vocabulary: int = 49408) -> Any:
    """A small CLIP of the package's class, random: a ViT of two heads, or a ResNet of as many blocks per stage."""
    is_resnet = isinstance(layers, tuple)
    clip = package().model.CLIP(20, SIDE, layers, 8 if is_resnet else 128, 16, 16, vocabulary, 64, 1, 1)
    return randomise(clip, seed).eval()


def pixels(images: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random preprocessed images."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, SIDE, SIDE, generator=generator).to(dtype)


def tokens(texts: int = 2, vocabulary: int = 49408) -> Tensor:
    """Random tokens with the end of the text in the middle."""
    generator = torch.Generator().manual_seed(2)
    listed = torch.randint(1, vocabulary - 1, (texts, 16), generator=generator)
    listed[:, 9] = vocabulary - 1
    return listed


def traced(clip: Any) -> Any:
    """The same traced, as OpenAI publishes it."""
    return torch.jit.trace(clip, (pixels(), tokens(vocabulary=clip.vocab_size)), check_trace=False)
