"""Ablations as several commands have them: sets of terms with names, those of the paper, and rows of results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clipfast.analyses.accuracy import Accuracy
from clipfast.analyses.moments import Moments
from clipfast.analyses.selection import Chosen
from clipfast.analyses.terms import Terms
from clipfast.report.shares import rounded


@dataclass(frozen=True)
class Removal:
    """A set of terms to ablate.

    Attributes:
        name: for tables and JSON.
        terms: the set.
        heads: the chosen heads with their scores; empty where terms were named.
    """

    name: str
    terms: Terms
    heads: tuple[Chosen, ...] = ()


def paper(moments: Moments) -> list[Removal]:
    """The paper's ablations: MLPs, class token where there is one, both, and layers from the first on."""
    basis = moments.basis
    mlps, own = Terms.all_mlps(basis), Terms.all_class_tokens(basis)
    layers = Terms.cumulative(basis)
    named = [Removal("all MLPs", mlps)]
    if moments.has_class_token:
        named += [Removal("class token to itself", own), Removal("both", mlps | own)]
    return named + [Removal(f"attention of layers 0 to {layer}", terms) for layer, terms in enumerate(layers)]


def row(removal: Removal, accuracy: Accuracy, groups: Sequence[str]) -> dict[str, Any]:
    """What the JSON says of one ablation."""
    entry: dict[str, Any] = {
        "name": removal.name,
        "terms": str(removal.terms),
        "accuracy": rounded(accuracy.accuracy),
    }
    if groups:
        entry |= {
            "worst_group": rounded(accuracy.worst_group),
            "mean_of_groups": rounded(accuracy.mean_of_groups),
            "groups": {groups[at]: rounded(value) for at, value in accuracy.group_accuracies.items()},
        }
    if removal.heads:
        entry["chosen"] = [{**head._asdict(), "score": rounded(head.score)} for head in removal.heads]
    return entry
