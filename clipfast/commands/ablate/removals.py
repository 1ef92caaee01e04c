"""Heads to remove, chosen by words in their texts, or by labelled images that are not in the test set."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from clipfast.analyses.moments import Moments
from clipfast.analyses.selection import Chosen, by_contrast, by_texts, greedy, matching, terms_of
from clipfast.commands import console
from clipfast.commands.ablate.options import Options
from clipfast.commands.ablations import Removal
from clipfast.commands.heads import chosen_heads
from clipfast.commands.pools import RANDOM, pool_features
from clipfast.commands.zeroshot import Groups, Labelled, labelled_batches
from clipfast.contributions import Contributions
from clipfast.dataset.collection import Collection
from clipfast.errors import InputError


def removals(options: Options, test: Labelled, means: Moments, texts: Sequence[str]) -> list[Removal]:
    """The sets of heads that the options ask for.

    Args:
        options: which heads to choose.
        test: the images that the result is measured on; their labels are not used here.
        means: of the images that heads are named by and means are taken of.
        texts: of the pool.

    Raises:
        InputError: options that do not fit, or a validation set that does not or that shares images with the test.
    """
    selection = options.selection
    chosen: list[Removal] = []
    if selection.words:
        picked = _by_words(options, test, means, texts)
        chosen.append(Removal(f"{len(picked)} heads by their texts", terms_of(picked, means), tuple(picked)))
    if selection.contrast is None and selection.greedy is None:
        if selection.validation is not None:
            raise InputError("--validation is for --contrast and --greedy: give one of them")
        return chosen
    if selection.validation is None:
        raise InputError("--contrast and --greedy need labelled images other than the test: give --validation FOLDER")
    contributions, labels, groups = _validation(selection.validation, test)
    heads = chosen_heads(selection.heads, means.basis, means.layers)
    if selection.contrast is not None:
        ranked = by_contrast(contributions, labels, groups, test.classifier)
        picked = [head for head in ranked if (head.layer, head.head) in heads][: selection.contrast]
        chosen.append(Removal(f"{len(picked)} heads by contrast of groups", terms_of(picked, means), tuple(picked)))
    if selection.greedy is not None:
        picked = greedy(contributions, labels, groups, test.classifier, means, selection.greedy, heads=heads)
        if not picked:
            console.warn("no head raises the worst group of the validation images: greedy removes none")
        chosen.append(Removal(f"{len(picked)} heads, greedily", terms_of(picked, means), tuple(picked)))
    return chosen


def _by_words(options: Options, test: Labelled, means: Moments, texts: Sequence[str]) -> list[Chosen]:
    selection, pool = options.selection, options.naming.pool
    if pool == RANDOM:
        raise InputError("--words needs a pool of texts: random vectors have none")
    matches = matching(texts, selection.words)
    if not matches:
        raise InputError(f"no text of the pool {pool} contains any of {', '.join(selection.words)}")
    heads, top = chosen_heads(selection.heads, means.basis, means.layers), selection.top
    features = pool_features(test.model, texts, options.naming)
    picked = by_texts(means.textspan(features, top, heads), matches, top=top, at_least=selection.at_least)
    if not picked:
        named = ", ".join(selection.words)
        console.warn(f"no head of {len(heads)} has {selection.at_least} of its first {top} texts with any of {named}")
    return picked


def _validation(folder: Path, test: Labelled) -> tuple[Contributions, Tensor, Tensor]:
    """Contributions, classes and groups of other labelled images."""
    collection = Collection(folder)
    seen = {(entry.path, entry.key) for entry in test.collection.entries}
    shared = [entry.file for entry in collection.entries if (entry.path, entry.key) in seen]
    if shared:
        raise InputError(f"{folder} has {len(shared)} images of the test ({shared[0]}): choose heads on others")
    collected = "collect it with `clipfast collect --labels … --group-column …`"
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
