"""Correctness checks: what a result must agree with before it is timed.

Contributions are divided by the embedding's norm, so absolute errors of their sums are relative to 1. A single head or
token contributes little. The error of heads is therefore relative to the largest head. The error of the tokens of a
layer is the norm of the difference over the norm of the tokens, because one rounding decides the largest difference.
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
from clipfast.loading import wrap
from clipfast.towers.openclip import vision_module

BOUND = 1e-5
"""Largest error accepted in float32."""
BOUNDS = {torch.float64: 1e-9, torch.float32: BOUND, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest error accepted by dtype. bfloat16 rounds by 4e-3, and every layer rounds the residual stream."""
WITNESSES = 2
"""Images that are also decomposed in float64."""
CHEAP = 100_000_000
"""Towers with more parameters are not copied to float64 (0.8 GB)."""
CHEAP_TERMS = 256_000_000
"""The definition's tokens of one image and layer are compared up to this many bytes in float64 (ViT-B-32: 0.18 GB)."""


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN where the shapes differ or a value is NaN."""
    return float((a - b).abs().max()) if a.shape == b.shape else float("nan")


def relative(a: Tensor, b: Tensor) -> float:
    """:func:`difference` over the largest absolute value of ``b``."""
    return difference(a, b) / float(b.abs().max())


def relative_norm(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of ``b``: the error of all entries together; NaN where the shapes differ."""
    return float((a - b).norm() / b.norm()) if a.shape == b.shape else float("nan")


def against_plain(contributions: Contributions, heads: Tensor, embedding: Tensor, bound: float = BOUND) -> list[Check]:
    """A decomposition against the plain model's own embedding.

    Args:
        contributions: the decomposition.
        heads: ``[B, L, H, D]`` as measured.
        embedding: ``[B, D]`` of the plain forward.
        bound: largest error accepted.
    """
    expected = unit(embedding.to(contributions.norm.dtype))
    terms = heads.sum((1, 2)) + contributions.start_and_mlps().sum(1) + contributions.rest
    own = unit(contributions.embedding.to(contributions.norm.dtype))
    return [
        Check("embedding against the plain forward's", difference(own, expected), bound),
        Check("sum of all terms against the plain forward's embedding", difference(terms, expected), bound),
        Check("max_error()", contributions.max_error(), bound),
    ]


def against_naive(
    contributions: Contributions, attentions: Tensor, expected: naive.Result, bound: float = BOUND
) -> list[Check]:
    """A decomposition against the naive one.

    Args:
        contributions: the decomposition.
        attentions: ``[B, L, N, H, D]`` or ``[B, L, H, D]`` as measured.
        expected: the naive implementation's result.
        bound: largest error accepted.
    """
    what = "tokens" if expected.attentions.ndim == 5 else "heads"
    checks = [
        Check(f"{what} against the naive implementation's", relative(attentions, expected.attentions), bound),
        Check(
            "start and MLPs against the naive implementation's",
            relative(contributions.start_and_mlps(), expected.start_and_mlps),
            bound,
        ),
        Check("max_error()", contributions.max_error(), bound),
    ]
    if what == "tokens":
        heads = relative(contributions.heads(), expected.heads())
        checks.append(Check("heads against the naive sum over tokens", heads, bound))
    return checks


