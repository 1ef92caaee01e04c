"""Contributions as a long ``pandas.DataFrame``: a row per image and term, and per text where texts are given."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipfast.contributions import Contributions
from clipfast.errors import InputError, MissingExtra
from clipfast.presentation.effects import check_features, in_order, shares
from clipfast.presentation.labelled import as_numpy, check_ids

_AT_ONCE = 32
"""Images whose terms are expanded together: 40 MB for ViT-L-14."""
_HEAD = re.compile(r"(?:pool|L(?P<layer>\d+)\.attn)\.H(?P<head>\d+)")
_MLP = re.compile(r"(?:pool|L(?P<layer>\d+))\.mlp")


def to_pandas(
    contributions: Contributions,
    text_features: Tensor | None,
    texts: Sequence[str] | None,
    ids: Sequence[str] | None,
) -> Any:
    """See :meth:`.Contributions.to_pandas`."""
    try:
        import pandas
    except ImportError:
        raise MissingExtra("pandas", "data", "Contributions.to_pandas") from None
    images, names = len(contributions), contributions.terms
    scores, labels = _scores(contributions, text_features, texts)
    repeats = 1 if scores is None else scores.shape[2]
    kinds, layers, heads = zip(*map(_parts, names), strict=True)

    def per_term(values: Sequence[Any], dtype: str | None = None) -> Any:
        column = pandas.Series(list(values), dtype=dtype)
        return column.take(np.tile(np.repeat(np.arange(len(names)), repeats), images)).reset_index(drop=True)

    columns: dict[str, Any] = {"image": np.repeat(np.arange(images), len(names) * repeats)}
    if ids is not None:
        columns["id"] = np.repeat(np.array(check_ids(ids, images), dtype=object), len(names) * repeats)
    columns |= {
        "term": per_term(names),
        "kind": per_term(kinds),
        "layer": per_term(layers, "Int64"),
        "head": per_term(heads, "Int64"),
        "norm": np.repeat(as_numpy(_norms(contributions)).ravel(), repeats),
        "share": np.repeat(as_numpy(in_order(contributions, shares(contributions))).ravel(), repeats),
    }
    if scores is not None:
        columns["text"] = np.tile(np.array(labels, dtype=object), images * len(names))
        columns["score"] = as_numpy(scores).ravel()
    return pandas.DataFrame(columns)


def _scores(
    contributions: Contributions, text_features: Tensor | None, texts: Sequence[str] | None
) -> tuple[Tensor | None, list[Any]]:
    """Scores ``[B, terms, T]`` and what the texts are called: as they are given, or by number."""
    if text_features is None:
        if texts is not None:
            raise InputError("texts name text_features: give text_features, too")
        return None, []
    scores = in_order(contributions, contributions.scores(check_features(text_features)))
    if texts is None:
        return scores, list(range(len(text_features)))
    labels = [texts] if isinstance(texts, str) else list(texts)
    if len(labels) != len(text_features):
        raise InputError(f"{len(labels)} texts for {len(text_features)} text_features: give one per row")
    return scores, labels


def _norms(contributions: Contributions) -> Tensor:
    """``[B, terms]``."""
    parts = [
        contributions[first : first + _AT_ONCE].stack()[0].norm(dim=-1)
        for first in range(0, len(contributions), _AT_ONCE)
    ]
    return torch.cat(parts) if parts else contributions.norm.new_empty(0, len(contributions.terms))


def _parts(term: str) -> tuple[str, int | None, int | None]:
    """Kind, layer and head of a term by its name; the layer of a pooling alone is 0."""
    if match := _HEAD.fullmatch(term):
        return "head", int(match["layer"] or 0), int(match["head"])
    if match := _MLP.fullmatch(term):
        return "mlp", int(match["layer"] or 0), None
    return term, None, None
