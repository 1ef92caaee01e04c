"""Contributions as an ``xarray.Dataset``: axes with names, coordinates to select by.

Names are those of a collection opened with :func:`clipfast.dataset.open`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clipfast.contributions import Contributions
from clipfast.errors import InputError, MissingExtra

_MEANINGS = {
    "codes": "each head's output before its output projection, divided by std * norm; times the basis: its "
    "contribution",
    "class_codes": "the class token's own part of codes: its attention to itself times its value",
    "terms": "contributions that are no head's, divided by norm",
    "heads": "contributions of heads, divided by norm",
    "embeddings": "image embeddings as the model gives them, not normalised",
    "attention": "the weights that the pooled token reads with",
    "maps": "score of every token for every text",
    "patch_maps": "maps without the tokens before the patches, in the grid of patches",
    "values": "what the heads read from every token: times attention, summed over tokens, codes times std * norm",
}


def to_xarray(contributions: Contributions, ids: Sequence[str] | None, heads: bool) -> Any:
    """See :meth:`.Contributions.to_xarray`."""
    try:
        import xarray
    except ImportError:
        raise MissingExtra("xarray", "data", "Contributions.to_xarray") from None
    kept = contributions.kept
    per_head = ("image", "layer", "head")
    arrays: dict[str, tuple[tuple[str, ...], Tensor]] = {
        "codes": ((*per_head, "dim"), contributions.codes),
        "terms": (
            ("image", "term", "embed"),
            torch.cat([contributions.start_and_mlps(), contributions.rest[:, None]], 1),
        ),
        "embeddings": (("image", "embed"), contributions.embedding),
    }
    if heads:
        arrays["heads"] = (*per_head, "embed"), contributions.heads()
    if "class_token" in kept:
        arrays["class_codes"] = (*per_head, "dim"), contributions.class_codes
    if "attention" in kept:
        arrays["attention"] = (*per_head, "token"), contributions.attention
    if "maps" in kept:
        before = ("image",) if contributions.maps.ndim == 3 else per_head
        arrays["maps"] = (*before, "token", "text"), contributions.maps
        arrays["patch_maps"] = (*before, "row", "column", "text"), contributions.patch_maps()
    if "tokens" in kept:
        arrays["values"] = ("image", "layer", "token", "head", "dim"), contributions.token_values()
    variables = {
        name: (dims, as_numpy(values), {"long_name": _MEANINGS[name], "units": "1"})
        for name, (dims, values) in arrays.items()
    }
    attributes = {
        "centring": contributions.basis.centring,
        "depth": contributions.depth,
        "fingerprint": contributions.fingerprint,
    }
    return xarray.Dataset(variables, _coordinates(contributions, ids), attributes)


def _coordinates(contributions: Contributions, ids: Sequence[str] | None) -> dict[str, Any]:
    mlps = [name for name in contributions.terms if name.endswith(".mlp")]
    coordinates: dict[str, Any] = {
        "layer": list(contributions.layers),
        "head": list(range(contributions.basis.heads)),
        "term": ["start", *mlps, "rest"],
    }
    coordinates |= {name: ("image", as_numpy(getattr(contributions, name))) for name in ("mean", "std", "norm")}
    if ids is not None:
        coordinates["id"] = ("image", np.array(check_ids(ids, len(contributions)), dtype=object))
    if {"attention", "maps", "tokens"} & set(contributions.kept):
        rows, columns = contributions.grid
        before = np.full(contributions.prefix_tokens, -1)
        coordinates["patch_row"] = ("token", np.concatenate([before, np.repeat(np.arange(rows), columns)]))
        coordinates["patch_column"] = ("token", np.concatenate([before, np.tile(np.arange(columns), rows)]))
    if "maps" in contributions.kept and contributions.texts is not None:
        coordinates["text"] = np.array(contributions.texts, dtype=object)
    return coordinates


def check_ids(ids: Sequence[str], images: int) -> list[str]:
    """Names of images as a list; raises :class:`InputError` unless there is one for each."""
    if isinstance(ids, str):
        raise InputError(f"ids is {ids!r}: give a list of names, one per image")
    names = [str(name) for name in ids]
    if len(names) != images:
        raise InputError(f"{len(names)} ids for {images} images: give one per image")
    return names


def as_numpy(values: Tensor) -> npt.NDArray[Any]:
    """A tensor on the CPU as an array; bfloat16, which numpy does not have, becomes float32."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