class Gate:
    """The checks of one case's outputs. They call the same callable that is timed afterwards.

    Made once per case. Every output is compared with the plain embedding and, where the model is small enough, with a
    :class:`Witness`.

    Attributes:
        bound: largest error accepted in the case's dtype.
    """

    def __init__(self, case: Case) -> None:
        self.bound = BOUNDS[case.model.dtype]
        self._texts = case.texts
        self._plain = plain(case.module, case.images)
        self._witness = Witness.of(case)
        self._float64 = None if self._witness is None else self._witness.contributions

    def verify(self, output: str, call: Callable[..., Any]) -> list[Check]:
        """The checks of one output.

        Args:
            output: its name.
            call: what :func:`clipfast.bench.outputs.call` returned for it.
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

    def _against_float64(self, name: str, actual: Tensor, expected: Tensor) -> Check:
        return self._check(f"{name} against float64", relative(actual[: len(expected)].to(expected.dtype), expected))

    def _embedding(self, embedding: Tensor, name: str) -> list[Check]:
        actual, expected = (unit(each.double()) for each in (embedding, self._plain))
        checks = [self._check(f"{name} against the plain forward's", difference(actual, expected))]
        if self._float64 is not None:
            witness = unit(self._float64.embedding)
            checks.append(self._check(f"{name} against float64", difference(actual[: len(witness)], witness)))
        return checks

    def _naive(self, result: naive.Result) -> list[Check]:
        heads = result.heads().double()
        terms = heads.sum((1, 2)) + result.start_and_mlps.double().sum(1)
        error = difference(terms, unit(self._plain.double()))
        checks = [self._check("sum of the naive terms against the plain forward's embedding", error)]
        if self._float64 is not None:
            checks.append(self._against_float64("naive heads", heads, self._float64.heads()))
        return checks

    def _heads(self, output: str, contributions: Contributions, heads: Tensor) -> list[Check]:
        witness = self._float64
        checks = against_plain(contributions, heads, self._plain, self.bound)
        if witness is not None:
            checks.append(self._against_float64("heads", heads, witness.heads()))
        if self._witness is not None:
            checks += self._witness.heads + (self._witness.tokens if output == "maps" else [])
        if output == "heads":
            return checks
        rows = float((contributions.attention.sum(-1) - 1).abs().max())
        checks.append(self._check("rows of attention against 1", rows))
        if witness is not None:
            checks.append(self._against_float64("attention", contributions.attention, witness.attention))
        if output == "maps":
            scores = heads.sum((1, 2)) @ self._texts.to(heads).T
            error = difference(contributions.maps.sum(1), scores)
            checks.append(self._check("maps summed over tokens against the heads' scores", error))
            if witness is not None:
                checks.append(self._against_float64("maps", contributions.maps, witness.maps))
        return checks

    def _tokens(self, call: Callable[..., Any]) -> list[Check]:
        witness = self._float64
        sums: list[Tensor] = []  # per layer, [B, H, D]
        errors: list[float] = []

        def take(layer: int, tokens: Tensor) -> None:
            sums.append(tokens.sum(1))
            if witness is not None:
                expected = witness.tokens(layer)
                errors.append(relative_norm(tokens[: len(expected)].to(expected.dtype), expected))

        contributions: Contributions = call(take=take)
        heads = torch.stack(sums, 1)
        checks = against_plain(contributions, heads, self._plain, self.bound)
        checks.append(self._check("tokens summed against the heads", relative(heads, contributions.heads())))
        if witness is not None:
            worst = float(torch.tensor(errors).max())  # max() of a list can lose a NaN
            checks.append(self._check("tokens against float64", worst))
        return checks + ([] if self._witness is None else self._witness.tokens)


@dataclass(frozen=True)
class Witness:
    """The first images of a case, decomposed in float64 by the eager backend and compared with the definition.

    Attributes:
        contributions: with everything kept.
        heads: checks of its heads against the definition, where the definition covers this model.
        tokens: checks of its tokens against the definition, where they fit in memory.
    """

    contributions: Contributions
    heads: list[Check]
    tokens: list[Check]

    @classmethod
    def of(cls, case: Case) -> "Witness | None":
        """The witness of a case, or None where a copy of the model would be too large."""
        visual = vision_module(case.module)
        if sum(parameter.numel() for parameter in visual.parameters()) > CHEAP:
            return None
        visual = copy.deepcopy(visual).double()
        model = wrap(visual, backend="eager")
        images, texts = case.images[:WITNESSES].double(), case.texts.double()
        contributions = model.decompose(images, texts=texts, maps="summed", attention=True, tokens=True)
        if naive_refusals(case):
            return cls(contributions, [], [])
        tower, bound = model.tower, BOUNDS[torch.float64]
        spatial = 8 * tower.tokens**2 * tower.heads * tower.width <= CHEAP_TERMS
        written = naive.decompose(visual, images[:1], spatial=spatial)
        error = relative(contributions.heads()[:1], written.heads())
        heads = [Check("float64 heads against the definition's", error, bound)]
        if not spatial:
            return cls(contributions, heads, [])
        layers = [contributions.tokens(layer)[:1] for layer in contributions.layers]
        error = relative(torch.stack(layers, 1), written.attentions)
        return cls(contributions, heads, [Check("float64 tokens against the definition's", error, bound)])
