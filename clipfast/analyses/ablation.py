"""Mean-ablation: the embedding with some of its terms replaced by their mean over a data set, and what it costs.

``y' = Σ_kept c + Σ_ablated mean(c)``, with every ``c`` divided by the norm of its image's embedding as always, and
``y'`` not normalised again. Zero-shot logits are linear in the terms, so many ablations are judged in one pass over
the images: each term's logits are formed once and summed as every ablation says. Source: arXiv 2310.05916, section 3.

``B`` images, ``L`` layers, ``H`` heads, ``N`` tokens, ``E`` head_dim, ``D`` embed_dim, ``C`` classes, ``S`` ablations.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from clipfast.analyses.accuracy import Accuracy
from clipfast.analyses.moments import Moments
from clipfast.analyses.terms import Terms, as_terms
from clipfast.basis import Basis, autocast_disabled
from clipfast.contributions import Contributions
from clipfast.errors import InputError

Batch: TypeAlias = tuple[Contributions, Tensor] | tuple[Contributions, Tensor, Tensor]
"""Images with their labels ``[B]`` and, optionally, their groups ``[B]``."""

# ------------------------------------------------------------------------------------------------------- one ablation


def ablate(contributions: Contributions, terms: Terms | str, moments: Moments) -> Tensor:
    """Image features with some terms replaced by their mean.

    Args:
        contributions: the images.
        terms: what to ablate, or its text (:meth:`.Terms.parse`).
        moments: of the images whose mean is taken.

    Returns:
        ``[B, D]``, on the scale of ``embedding / norm``.

    Raises:
        InputError: moments of another model, no images in them, or a layer that is named and not kept.
        NotKept: the class token's part is named and was not kept.
    """
    check_basis(contributions.basis, moments.basis)
    chosen = as_terms(terms, contributions.basis)
    return kept_terms(contributions, chosen) + Means(moments).of(chosen).to(contributions.codes)


def kept_terms(contributions: Contributions, terms: Terms) -> Tensor:
    """The sum of all terms but these, ``[B, D]``; raises as :func:`ablate`."""
    gone = _Masks.of([terms], contributions.layers, "the contributions")
    with autocast_disabled(contributions.codes):
        basis = contributions.basis
        constants = _constants(contributions, basis)
        stays = [not terms.start, *(layer not in terms.mlps for layer in range(basis.layers))]
        total = contributions.start_and_mlps()[:, stays].sum(1)
        _check_rest(gone, basis)
        if not gone.rest.any():
            total = total + contributions.rest
        for position, layer in enumerate(contributions.layers):
            if terms.whole(layer):
                continue
            stay, part = 1 - gone.heads[0, position], gone.classes[0, position]
            codes = contributions.codes[:, position] * stay.to(contributions.codes)[:, None]
            if part.any():
                codes = codes - contributions.class_codes[:, position] * part.to(codes)[:, None]
            share = float(stay.sum()) - float(part.sum()) / contributions.token_count
            total = total + codes.flatten(1) @ basis.values(layer).flatten(0, 1) + share * constants[:, position]
        return total


def check_basis(mine: Basis, theirs: Basis) -> None:
    """Raises :class:`InputError` unless moments and contributions are of one model, wherever they are kept."""
    if not mine.same_as(theirs):
        raise InputError(
            "the moments are of another model, of other weights or of another centring, depth or image size"
        )


def _check_rest(gone: "_Masks", basis: Basis) -> None:
    if basis.kind == "upstream" and gone.rest.any():  # it holds the MLP of the pool, too
        raise InputError("layers that were not kept cannot be ablated before an attention pool: keep every layer")


@dataclass(frozen=True)
class _Masks:
    """Which terms each ablation replaces: 1 for a term that is ablated, else 0.

    Attributes:
        heads: ``[S, L, H]``, heads ablated as a whole.
        classes: ``[S, L, H]``, heads of which the class token's part alone is ablated.
        residual: ``[S, 1 + layers of the model]``, the start and every MLP.
        rest: ``[S, 1]``, the attention of the layers that are not kept.
    """

    heads: Tensor
    classes: Tensor
    residual: Tensor
    rest: Tensor

    @classmethod
    def of(cls, ablations: Sequence[Terms], layers: Sequence[int], where: str) -> "_Masks":
        masks = [cls._one(terms, layers, where) for terms in ablations]
        return cls(*(torch.stack(parts) for parts in zip(*masks, strict=True)))

    @staticmethod
    def _one(terms: Terms, layers: Sequence[int], where: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count, heads = terms.shape
        left_out = [layer for layer in range(count) if layer not in layers]
        rest = bool(left_out) and all(terms.whole(layer) for layer in left_out)
        named = [layer for layer in terms.layers if layer in left_out]
        if named and not rest:
            raise InputError(
                f"{where} keep layers {list(layers)} and layer {named[0]} is to be ablated: keep it too, or ablate all "
                "heads of every layer that is not kept"
            )
        whole, parts = torch.zeros(len(layers), heads), torch.zeros(len(layers), heads)
        for position, layer in enumerate(layers):
            whole[position, [head for head in range(heads) if (layer, head) in terms.heads]] = 1
            parts[position] = float(layer in terms.class_tokens)
        residual = torch.tensor([terms.start, *(layer in terms.mlps for layer in range(count))]).float()
        return whole, parts * (1 - whole), residual, torch.tensor([float(rest)])


class Means:
    """Mean contributions, expanded once for many ablations.

    Args:
        moments: where they are from.
    """

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    @cached_property
    def _heads(self) -> Tensor:
        return self._moments.means()  # [L, H, D]

    @cached_property
    def _classes(self) -> Tensor:
        return self._moments.class_means()  # [L, H, D]

    def of(self, terms: Terms) -> Tensor:
        """The sum of these terms' means, ``[D]``, float64; raises as :func:`ablate`."""
        residual, rest = self._moments.residual_means()
        gone = _Masks.of([terms], self._moments.layers, "the moments")
        total = gone.residual[0].to(residual) @ residual
        if gone.heads.any():
            total = total + (gone.heads[0].to(residual)[..., None] * self._heads).sum((0, 1))
        if gone.classes.any():
            total = total + (gone.classes[0].to(residual)[..., None] * self._classes).sum((0, 1))
        return total + rest if gone.rest.any() else total


