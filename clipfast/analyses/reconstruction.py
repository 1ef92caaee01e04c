"""Heads replaced by what their texts span: how much of zero-shot accuracy a few texts per head account for.

Source: arXiv 2310.05916, section 4.2.

``B`` images, ``G`` heads replaced, ``m`` texts per head (``M`` at most), ``D`` embed_dim, ``C`` classes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.analyses.ablation import Ablations, Batch, unpack
from clipfast.analyses.accuracy import Accuracy
from clipfast.analyses.moments import Moments
from clipfast.analyses.terms import Terms, as_terms
from clipfast.analyses.textspan import TextSpan
from clipfast.basis import autocast_disabled
from clipfast.contributions import Contributions
from clipfast.errors import InputError
from clipfast.indices import resolve_heads


@dataclass(frozen=True)
class Reconstructions:
    """Accuracy with heads replaced by what their texts span.

    Attributes:
        baseline: nothing replaced and nothing ablated.
        sizes: entry ``m`` with ``m`` texts per head, or all of a head that has fewer; with none a head is its mean.
    """

    baseline: Accuracy
    sizes: tuple[Accuracy, ...]


def reconstruction_curve(
    batches: Iterable[Batch],
    classifier: Tensor,
    spans: Mapping[tuple[int, int], TextSpan],
    *,
    moments: Moments | None = None,
    ablated: Terms | str | None = None,
) -> Reconstructions:
    """Accuracy with heads replaced by :meth:`.TextSpan.reconstruct`, for every number of texts in one pass.

    Args:
        batches: ``(contributions, labels)`` or ``(contributions, labels, groups)``.
        classifier: ``[C, D]``.
        spans: the texts of each head that is replaced, by (layer, head), layers negative from the end.
        moments: of the images whose mean is taken, where terms are ablated.
        ablated: terms to mean-ablate besides, none of a head that is replaced. The paper's: all MLPs, and the
            attention of every layer that is not replaced.

    Returns:
        Accuracies; a baseline near chance is warned of.

    Raises:
        InputError: no spans, no images, a head that is replaced and ablated, or anything that does not fit.
    """
    if not spans:
        raise InputError("no spans were given: name the heads to replace")
    longest = max(len(span.directions) for span in spans.values())
    baseline, sizes = Accuracy(classifier), tuple(Accuracy(classifier) for _ in range(longest + 1))
    replaced: _Replaced | None = None
    for batch in batches:
        contributions, labels, groups = unpack(batch)
        if replaced is None:
            replaced = _Replaced(contributions, classifier, spans, longest, moments, ablated)
        whole, logits = replaced.logits(contributions)
        baseline.update_logits(whole, labels, groups)
        for size, accuracy in enumerate(sizes):
            accuracy.update_logits(logits[:, size], labels, groups)
    baseline.warn_near_chance()
    return Reconstructions(baseline, sizes)


class _Replaced:
    """Logits for every number of texts: directions are orthonormal and nested, so one text more is one sum more."""

    def __init__(
        self,
        contributions: Contributions,
        classifier: Tensor,
        spans: Mapping[tuple[int, int], TextSpan],
        longest: int,
        moments: Moments | None,
        ablated: Terms | str | None,
    ) -> None:
        basis, like = contributions.basis, contributions.codes
        self._heads = resolve_heads(spans, basis.layers, basis.heads)
        self._classifier = classifier.to(like)
        self._means = torch.stack([span.mean.to(like) for span in spans.values()])  # [G, D]
        self._directions = like.new_zeros(len(spans), longest, basis.columns)
        for rows, span in zip(self._directions, spans.values(), strict=True):
            rows[: len(span.directions)] = span.directions
        with autocast_disabled(like):
            self._direction_logits = self._directions @ self._classifier.T  # [G, M, C]
        terms = Terms.of(basis) if ablated is None else as_terms(ablated, basis)
        twice = [(layer, head) for layer, head in self._heads if (layer, head) in terms.heads]
        twice += [(layer, head) for layer, head in self._heads if layer in terms.class_tokens]
        if twice:
            raise InputError(f"L{twice[0][0]}.H{twice[0][1]} is to be replaced by its texts and ablated: choose one")
        self._ablations: Ablations | None = None
        if terms:
            if moments is None:
                raise InputError(f"to ablate {terms} the moments of a data set are needed: pass moments=…")
            self._ablations = Ablations(classifier, moments, [terms])

    def logits(self, contributions: Contributions) -> tuple[Tensor, Tensor]:
        """Of the whole embedding, ``[B, C]``, and for each number of texts, ``[B, M + 1, C]``."""
        with autocast_disabled(contributions.codes):
            whole = contributions.total() @ self._classifier.T
            base = whole if self._ablations is None else self._ablations.logits(contributions)[0]
            outputs = torch.stack([contributions.head(layer, head) for layer, head in self._heads], 1)
            varying = outputs - self._means  # [B, G, D]
            along = torch.einsum("bgd,gmd->bgm", varying, self._directions)
            start = base - varying.sum(1) @ self._classifier.T  # every head at its mean
            steps = torch.einsum("bgm,gmc->bmc", along, self._direction_logits)
            return whole, torch.cat([start[:, None], steps], 1).cumsum(1)
