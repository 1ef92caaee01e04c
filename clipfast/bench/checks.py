"""The gate: what a result must agree with before its speed means anything.

Contributions are divided by the embedding's norm, so absolute errors of their sums are relative to a whole of 1. Single
heads and tokens add very little each; heads are compared relative to the largest of them, and the tokens of a layer by
the norm of their difference over their own norm, which no single rounding decides.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipfast.bench import naive
from clipfast.bench.inputs import unit
from clipfast.bench.measuring import Check
from clipfast.bench.outputs import COMPILED, NAIVE_HEADS, NAIVE_TOKENS, PLAIN, Case, naive_refusals, plain
from clipfast.contributions import Contributions
from clipfast.model import wrap
from clipfast.towers.openclip import vision_module

BOUND = 1e-5
"""Largest error accepted in float32."""
BOUNDS = {torch.float64: 1e-9, torch.float32: BOUND, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""The same by dtype. bfloat16 rounds by 4e-3 and the residual stream is rounded at every layer."""
WITNESSES = 2
"""Images that are decomposed in float64 too."""
CHEAP = 100_000_000
"""Most parameters of an image tower that is copied to float64 for that (0.8 GB)."""
CHEAP_TERMS = 256_000_000
"""Most bytes that the definition's tokens of one image and layer may take in float64: ViT-B-32's 0.18 GB may."""


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN where the shapes differ or a value is NaN."""
    return float((a - b).abs().max()) if a.shape == b.shape else float("nan")


def relative(a: Tensor, b: Tensor) -> float:
    """:func:`difference` over the largest value of ``b``: single tokens add very little each."""
    return difference(a, b) / float(b.abs().max())


def relative_norm(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b``: the error of all entries together; NaN where the shapes differ."""
    return float((a - b).norm() / b.norm()) if a.shape == b.shape else float("nan")


def against_plain(found: Contributions, heads: Tensor, embedding: Tensor, bound: float = BOUND) -> list[Check]:
    """A decomposition against the plain model's own embedding.

    Args:
        found: the decomposition.
        heads: ``[B, L, H, D]`` as measured.
        embedding: ``[B, D]`` of the plain forward.
        bound: largest error accepted.
    """
    wanted = unit(embedding.to(found.norm.dtype))
    terms = heads.sum((1, 2)) + found.start_and_mlps().sum(1) + found.rest
    own = unit(found.embedding.to(found.norm.dtype))
    return [
        Check("embedding against the plain forward's", difference(own, wanted), bound),
        Check("sum of all terms against the plain forward's embedding", difference(terms, wanted), bound),
        Check("max_error()", found.max_error(), bound),
    ]


def against_naive(found: Contributions, attentions: Tensor, wanted: naive.Result, bound: float = BOUND) -> list[Check]:
    """A decomposition against the naive one.

    Args:
        found: the decomposition.
        attentions: ``[B, L, N, H, D]`` or ``[B, L, H, D]`` as measured.
        wanted: the naive implementation's result.
        bound: largest error accepted.
    """
    what = "tokens" if wanted.attentions.ndim == 5 else "heads"
    checks = [
        Check(f"{what} against the naive implementation's", relative(attentions, wanted.attentions), bound),
        Check(
            "start and MLPs against the naive implementation's",
            relative(found.start_and_mlps(), wanted.start_and_mlps),
            bound,
        ),
        Check("max_error()", found.max_error(), bound),
    ]
    if what == "tokens":
        heads = relative(found.heads(), wanted.heads())
        checks.append(Check("heads against the naive sum over tokens", heads, bound))
    return checks