def _constants(contributions: Contributions, basis: Basis) -> Tensor:
    """What every head adds besides its values, ``[B, L, C]``."""
    scale = 1 / (contributions.std * contributions.norm)
    return basis.constants(contributions.mean, contributions.std, contributions.layers) * scale[:, None, None]


# ------------------------------------------------------------------------------------------------ many ablations


class Ablations:
    """Zero-shot logits of the same images under many ablations.

    Args:
        classifier: ``[C, D]``.
        moments: of the images whose mean is taken.
        ablations: ``S`` sets of terms, at least one.

    Raises:
        InputError: no images in the moments, or a layer that is named and not in them.
        NotKept: the class token's part is named and the moments do not have it.
    """

    def __init__(self, classifier: Tensor, moments: Moments, ablations: Sequence[Terms]) -> None:
        self.classifier = classifier
        self.ablations = tuple(ablations)
        self._moments = moments
        self._basis: Basis | None = None  # with classes as columns
        self._of: Basis | None = None  # what it was made from
        self._masks: dict[tuple[int, ...], _Masks] = {}
        means = Means(moments)
        self._means = torch.stack([means.of(terms) for terms in self.ablations])  # [S, D]

    def logits(self, contributions: Contributions) -> Tensor:
        """``[S, B, C]``, each ``ablate(…) @ classifierᵀ``.

        Raises:
            InputError: images of another model than the moments', or a layer that is named and not kept.
            NotKept: the class token's part is named and was not kept.
        """
        with autocast_disabled(contributions.codes):
            classifier = self.classifier.to(contributions.codes)
            basis, gone = self._towards(contributions, classifier), self._gone(contributions)
            constants = _constants(contributions, basis)  # [B, L, C]
            base = contributions.total() @ classifier.T
            logits = base + (self._means.to(classifier) @ classifier.T)[:, None]  # [S, B, C]
            if gone.residual.any():
                logits -= _sum(gone.residual, contributions.start_and_mlps() @ classifier.T)
            _check_rest(gone, contributions.basis)
            if gone.rest.any():
                logits -= _sum(gone.rest, (contributions.rest @ classifier.T)[:, None])
            for position, layer in enumerate(contributions.layers):
                whole, parts, own = gone.heads[:, position], gone.classes[:, position], constants[:, position, None]
                if whole.any():
                    logits -= _sum(whole, _project(contributions.codes[:, position], basis.values(layer)) + own)
                if parts.any():
                    codes = contributions.class_codes[:, position]
                    own = own / contributions.token_count
                    logits -= _sum(parts, _project(codes, basis.values(layer)) + own)
            return logits

    def _towards(self, contributions: Contributions, classifier: Tensor) -> Basis:
        basis = contributions.basis
        if self._basis is None or basis is not self._of:
            check_basis(basis, self._moments.basis)
            # Batches read from files each have a basis of their own, all equal: the first is projected for all.
            if self._basis is None or self._basis.biases.device != basis.biases.device:
                self._basis = basis.towards(classifier)
            self._of = basis
        return self._basis

    def _gone(self, contributions: Contributions) -> _Masks:
        layers = contributions.layers
        if layers not in self._masks:
            self._masks[layers] = _Masks.of(self.ablations, layers, "the contributions")
        return self._masks[layers]


