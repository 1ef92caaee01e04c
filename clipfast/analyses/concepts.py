"""Why an image is taken for one class rather than another: the concepts that image and text share.

A zero-shot choice is a difference of two similarities, ``⟨embedding/‖embedding‖, class − rival⟩``: the margin. It is
explained from both sides. *Text concepts* are texts of a pool that the image and the classes' difference both lie near
to; each has a share of the margin. *Visual concepts* are groups of patches whose contributions point the same way in
every head; each has a mask, a score, the heads that it speaks through and the texts nearest to it. Both are exact: the
shares and what is left sum to the margin, and so do the groups and the terms that are no patches.

The idea of looking for concepts that both encoders have is that of arXiv 2410.13016; how they are found is this
project's own.

``C`` classes, ``D`` embed_dim, ``T`` texts of the pool, ``P`` patches, ``G`` heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.analyses.clustering import kernel_k_means
from clipfast.analyses.ranking import largest
from clipfast.basis import autocast_disabled
from clipfast.contributions import Contributions
from clipfast.errors import InputError
from clipfast.indices import resolve_heads

Against = Literal["runner-up", "mean"]
WITHIN: Final = 0.05
"""A text ranks high on a side if it is among this share of the pool."""
_NEW: Final = 0.5
"""A text of which the texts before it leave less than this length says nothing new."""

# ---------------------------------------------------------------------------------------------------- what is explained


@dataclass(frozen=True, eq=False)
class Decision:
    """A zero-shot choice of one image: a class, what it is held against, and how far apart they are.

    Attributes:
        scores: ``[C]``, cosine similarities.
        target: the class that is explained.
        rival: the class it is held against; None for the mean of all others.
        direction: ``[D]``, the class's features less the rival's.
        margin: the similarity with ``direction``.
    """

    scores: Tensor
    target: int
    rival: int | None
    direction: Tensor
    margin: float


def decide(
    contributions: Contributions,
    classifier: Tensor,
    target: int | None = None,
    against: Against | int = "runner-up",
) -> Decision:
    """The choice of one image.

    Args:
        contributions: of one image.
        classifier: ``[C, D]``, unit rows of at least two classes.
        target: the class to explain; the most similar one for None.
        against: another class, ``"runner-up"`` for the most similar of the others, or ``"mean"`` for their mean.

    Raises:
        InputError: not one image, one class only, features of another width, or a class that does not exist.
    """
    if len(contributions) != 1:
        raise InputError(f"a choice is explained for one image at a time: here are {len(contributions)}")
    width = contributions.embedding.shape[1]
    if classifier.ndim != 2 or classifier.shape[1] != width:
        raise InputError(f"the classifier has shape {list(classifier.shape)}, expected [classes, {width}]")
    classes = len(classifier)
    if classes < 2:
        raise InputError("one class alone is no choice: give at least two")
    features = classifier.to(contributions.codes)
    embedding = contributions.embedding[0].to(features) / contributions.norm[0].to(features)
    scores = features @ embedding
    if not bool(scores.isfinite().all()):
        raise InputError("the similarity with a class is not finite: the image, a weight or the classifier is not")
    order = largest(scores, classes)[1].tolist()
    chosen = order[0] if target is None else _class(target, classes, "target")
    rival: int | None
    if against == "mean":
        rival = None
        direction = features[chosen] - features[[other for other in range(classes) if other != chosen]].mean(0)
    elif isinstance(against, str):
        if against not in get_args(Against):
            raise InputError(f"against is {against!r}: choose from {', '.join(get_args(Against))}, or name a class")
        rival = next(other for other in order if other != chosen)
        direction = features[chosen] - features[rival]
    else:
        rival = _class(against, classes, "against")
        if rival == chosen:
            raise InputError(f"class {chosen} is held against itself: name another")
        direction = features[chosen] - features[rival]
    return Decision(scores, chosen, rival, direction, float(embedding @ direction))


def _class(number: int, classes: int, name: str) -> int:
    if isinstance(number, bool) or not 0 <= number < classes:
        raise InputError(f"{name} is {number}: classes are 0 to {classes - 1}")
    return int(number)


# -------------------------------------------------------------------------------------------------------- text concepts


@dataclass(frozen=True)
class TextConcept:
    """A text that the image and the classes' difference both lie near to.

    Attributes:
        text: its number in the pool.
        image_score: cosine of the image's embedding with the text less the mean of the pool.
        image_rank: how many texts of the pool have a higher one.
        class_score: the same of the classes' difference.
        class_rank: how many texts have a higher one.
        share: its part of the margin, beyond what the texts before it explain.
    """

    text: int
    image_score: float
    image_rank: int
    class_score: float
    class_rank: int
    share: float


def text_concepts(
    embedding: Tensor,
    direction: Tensor,
    pool: Tensor,
    count: int = 8,
    within: float = WITHIN,
) -> list[TextConcept]:
    """Texts that rank high on the image's side and on the classes' side, the largest share of the margin first.

    Texts count less the mean of the pool, which all texts of CLIP have in common. Of those that rank high on both
    sides, that with the largest share is taken; then its direction ``q`` is removed from all others, so that another
    word for the same is not counted twice. A share is ``⟨image, q⟩ · ⟨direction, q⟩``; since the directions are
    orthogonal, the shares and what is left of the margin sum to it exactly.

    Args:
        embedding: ``[D]``, of the image, divided by its norm.
        direction: ``[D]``, the classes' difference: :attr:`Decision.direction`.
        pool: ``[T, D]``, unit rows of at least two texts.
        count: texts at most; fewer where no other ranks high on both sides and adds to the margin.
        within: the share of the pool that ranks high on a side.

    Raises:
        InputError: shapes that do not fit, fewer than two texts, or a share that is none.
    """
    if embedding.ndim != 1 or direction.shape != embedding.shape:
        raise InputError(f"the embedding is {list(embedding.shape)} and the direction {list(direction.shape)}")
    if pool.ndim != 2 or pool.shape[1] != len(embedding) or len(pool) < 2:
        raise InputError(f"the pool has shape {list(pool.shape)}, expected [texts, {len(embedding)}], two or more")
    if not 0 < within <= 1:
        raise InputError(f"within is {within}, expected a share of the pool")
    image, classes = embedding.to(torch.float64), direction.to(torch.float64)
    texts = centred(pool)
    image_scores, class_scores = texts @ F.normalize(image, dim=0), texts @ F.normalize(classes, dim=0)
    image_ranks, class_ranks = _ranks(image_scores), _ranks(class_scores)
    most = max(1, round(within * len(texts)))
    left = (image_ranks < most) & (class_ranks < most) & (image_scores > 0) & (class_scores > 0)
    rest, found = texts.clone(), []
    for _ in range(count):
        lengths = rest.norm(dim=1)
        left = left & (lengths > _NEW)
        unit = rest / lengths.clamp_min(_NEW)[:, None]
        on_image, on_classes = unit @ image, unit @ classes
        shares = torch.where(left & (on_image > 0) & (on_classes > 0), on_image * on_classes, 0)
        best = int(largest(shares, 1)[1])
        if float(shares[best]) <= 0:
            break
        rest = rest - (rest @ unit[best])[:, None] * unit[best]
        left[best] = False
        found.append(
            TextConcept(
                text=best,
                image_score=float(image_scores[best]),
                image_rank=int(image_ranks[best]),
                class_score=float(class_scores[best]),
                class_rank=int(class_ranks[best]),
                share=float(shares[best]),
            )
        )
    return found


def centred(pool: Tensor) -> Tensor:
    """Texts less the mean of the pool, normalised, ``[T, D]`` float64; a text that is the mean is zero."""
    texts = pool.to(torch.float64)
    return F.normalize(texts - texts.mean(0), dim=1)


def _ranks(scores: Tensor) -> Tensor:
    """How many scores are higher, of equal ones how many come before."""
    return scores.argsort(descending=True, stable=True, dim=0).argsort(dim=0)


# ------------------------------------------------------------------------------------------------------ visual concepts


@dataclass(frozen=True, eq=False)
class VisualConcept:
    """A group of patches whose contributions point the same way.

    Attributes:
        mask: ``[rows, columns]`` bool, its patches.
        score: what they add to the margin, through all heads that are looked at.
        heads: (layer, head, score) of those heads, the largest absolute score first.
        texts: (number in the pool, cosine) of the texts nearest to what sets its patches apart from all patches.
    """

    mask: Tensor
    score: float
    heads: tuple[tuple[int, int, float], ...]
    texts: tuple[tuple[int, float], ...]

    @property
    def patches(self) -> int:
        """How many patches it has."""
        return int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class VisualConcepts:
    """The patches of an image in groups, and where the rest of the margin comes from.

    Attributes:
        groups: the largest score first; their scores sum to ``patches``.
        scores: ``[rows, columns]``, what each patch adds to the margin.
        prefix: what the class token and registers add through the heads that are looked at.
        other: what everything else adds: MLPs, the start, heads that are not looked at.
    """

    groups: tuple[VisualConcept, ...]
    scores: Tensor
    prefix: float
    other: float

    @property
    def patches(self) -> float:
        """What all patches add."""
        return float(self.scores.sum(dtype=torch.float64))

    def heat(self) -> Tensor:
        """The order of the explanation as a heat map from 0 to 1, ``[rows, columns]``.

        Groups follow each other by their mean score per patch; the patches of a group follow by their own.
        """
        mean = torch.zeros_like(self.scores, dtype=torch.float64)
        for group in self.groups:
            mean[group.mask] = group.score / group.patches
        cells = list(zip(mean.flatten().tolist(), self.scores.flatten().tolist(), strict=True))
        order = sorted(range(len(cells)), key=lambda cell: (cells[cell], -cell))
        heat = torch.empty(len(cells), dtype=torch.float64)
        heat[order] = torch.linspace(0, 1, len(cells), dtype=torch.float64)
        return heat.view(self.scores.shape)


def visual_concepts(
    contributions: Contributions,
    direction: Tensor,
    pool: Tensor | None = None,
    count: int = 4,
    heads: Sequence[tuple[int, int]] | None = None,
    texts: int = 5,
) -> VisualConcepts:
    """Patches in groups that point the same way, with what each group adds to the margin.

    Two patches are alike if, head by head, what they add to the embedding deviates from the mean over patches in the
    same direction; the cosines are averaged over heads, and :func:`.kernel_k_means` groups by them. No direction is
    singled out for the grouping: ``direction`` decides how the groups score.

    Args:
        contributions: of one image, decomposed with ``tokens=True``.
        direction: ``[D]``, :attr:`Decision.direction`.
        pool: ``[T, D]``, texts to describe groups by; None for no description.
        count: groups at most.
        heads: (layer, head) pairs to look at; all kept heads for None.
        texts: how many texts describe a group.

    Raises:
        InputError: not one image, a direction of another width, or heads that do not exist or were not kept.
        NotKept: decomposed without ``tokens=True``.
    """
    if len(contributions) != 1:
        raise InputError(f"a choice is explained for one image at a time: here are {len(contributions)}")
    width = contributions.embedding.shape[1]
    if direction.shape != (width,):
        raise InputError(f"the direction has shape {list(direction.shape)}, expected [{width}]")
    rows, columns = contributions.grid
    patches = rows * columns
    basis = contributions.basis
    if heads is None:
        chosen = [(layer, head) for layer in contributions.layers for head in range(basis.heads)]
    else:
        chosen = sorted(set(resolve_heads(heads, basis.layers, basis.heads, contributions.layers)))
    if not chosen:
        raise InputError("no heads to look at")
    with autocast_disabled(contributions.codes):
        towards = direction.to(contributions.codes)
        products = torch.zeros(patches, patches, dtype=torch.float64, device=towards.device)
        total = torch.zeros(patches, width, dtype=torch.float64, device=towards.device)
        scores, prefix = [], 0.0
        for layer in dict.fromkeys(layer for layer, _ in chosen):
            own = [head for at, head in chosen if at == layer]
            parts = contributions.tokens(layer)[0][:, own]  # [N, heads, D]
            before, parts = parts[:-patches], parts[-patches:]
            prefix += float((before @ towards).sum(dtype=torch.float64))
            scores.append((parts @ towards).double())  # [P, heads]
            total += parts.sum(1, dtype=torch.float64)
            alike = F.normalize(parts - parts.mean(0), dim=2).flatten(1)  # [P, heads · D]
            products += alike @ alike.T
        by_head = torch.cat(scores, 1).cpu()  # [P, G]
        embedding = contributions.embedding[0].to(towards) / contributions.norm[0].to(towards)
        margin = float(embedding @ towards)
    groups = kernel_k_means(products / len(chosen), count)
    total = total.cpu()
    described = None if pool is None else centred(pool).cpu()
    found = []
    for group in groups.unique().tolist():
        mask = groups == group
        through = by_head[mask].sum(0)
        order = largest(through.abs(), len(chosen))[1].tolist()
        found.append(
            VisualConcept(
                mask=mask.view(rows, columns),
                score=float(through.sum()),
                heads=tuple((*chosen[at], float(through[at])) for at in order),
                texts=_nearest(total[mask].mean(0) - total.mean(0), described, texts),
            )
        )
    found.sort(key=lambda concept: -concept.score)
    per_patch = by_head.sum(1).view(rows, columns)
    other = margin - float(per_patch.sum()) - prefix
    return VisualConcepts(tuple(found), per_patch, prefix, other)


def _nearest(vector: Tensor, texts: Tensor | None, count: int) -> tuple[tuple[int, float], ...]:
    if texts is None:
        return ()
    cosines, places = largest(texts @ F.normalize(vector, dim=0), count)
    return tuple(zip(places.tolist(), cosines.tolist(), strict=True))
