"""The callables that are compared: the model's own forward, and the outputs of a decomposed forward.

Outputs are computed as a user would compute them: heads are formed, and tokens ``[B, L, N, H, D]`` are formed one layer
at a time and freed, because all layers together do not fit in memory.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from clipfast.bench import naive
from clipfast.bench.inputs import DTYPES, TEXTS, module, noise, unit_texts
from clipfast.bench.measuring import Call
from clipfast.contributions import Contributions
from clipfast.errors import InputError
from clipfast.loading import wrap
from clipfast.model import Model
from clipfast.towers.openclip import vision_module

PLAIN = "plain"
COMPILED = "plain compiled"
NAIVE_HEADS = "naive heads"
NAIVE_TOKENS = "naive tokens"
OUTPUTS = (PLAIN, "heads", "attention", "maps", "tokens")
"""Outputs by name; each after ``heads`` keeps something more."""
NAIVE_FORM = {"heads": NAIVE_HEADS, "attention": NAIVE_HEADS, "maps": NAIVE_TOKENS, "tokens": NAIVE_TOKENS}
"""Output → the naive form that computes it."""

Take = Callable[[int, Tensor], None]
"""A consumer of one layer's tokens: layer, ``[B, N, H, D]``."""


@dataclass(frozen=True)
class Case:
    """One model with its inputs.

    Attributes:
        module: the model itself.
        model: the same, wrapped with the backend that is measured.
        images: ``[B, 3, height, width]``.
        texts: ``[T, D]``, unit norm.
    """

    module: nn.Module
    model: Model
    images: Tensor
    texts: Tensor

    @classmethod
    def of(cls, module: nn.Module, batch: int, *, backend: str = "auto", texts: int = TEXTS) -> "Case":
        """A model with noise for images and random directions for texts, in its dtype and on its device.

        Raises:
            InputError: a backend that does not exist or cannot run here.
            UnsupportedTower: a model that cannot be decomposed.
        """
        model = wrap(module, backend=backend)
        device = str(model.device)
        images = noise(vision_module(module), batch, device, dtype=model.dtype)
        return cls(module, model, images, unit_texts(model.tower.embed_dim, device, texts))


# ------------------------------------------------------------------------------------------------- what is measured


def plain(module: nn.Module, images: Tensor) -> Tensor:
    """open_clip's own forward, ``[B, D]``."""
    with torch.inference_mode():
        return cast(Tensor, cast(Any, module).encode_image(images))


def heads_only(model: Model, images: Tensor) -> tuple[Contributions, Tensor]:
    """The decomposed forward and every head's contribution ``[B, L, H, D]``, without tokens."""
    contributions = model.decompose(images)
    return contributions, contributions.heads()


def with_attention(model: Model, images: Tensor) -> tuple[Contributions, Tensor]:
    """The same with attention weights ``[B, L, H, N]`` kept."""
    contributions = model.decompose(images, attention=True)
    return contributions, contributions.heads()


def explain(model: Model, images: Tensor, texts: Tensor) -> tuple[Contributions, Tensor]:
    """The decomposed forward with text maps and attention, and every head's contribution ``[B, L, H, D]``."""
    contributions = model.decompose(images, texts=texts, maps="summed", attention=True)
    return contributions, contributions.heads()


def each_token(model: Model, images: Tensor, take: Take = lambda layer, tokens: None) -> Contributions:
    """The decomposed forward; ``take`` gets the contributions of tokens, ``[B, N, H, D]``, layer by layer."""
    contributions = model.decompose(images, attention=True, tokens=True)
    for layer in contributions.layers:
        take(layer, contributions.tokens(layer))
    return contributions


def written_out(module: nn.Module, images: Tensor, *, spatial: bool) -> naive.Result:
    """The definition, with every tensor of it in memory (:mod:`clipfast.bench.naive`)."""
    return naive.decompose(vision_module(module), images, spatial=spatial)


def compiled(case: Case) -> Call:
    """The model's own forward through ``torch.compile``, compiled before it is returned."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # the compiler warns that there is no GPU
    torch.compiler.reset()  # every batch size is compiled on its own, which is fastest
    forward = torch.compile(vision_module(case.module), dynamic=False)

    def call() -> Tensor:
        with torch.inference_mode():
            out = forward(case.images)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)  # CoCa's tower returns its tokens too

    call()
    return call


def naive_refusals(case: Case) -> list[str]:
    """Reasons why the naive form does not cover a model; empty where it does."""
    return [] if case.model.tower.pooling == "cls" else ["the naive form reads a class token, this model pools patches"]


def call(case: Case, output: str) -> Call:
    """An output by name, ready to run.

    Raises:
        InputError: the naive form does not cover the model.
    """
    if output == COMPILED:
        return compiled(case)
    if output in (NAIVE_HEADS, NAIVE_TOKENS):
        reasons = naive_refusals(case)
        if reasons:
            raise InputError("; ".join(reasons))
        return partial(written_out, case.module, case.images, spatial=output == NAIVE_TOKENS)
    calls: dict[str, Call] = {
        PLAIN: partial(plain, case.module, case.images),
        "heads": partial(heads_only, case.model, case.images),
        "attention": partial(with_attention, case.model, case.images),
        "maps": partial(explain, case.model, case.images, case.texts),
        "tokens": partial(each_token, case.model, case.images),
    }
    return calls[output]


def build(
    output: str,
    *,
    model: str,
    batch: int,
    dtype: str,
    backend: str,
    texts: int,
    threads: int,
    device: str = "cpu",
    image_size: Sequence[int] | None = None,
) -> Call:
    """An output from plain values, so that a new process can build the same (:mod:`clipfast.bench.memory`)."""
    torch.set_num_threads(threads)
    size = None if image_size is None else (image_size[0], image_size[1])
    built = module(model, device, dtype=DTYPES[dtype], image_size=size)
    return call(Case.of(built, batch, backend=backend, texts=texts), output)
