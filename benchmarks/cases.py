"""The models, images and texts that the questions are asked about, and the calls that are compared.

Weights are random and seeded: speed does not depend on what they are, and nothing has to be downloaded. Biases and
LayerNorm parameters are random too, so that a check sees every term; images are noise, never zeros, which some kernels
multiply faster.

Each ``…_call`` builds everything from plain numbers, so that a fresh process can do the same
(:mod:`benchmarks.memory`).
"""

from collections.abc import Callable
from typing import Any, cast

import open_clip
import torch
from torch import Tensor, nn

import clipfast
from benchmarks import naive
from benchmarks.measuring import Check
from clipfast import Contributions, Model

TEXTS = 16
BOUND = 1e-5
"""Largest error accepted between unit-norm quantities in float32."""


def module(name: str, device: str = "cpu", seed: int = 0) -> nn.Module:
    """An open_clip model with seeded random weights, nothing in it zero or one by construction."""
    torch.manual_seed(seed)
    built = open_clip.create_model(name, pretrained=None, load_weights=False, precision="fp32", device="cpu").eval()
    randomize(cast(nn.Module, built.visual))
    return cast(nn.Module, built.to(device))


@torch.no_grad()
def randomize(visual: nn.Module) -> None:
    """Moves every bias and LayerNorm parameter away from 0 and 1."""
    for parameter in visual.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.05 * torch.randn_like(parameter))


def noise(visual: Any, batch: int, device: str = "cpu", seed: int = 1) -> Tensor:
    """Images of noise, ``[batch, 3, height, width]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *visual.image_size, generator=generator).to(device)


def unit_texts(width: int, device: str = "cpu", count: int = TEXTS, seed: int = 2) -> Tensor:
    """Random unit features standing for texts, ``[count, width]``."""
    features = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return unit(features).to(device)


def plain(module: nn.Module, images: Tensor) -> Tensor:
    """open_clip's own forward, ``[B, D]``."""
    with torch.inference_mode():
        return cast(Tensor, cast(Any, module).encode_image(images))


def explain(model: Model, images: Tensor, texts: Tensor) -> tuple[Contributions, Tensor]:
    """The decomposed forward with text maps and attention, and every head's contribution ``[B, L, H, D]``."""
    found = model.decompose(images, texts=texts, maps="summed", attention=True)
    return found, found.heads()


def heads_only(model: Model, images: Tensor) -> tuple[Contributions, Tensor]:
    """The decomposed forward and every head's contribution ``[B, L, H, D]``, without tokens."""
    found = model.decompose(images)
    return found, found.heads()


def all_tokens(model: Model, images: Tensor) -> tuple[Contributions, Tensor]:
    """The decomposed forward and every token's contribution through every head, ``[B, L, N, H, D]``."""
    found = model.decompose(images, attention=True, tokens=True)
    return found, torch.stack([found.tokens(layer) for layer in found.layers], 1)


def unit(embedding: Tensor) -> Tensor:
    """Rows divided by their norms."""
    return cast(Tensor, embedding / embedding.norm(dim=-1, keepdim=True))


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN where the shapes differ or a value is NaN."""
    return float((a - b).abs().max()) if a.shape == b.shape else float("nan")


def relative(a: Tensor, b: Tensor) -> float:
    """:func:`difference` over the largest value of ``b``: single tokens add very little each."""
    return difference(a, b) / float(b.abs().max())


def against_plain(found: Contributions, heads: Tensor, embedding: Tensor) -> list[Check]:
    """A decomposition against the plain model's own embedding.

    Args:
        found: the decomposition.
        heads: ``[B, L, H, D]`` as measured.
        embedding: ``[B, D]`` of the plain forward.
    """
    terms = heads.sum((1, 2)) + found.mlps.sum(1) + found.rest
    return [
        Check("embedding against the plain forward's", difference(unit(found.embedding), unit(embedding)), BOUND),
        Check("sum of all terms against the plain forward's embedding", difference(terms, unit(embedding)), BOUND),
        Check("check()", found.check(), BOUND),
    ]


def against_naive(found: Contributions, attentions: Tensor, wanted: naive.Result) -> list[Check]:
    """A decomposition against the naive one.

    Args:
        found: the decomposition.
        attentions: ``[B, L, N, H, D]`` or ``[B, L, H, D]`` as measured.
        wanted: the naive implementation's result.
    """
    what = "tokens" if wanted.attentions.ndim == 5 else "heads"
    checks = [
        Check(f"{what} against the naive implementation's", relative(attentions, wanted.attentions), BOUND),
        Check("mlps against the naive implementation's", relative(found.mlps, wanted.mlps), BOUND),
        Check("check()", found.check(), BOUND),
    ]
    if what == "tokens":
        heads = relative(found.heads(), wanted.heads())
        checks.append(Check("heads against the naive sum over tokens", heads, BOUND))
    return checks


# ------------------------------------------------------------------------------------- calls a fresh process can build


def _start(name: str, batch: int, threads: int, device: str) -> tuple[nn.Module, Model, Tensor, Tensor]:
    """The same start for every side: model, wrapped model, images, texts."""
    torch.set_num_threads(threads)
    built = module(name, device)
    model = clipfast.wrap(built)
    return built, model, noise(built.visual, batch, device), unit_texts(model.tower.embed_dim, device)


def plain_call(name: str, batch: int, threads: int, device: str = "cpu") -> Callable[[], object]:
    """:func:`plain`, ready to run."""
    built, _, images, _ = _start(name, batch, threads, device)
    return lambda: plain(built, images)


def explain_call(name: str, batch: int, threads: int, device: str = "cpu") -> Callable[[], object]:
    """:func:`explain`, ready to run."""
    _, model, images, texts = _start(name, batch, threads, device)
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
    return lambda: naive.decompose(built.visual, images, spatial=spatial)
