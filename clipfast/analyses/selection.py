"""Choosing heads to remove, from their texts or from a few labelled images that are not those of the test.

Nothing here sees the images on which a removal is judged: texts need no labels at all, and the other two ways take
a labelled set of their own. Every result is sorted and the same on every run. Source of the first way:
arXiv 2310.05916, section 4.3.

``B`` images, ``L`` layers, ``H`` heads, ``C`` classes, ``D`` embed_dim.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.analyses.ablation import Ablations
from clipfast.analyses.accuracy import Accuracy, check_integers
from clipfast.analyses.moments import Moments
from clipfast.analyses.terms import Terms, as_terms
from clipfast.analyses.textspan import TextSpan
from clipfast.contributions import Contributions
from clipfast.errors import InputError


class Chosen(NamedTuple):
    """A head and why it was chosen."""

    layer: int
    head: int
    score: float


def terms_of(chosen: Iterable[Chosen], moments: Moments) -> Terms:
    """The chosen heads as terms to ablate."""
    return Terms.of(moments.basis, heads=[(choice.layer, choice.head) for choice in chosen])


# ------------------------------------------------------------------------------------------------- from their texts


def matching(texts: Sequence[str], words: Iterable[str]) -> frozenset[int]:
    """Which texts contain any of the words: as whole words, upper and lower case alike.

    Args:
        texts: the pool.
        words: words or phrases; ``"sea"`` is found in "by the sea" and not in "a season".

    Raises:
        InputError: no words, or an empty one.
    """
    plain = [" ".join(word.casefold().split()) for word in words]
    if not plain or not all(plain):
        raise InputError("no words were given, or one is empty: name what a head's texts must contain")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, plain))})(?!\w)")
    return frozenset(i for i, text in enumerate(texts) if pattern.search(" ".join(text.casefold().split())))


def by_texts(
    spans: Mapping[tuple[int, int], TextSpan], matches: Collection[int], *, top: int = 5, at_least: int = 1
) -> list[Chosen]:
    """Heads with enough matching texts among their first ones.

    Args:
        spans: each head's texts, by (layer, head): :meth:`.Moments.textspan`.
        matches: indices into the pool that the texts were picked from, as :func:`matching` gives them.
        top: how many of a head's texts count, the first picked first.
        at_least: how many of these must match.

    Returns:
        Heads by how many of their texts match (the score), most first; equal ones by layer and head.

    Raises:
        InputError: ``at_least`` or ``top`` that no head can meet.
    """
    if not 1 <= at_least <= top:
        raise InputError(f"at_least is {at_least} and top {top}: at_least must be from 1 to top")
    matches = frozenset(matches)
    counted = [
        Chosen(layer, head, float(sum(pick in matches for pick in span.picks[:top])))
        for (layer, head), span in spans.items()
    ]
    return _sorted(choice for choice in counted if choice.score >= at_least)


# --------------------------------------------------------------------------------------- from a small labelled set


def by_contrast(contributions: Contributions, labels: Tensor, groups: Tensor, classifier: Tensor) -> list[Chosen]:
    """All heads by how differently they speak for one class in its different groups.

    With ``c[i]`` what a head adds to image ``i`` of class ``y = label[i]`` and ``w`` the classifier's rows, its margin
    is ``m[i] = c[i] · (w[y] − mean_{k≠y} w[k])``, and its score::

        mean over classes y of ( max_g − min_g of  mean{ m[i] : label[i] = y, group[i] = g } )

    over the groups ``g`` that have images of class ``y``, and the classes with at least two such groups. A head that
    tells the classes apart by themselves has the same margin in every group; one that reads what differs between
    the groups, such as a background, has not.

    Args:
        contributions: a small labelled set, not the one a removal is judged on.
        labels: integers ``[B]``.
        groups: integers ``[B]``.
        classifier: ``[C, D]``.

    Returns:
        Every kept head with its score, the largest first; equal ones by layer and head.

    Raises:
        InputError: shapes that do not fit, or no class that is in two groups.
    """
    labels, groups = _checked(contributions, labels, groups, classifier)
    logits = contributions.scores(classifier).heads  # [B, L, H, C]
    index = labels.to(logits.device)[:, None, None, None].expand(*logits.shape[:3], 1)
    own = logits.gather(3, index)[..., 0]
    margins = (own - (logits.sum(3) - own) / (logits.shape[3] - 1)).double()  # [B, L, H]
    spreads = []
    for label in labels.unique().tolist():
        members = [(labels == label) & (groups == group) for group in groups[labels == label].unique().tolist()]
        if len(members) > 1:
            means = torch.stack([margins[member.to(margins.device)].mean(0) for member in members])
            spreads.append(means.amax(0) - means.amin(0))
    if not spreads:
        raise InputError("no class has images in two groups: there is nothing to contrast")
    scores = torch.stack(spreads).mean(0).tolist()
    return _sorted(
        Chosen(layer, head, score)
        for layer, row in zip(contributions.layers, scores, strict=True)
        for head, score in enumerate(row)
    )


def greedy(
    contributions: Contributions,
    labels: Tensor,
    groups: Tensor,
    classifier: Tensor,
    moments: Moments,
    size: int,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    ablated: Terms | str | None = None,
) -> list[Chosen]:
    """Heads to mean-ablate one after the other, each the one that helps the worst group most.

    At every step the head is taken whose removal gives the highest worst-group accuracy; of equal ones the highest mean
    of groups; of equal ones the first by layer and head. It ends where no head raises the worst group, nor the mean of
    groups with the worst as it is.

    Args:
        contributions: a small labelled set, not the one the removal is judged on.
        labels: integers ``[B]``.
        groups: integers ``[B]``.
        classifier: ``[C, D]``.
        moments: of the images whose mean is taken.
        size: how many heads at most.
        heads: (layer, head) pairs to choose from, layers negative from the end; all kept ones for None.
        ablated: terms that are ablated beforehand; none.

    Returns:
        Heads in the order they were taken, each with the worst-group accuracy after it.

    Raises:
        InputError: shapes that do not fit, a size below one, or no such head.
        NotKept: the class token's part is ablated and was not kept.
    """
    if size < 1:
        raise InputError(f"size is {size}, expected at least 1")
    labels, groups = _checked(contributions, labels, groups, classifier)
    basis = contributions.basis
    gone = Terms.of(basis) if ablated is None else as_terms(ablated, basis)
    every = [(layer, head) for layer in contributions.layers for head in range(basis.heads)]
    candidates = sorted(Terms.of(basis, heads=every if heads is None else heads).heads - gone.heads)
    sets = [gone, *(gone | Terms.of(basis, heads=[pair]) for pair in candidates)]
    logits = Ablations(classifier, moments, sets).logits(contributions)  # [1 + candidates, B, C]
    changes = logits[1:] - logits[:1]  # removals add up
    state = logits[0]
    right = labels.to(logits.device)
    members = [(groups == group).to(logits.device) for group in groups.unique().tolist()]

    def judge(logits: Tensor) -> list[tuple[float, float]]:
        """Worst-group accuracy and mean of groups for each of ``[candidates, B, C]``."""
        hits = (logits.argmax(2) == right).double()
        by_group = torch.stack([hits[:, member].mean(1) for member in members], 1)
        return [(min(row), sum(row) / len(row)) for row in by_group.tolist()]

    best = judge(state[None])[0]
    taken: list[int] = []
    chosen: list[Chosen] = []
    while len(taken) < min(size, len(candidates)):
        scores = judge(state + changes)
        open_ones = [i for i in range(len(candidates)) if i not in taken]
        pick = max(open_ones, key=lambda i: (*scores[i], -i))
        if scores[pick] <= best:
            break
        best, state = scores[pick], state + changes[pick]
        taken.append(pick)
        chosen.append(Chosen(*candidates[pick], best[0]))
    return chosen


def _checked(contributions: Contributions, labels: Tensor, groups: Tensor, classifier: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and groups on the CPU, after the checks of :class:`.Accuracy`."""
    check_integers("groups", groups, len(contributions))
    Accuracy(classifier).update(contributions.total(), labels, groups)
    if not len(contributions):
        raise InputError("there are no images to choose by")
    return labels.cpu().long(), groups.cpu()


def _sorted(chosen: Iterable[Chosen]) -> list[Chosen]:
    return sorted(chosen, key=lambda choice: (-choice.score, choice.layer, choice.head))