def _project(codes: Tensor, values: Tensor) -> Tensor:
    """``[B, H, E] × [H, E, C] → [B, H, C]``."""
    return torch.einsum("bhe,hec->bhc", codes, values)


def _sum(masks: Tensor, logits: Tensor) -> Tensor:
    """The logits ``[B, K, C]`` of the masked terms ``[S, K]`` summed, ``[S, B, C]``."""
    return torch.einsum("sk,bkc->sbc", masks.to(logits), logits)


def evaluate(
    batches: Iterable[Batch], classifier: Tensor, moments: Moments, ablations: Sequence[Terms | str]
) -> dict[Terms, Accuracy]:
    """Accuracy under many ablations in one pass over the images.

    Args:
        batches: ``(contributions, labels)`` or ``(contributions, labels, groups)``, integers ``[B]`` each.
        classifier: ``[C, D]``.
        moments: of the images whose mean is taken.
        ablations: what to ablate, each on its own.

    Returns:
        Accuracy by what was ablated, in the order given; the first is the baseline, nothing ablated. A baseline near
        chance is warned of.

    Raises:
        InputError: no images, or anything that does not fit.
        NotKept: the class token's part is named and was not kept.
    """
    nothing = Terms.of(moments.basis)
    chosen = [nothing, *(as_terms(terms, moments.basis) for terms in ablations)]
    accuracies = {terms: Accuracy(classifier) for terms in chosen}
    ablated = Ablations(classifier, moments, list(accuracies))
    for batch in batches:
        contributions, labels, groups = unpack(batch)
        for accuracy, logits in zip(accuracies.values(), ablated.logits(contributions), strict=True):
            accuracy.update_logits(logits, labels, groups)
    accuracies[nothing].warn_near_chance()
    return accuracies


def unpack(batch: Batch) -> tuple[Contributions, Tensor, Tensor | None]:
    """Contributions, labels and groups of a batch; None for groups where it has none.

    Raises:
        InputError: a batch of another form.
    """
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3) or not isinstance(batch[0], Contributions):
        raise InputError("a batch is (contributions, labels) or (contributions, labels, groups)")
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


@dataclass(frozen=True)
class Curves:
    """The paper's ablations of one data set.

    Attributes:
        baseline: nothing ablated.
        layers: entry ``l`` with the attention of layers 0 to ``l`` ablated.
        mlps: all MLPs ablated.
        class_token: the class token's own part of every layer's attention ablated.
        both: MLPs and class token.
    """

    baseline: Accuracy
    layers: tuple[Accuracy, ...]
    mlps: Accuracy
    class_token: Accuracy
    both: Accuracy


def curves(batches: Iterable[Batch], classifier: Tensor, moments: Moments) -> Curves:
    """Accuracy with layers ablated cumulatively from the first, all MLPs, the class token, and both: one pass.

    Args:
        batches: as for :func:`evaluate`, all layers kept, decomposed with ``class_token=True``.
        classifier: ``[C, D]``.
        moments: of images decomposed alike, whose mean is taken.

    Raises:
        InputError: as :func:`evaluate`.
        NotKept: decomposed without ``class_token=True``.
    """
    layers = Terms.cumulative(moments.basis)
    mlps, own = Terms.all_mlps(moments.basis), Terms.all_class_tokens(moments.basis)
    accuracies = evaluate(batches, classifier, moments, [*layers, mlps, own, mlps | own])
    return Curves(
        baseline=accuracies[Terms.of(moments.basis)],
        layers=tuple(accuracies[terms] for terms in layers),
        mlps=accuracies[mlps],
        class_token=accuracies[own],
        both=accuracies[mlps | own],
    )
