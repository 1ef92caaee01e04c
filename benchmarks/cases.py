"""The models, images and texts of the benchmarks, and the calls that they compare.

Models, images, texts and checks are those of ``clipfast bench`` (:mod:`clipfast.bench`). Each ``…_call`` builds its
inputs from plain values, so that a new process can call it as well (:mod:`clipfast.bench.memory`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import clipfast
from clipfast import Contributions, Model
from clipfast.bench import naive
from clipfast.bench.checks import BOUND, against_naive, against_plain, difference, relative
from clipfast.bench.inputs import DTYPES, TEXTS, module, noise, randomize, unit, unit_texts
from clipfast.bench.measuring import Check
from clipfast.bench.outputs import explain, heads_only, plain
from clipfast.kernels import native
from clipfast.kernels.linear import libraries
from clipfast.kernels.linear import native as native_linear

__all__ = [
    "BOUND",
    "TEXTS",
    "Check",
    "against_naive",
    "against_plain",
    "all_tokens",
    "difference",
    "explain",
    "heads_only",
    "instructions",
    "module",
    "noise",
    "plain",
    "randomize",
    "relative",
    "unit",
    "unit_texts",
]


def instructions() -> dict[str, Any]:
    """The CPU instructions in use, for the settings of a result."""
    fast = [name for name in ("bf16", "fp16") if native_linear.multiplies(DTYPES[name])]
    products = libraries.setting()
    return {"instructions": native.isa() or "none", "products": products, "products_of_16_bits": fast}


def all_tokens(model: Model, images: Tensor) -> tuple[Contributions, Tensor]:
    """The decomposed forward and every token's contribution through every head, ``[B, L, N, H, D]``."""
    contributions = model.decompose(images, attention=True, tokens=True)
    return contributions, torch.stack([contributions.tokens(layer) for layer in contributions.layers], 1)


# --------------------------------------------------------------------------------- calls that a new process can build


def _start(
    name: str, batch: int, threads: int, device: str, dtype: str = "fp32"
) -> tuple[nn.Module, Model, Tensor, Tensor]:
    """The inputs of every call: model, wrapped model, images, texts."""
    torch.set_num_threads(threads)
    built = module(name, device, dtype=DTYPES[dtype])
    model = clipfast.wrap(built)
    images = noise(built.visual, batch, device, dtype=DTYPES[dtype])
    return built, model, images, unit_texts(model.tower.embed_dim, device)


def plain_call(name: str, batch: int, threads: int, device: str = "cpu", dtype: str = "fp32") -> Callable[[], object]:
    """:func:`plain`, ready to run."""
    built, _, images, _ = _start(name, batch, threads, device, dtype)
    return lambda: plain(built, images)


def explain_call(name: str, batch: int, threads: int, device: str = "cpu", dtype: str = "fp32") -> Callable[[], object]:
    """:func:`explain`, ready to run."""
    _, model, images, texts = _start(name, batch, threads, device, dtype)
    return lambda: explain(model, images, texts)


def heads_only_call(name: str, batch: int, threads: int, device: str = "cpu") -> Callable[[], object]:
    """:func:`heads_only`, ready to run."""
    _, model, images, _ = _start(name, batch, threads, device)
    return lambda: heads_only(model, images)


def all_tokens_call(name: str, batch: int, threads: int, device: str = "cpu") -> Callable[[], object]:
    """:func:`all_tokens`, ready to run."""
    _, model, images, _ = _start(name, batch, threads, device)
    return lambda: all_tokens(model, images)


def naive_call(name: str, batch: int, threads: int, spatial: bool, device: str = "cpu") -> Callable[[], object]:
    """The naive implementation, ready to run."""
    built, _, images, _ = _start(name, batch, threads, device)
    visual: Any = built.visual
    return lambda: naive.decompose(visual, images, spatial=spatial)
