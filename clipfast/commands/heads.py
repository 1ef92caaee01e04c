"""Heads: those that an option names, and the rows that results have for them."""

from collections.abc import Sequence
from typing import Any

from clipfast.analyses.moments import Moments
from clipfast.analyses.terms import Terms
from clipfast.analyses.textspan import TextSpan
from clipfast.basis import Basis
from clipfast.errors import InputError
from clipfast.report.shares import rounded

LATE_LAYERS = 4
"""How many of the last layers are looked at where no heads are named."""


def chosen_heads(text: str | None, basis: Basis, layers: Sequence[int]) -> list[tuple[int, int]]:
    """Heads that a text names, those of the last four layers of some for None.

    Raises:
        InputError: a text that names no head, or terms that are no heads.
    """
    if text is None:
        return [(layer, head) for layer in layers[-LATE_LAYERS:] for head in range(basis.heads)]
    terms = Terms.parse(text, basis)
    if terms.mlps or terms.class_tokens or not terms.heads:
        raise InputError(f"--heads is {text!r}: name layers or heads, such as L10-L11 or L11.H3")
    return sorted(terms.heads)


def head_rows(moments: Moments) -> list[dict[str, Any]]:
    """Variance, share of all heads' variance and rank of every head."""
    spans = moments.spans()
    variances = spans.factor.square().sum((1, 2)).tolist()
    total = sum(variances) or 1.0
    return [
        {"layer": layer, "head": head, "variance": rounded(variance), "share": rounded(variance / total), "rank": rank}
        for (layer, head), variance, rank in zip(moments.heads(), variances, spans.ranks, strict=True)
    ]


def span_row(head: tuple[int, int], span: TextSpan, texts: Sequence[str]) -> dict[str, Any]:
    """What the JSON says of one head that was named by texts."""
    return {
        "layer": head[0],
        "head": head[1],
        "rank": span.rank,
        "variance": rounded(span.variance),
        "picks": list(span.picks),
        "texts": [texts[pick] for pick in span.picks] if texts else None,
        "explained": [rounded(share) for share in span.explained.tolist()],
        "notes": list(span.notes),
    }
