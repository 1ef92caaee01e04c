"""Choosing heads to remove: by words in their texts, or on labelled images that are not those of the test."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipfast.analyses.moments import Moments
from clipfast.analyses.selection import Chosen, by_contrast, by_texts, greedy, matching, terms_of
from clipfast.analyses.terms import Terms
from clipfast.commands import console
from clipfast.commands.ablate.options import Options
from clipfast.commands.heads import chosen_heads
from clipfast.commands.pools import RANDOM, pool_features
from clipfast.commands.zeroshot import Groups, Labelled, labelled_batches
from clipfast.contributions import Contributions
from clipfast.dataset.collection import Collection
from clipfast.errors import InputError


@dataclass(frozen=True)
class Removal:
    """A set of terms to ablate.

    Attributes:
        name: what the user reads.
        terms: the set.
        heads: where heads were chosen, which, with their scores.
    """

    name: str
    terms: Terms
    heads: tuple[Chosen, ...] = ()


def removals(options: Options, test: Labelled, means: Moments, texts: Sequence[str]) -> list[Removal]:
    """The sets of heads that the options ask for.

    Args:
        options: which heads to choose.
        test: the images they will be judged by, of which no label is looked at.
        means: of the images that heads are named by and means are taken of.
        texts: of the pool.

    Raises:
        InputError: options that do not fit, or a validation set that does not or that shares images with the test.
    """
    choosing = options.selection
    made: list[Removal] = []
    if choosing.words:
        picked = _by_words(options, test, means, texts)
        made.append(Removal(f"{len(picked)} heads by their texts", terms_of(picked, means), tuple(picked)))
    if choosing.contrast is None and choosing.greedy is None:
        if choosing.validation is not None:
            raise InputError("--validation is for --contrast and --greedy: give one of them")
        return made
    if choosing.validation is None:
        raise InputError("--contrast and --greedy look at labelled images of their own: give --validation FOLDER")
    contributions, labels, groups = _validation(choosing.validation, test)
    heads = chosen_heads(choosing.heads, means.basis, means.layers)
    if choosing.contrast is not None:
        ranked = by_contrast(contributions, labels, groups, test.classifier)
        picked = [head for head in ranked if (head.layer, head.head) in heads][: choosing.contrast]
        made.append(Removal(f"{len(picked)} heads by contrast of groups", terms_of(picked, means), tuple(picked)))
    if choosing.greedy is not None:
        picked = greedy(contributions, labels, groups, test.classifier, means, choosing.greedy, heads=heads)
        if not picked:
            console.warn("no head raises the worst group of the validation images: greedy removes none")
        made.append(Removal(f"{len(picked)} heads, greedily", terms_of(picked, means), tuple(picked)))
    return made


def _by_words(options: Options, test: Labelled, means: Moments, texts: Sequence[str]) -> list[Chosen]:
    choosing, pool = options.selection, options.naming.pool
    if pool == RANDOM:
        raise InputError("--words needs a pool of texts: random vectors have none")
    matches = matching(texts, choosing.words)
    if not matches:
        raise InputError(f"no text of the pool {pool} contains any of {', '.join(choosing.words)}")
    heads, top = chosen_heads(choosing.heads, means.basis, means.layers), choosing.top
    features = pool_features(test.model, texts, options.naming)
    picked = by_texts(means.textspan(features, top, heads), matches, top=top, at_least=choosing.at_least)
    if not picked:
        named = ", ".join(choosing.words)
        console.warn(f"no head of {len(heads)} has {choosing.at_least} of its first {top} texts with any of {named}")
    return picked


def _validation(folder: Path, test: Labelled) -> tuple[Contributions, Tensor, Tensor]:
    """Contributions, classes and groups of other labelled images."""
    collection = Collection(folder)
    seen = {(entry.path, entry.key) for entry in test.collection.entries}
    shared = [entry.file for entry in collection.entries if (entry.path, entry.key) in seen]
    if shared:
        raise InputError(f"{folder} has {len(shared)} images of the test ({shared[0]}): choose heads on others")
    collected = "collect it with `clipfast stats --labels … --group-column …`"
    labels = sorted({entry.label for entry in collection.entries if entry.label is not None})
    other = [label for label in labels if label not in test.classes.labels]
    if other:
        raise InputError(f"{folder} has the label {other[0]!r}, which is no class of the test")
    groups = Groups.of(collection.entries)
    if not groups.names:
        raise InputError(f"{folder} has no {'groups' if labels else 'labels'}: {collected}")
    batches = list(labelled_batches(collection, test.classes, groups))
    members = [batch[2] for batch in batches if len(batch) == 3]
    return Contributions.cat([batch[0] for batch in batches]), torch.cat([b[1] for b in batches]), torch.cat(members)
