"""Layers and heads as a caller names them, resolved to the numbers that the model uses.

Layers count from 0; negative ones count from the end. Heads count from 0 within their layer.
"""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

from clipfast.errors import InputError


def resolve_layer(layer: int, count: int, kept: Sequence[int] | None = None) -> int:
    """The number of a layer, from 0.

    Args:
        layer: the layer, negative from the end.
        count: layers of the model.
        kept: the layers that can be chosen; all for None.

    Raises:
        InputError: not an integer, or a layer that does not exist or was not kept.
    """
    number = _integer(layer, "layer")
    if not -count <= number < count:
        raise InputError(f"layer {number} does not exist: choose from 0 to {count - 1}, or negative from the end")
    number %= count
    if kept is not None and number not in kept:
        raise InputError(f"layer {layer} was not kept: the layers here are {list(kept)}")
    return number


def resolve_layers(layers: Iterable[int], count: int, kept: Sequence[int] | None = None) -> tuple[int, ...]:
    """Several layers in ascending order, each once; arguments and errors as for :func:`resolve_layer`."""
    if isinstance(layers, int | float | str):
        raise InputError(f"layers is {layers!r}: give a list of integers, such as [-2, -1]")
    return tuple(sorted({resolve_layer(layer, count, kept) for layer in layers}))


def resolve_head(head: int, count: int) -> int:
    """The number of a head within its layer, from 0.

    Raises:
        InputError: not an integer, or a head that does not exist.
    """
    number = _integer(head, "head")
    if not 0 <= number < count:
        raise InputError(f"head {number} does not exist: heads are 0 to {count - 1}")
    return number


def resolve_heads(
    pairs: Iterable[tuple[int, int]], layers: int, heads: int, kept: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(layer, head) pairs with resolved layers, in the order given.

    Args:
        pairs: (layer, head) pairs, layers negative from the end.
        layers: layers of the model.
        heads: heads per layer.
        kept: the layers that can be chosen; all for None.

    Raises:
        InputError: no pair of integers, or a layer or head that does not exist or was not kept.
    """
    resolved = []
    for pair in pairs:
        try:
            layer, head = pair
        except (TypeError, ValueError):
            raise InputError(f"{pair!r} is not a (layer, head) pair") from None
        resolved.append((resolve_layer(layer, layers, kept), resolve_head(head, heads)))
    return resolved


def _integer(value: Any, kind: str) -> int:
    if not isinstance(value, bool):
        try:
            return index(value)
        except TypeError:
            pass
    raise InputError(f"{kind} {value!r} is not an integer")