class Gate:
    """The checks of one case's outputs: each looks at what the very callable returns that is timed afterwards.

    Made once per case: the plain embedding and, where the model is small enough, a :class:`Witness` are what every
    output is compared with.

    Attributes:
        bound: largest error accepted in the case's dtype.
    """

    def __init__(self, case: Case) -> None:
        self.bound = BOUNDS[case.model.dtype]
        self._texts = case.texts
        self._plain = plain(case.module, case.images)
        self._witness = Witness.of(case)
        self._exact = None if self._witness is None else self._witness.found

    def verify(self, output: str, call: Callable[..., Any]) -> list[Check]:
        """The checks of one output.

        Args:
            output: its name.
            call: what :func:`clipfast.bench.outputs.call` gave for it.
        """
        if output in (PLAIN, COMPILED):
            return self._embedding(call(), f"{output} embedding")
        if output in (NAIVE_HEADS, NAIVE_TOKENS):
            return self._naive(call())
        if output == "tokens":
            return self._tokens(call)
        return self._heads(output, *call())

    def _check(self, name: str, error: float) -> Check:
        return Check(name, error, self.bound)

    def _against_exact(self, name: str, got: Tensor, wanted: Tensor) -> Check:
        return self._check(f"{name} against float64", relative(got[: len(wanted)].to(wanted.dtype), wanted))

    def _embedding(self, embedding: Tensor, name: str) -> list[Check]:
        got, wanted = (unit(each.double()) for each in (embedding, self._plain))
        checks = [self._check(f"{name} against the plain forward's", difference(got, wanted))]
        if self._exact is not None:
            exact = unit(self._exact.embedding)
            checks.append(self._check(f"{name} against float64", difference(got[: len(exact)], exact)))
        return checks

    def _naive(self, result: naive.Result) -> list[Check]:
        heads = result.heads().double()
        terms = heads.sum((1, 2)) + result.start_and_mlps.double().sum(1)
        apart = difference(terms, unit(self._plain.double()))
        checks = [self._check("sum of the naive terms against the plain forward's embedding", apart)]
        if self._exact is not None:
            checks.append(self._against_exact("naive heads", heads, self._exact.heads()))
        return checks

    def _heads(self, output: str, found: Contributions, heads: Tensor) -> list[Check]:
        exact = self._exact
        checks = against_plain(found, heads, self._plain, self.bound)
        if exact is not None:
            checks.append(self._against_exact("heads", heads, exact.heads()))
        if self._witness is not None:
            checks += self._witness.heads + (self._witness.tokens if output == "maps" else [])
        if output == "heads":
            return checks
        rows = float((found.attention.sum(-1) - 1).abs().max())
        checks.append(self._check("rows of attention against 1", rows))
        if exact is not None:
            checks.append(self._against_exact("attention", found.attention, exact.attention))
        if output == "maps":
            scores = heads.sum((1, 2)) @ self._texts.to(heads).T
            apart = difference(found.maps.sum(1), scores)
            checks.append(self._check("maps summed over tokens against the heads' scores", apart))
            if exact is not None:
                checks.append(self._against_exact("maps", found.maps, exact.maps))
        return checks

    def _tokens(self, call: Callable[..., Any]) -> list[Check]:
        exact = self._exact
        sums: list[Tensor] = []  # per layer, [B, H, D]
        errors: list[float] = []

        def take(layer: int, tokens: Tensor) -> None:
            sums.append(tokens.sum(1))
            if exact is not None:
                wanted = exact.tokens(layer)
                errors.append(relative_norm(tokens[: len(wanted)].to(wanted.dtype), wanted))

        found: Contributions = call(take=take)
        heads = torch.stack(sums, 1)
        checks = against_plain(found, heads, self._plain, self.bound)
        checks.append(self._check("tokens summed against the heads", relative(heads, found.heads())))
        if exact is not None:
            worst = float(torch.tensor(errors).max())  # max() of a list may lose a NaN
            checks.append(self._check("tokens against float64", worst))
        return checks + ([] if self._witness is None else self._witness.tokens)


@dataclass(frozen=True)
class Witness:
    """The first images of a case in float64: decomposed on the eager backend, and that held to the definition.

    Attributes:
        found: with everything kept.
        heads: its heads against the definition written out, where that is of this model.
        tokens: its tokens against the same, where they fit in memory.
    """

    found: Contributions
    heads: list[Check]
    tokens: list[Check]

    @classmethod
    def of(cls, case: Case) -> "Witness | None":
        """None where a copy of the model costs too much."""
        visual = vision_module(case.module)
        if sum(parameter.numel() for parameter in visual.parameters()) > CHEAP:
            return None
        visual = copy.deepcopy(visual).double()
        model = wrap(visual, backend="eager")
        images, texts = case.images[:WITNESSES].double(), case.texts.double()
        found = model.decompose(images, texts=texts, maps="summed", attention=True, tokens=True)
        if naive_refusals(case):
            return cls(found, [], [])
        tower, bound = model.tower, BOUNDS[torch.float64]
        spatial = 8 * tower.tokens**2 * tower.heads * tower.width <= CHEAP_TERMS
        written = naive.decompose(visual, images[:1], spatial=spatial)
        apart = relative(found.heads()[:1], written.heads())
        heads = [Check("float64 heads against the definition's", apart, bound)]
        if not spatial:
            return cls(found, heads, [])
        layers = [found.tokens(layer)[:1] for layer in found.layers]
        apart = relative(torch.stack(layers, 1), written.attentions)
        return cls(found, heads, [Check("float64 tokens against the definition's", apart, bound)])
