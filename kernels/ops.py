"""The operations as the rest of clipfast calls them: arguments checked once, then handed to a backend.

They work on anybody's tensors, on any device, under ``torch.compile`` too; examples are in ``kernels/README.md``. Every
call takes ``backend=``: ``"auto"`` or a name from :data:`.dispatch.BACKENDS`, and raises
:class:`.dispatch.BackendUnavailable` (a ValueError) where the one named cannot take the arguments. Sums are carried in
float32 for low-precision inputs, float64 for float64; so are ``alpha``, ``z`` and maps.

Axes: ``B`` images, ``N`` tokens, ``H`` heads, ``E`` head_dim, ``T`` texts, ``D`` embed_dim, ``W`` width, ``L`` layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast.kernels.checks import SOME, expect, expect_heads, expect_out, expect_together, expect_weighted_values
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.layer_ops import add_layer_norm, layer_statistics, linear, linear_activation
from clipfast.kernels.library import call
from clipfast.kernels.reference import Row

__all__ = [
    "add_layer_norm",
    "attention",
    "head_maps",
    "layer_statistics",
    "layered_text_maps",
    "linear",
    "linear_activation",
    "moments",
    "query_row",
    "query_row_from_tokens",
    "span",
    "text_maps",
    "text_maps_from_tokens",
    "token_contributions",
]


def attention(qkv: Tensor, row: Row | None = "cls", *, backend: str = AUTO) -> tuple[Tensor, Tensor | None]:
    """Self-attention and the attention row of the pooled token (:func:`.reference.attention`).

    Args:
        qkv: ``[B, N, 3, H, E]``, any strides with a contiguous last axis.
        row: ``"cls"``, ``"mean"`` (average over the patches' queries) or ``None`` for no weights.
        backend: see above.

    Returns:
        ``out [B, N, H, E]`` in the dtype of ``qkv``, and ``alpha [B, H, N]`` or ``None``.

    Raises:
        ValueError: wrong shape, unknown row or backend.
    """
    expect("qkv", qkv, (None, None, 3, None, SOME))
    if row not in ("cls", "mean", None):
        raise ValueError(f"row is {row!r}, expected 'cls', 'mean' or None")
    if row == "mean" and qkv.shape[1] < 2:
        raise ValueError("row='mean' averages over the patches, and qkv has no token but the first")
    out, alpha = call("attention", qkv, row, backend)
    return out, None if row is None else alpha


def query_row(query: Tensor, key: Tensor, value: Tensor, *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    """Attention of one query per image: pooling heads, a class token alone (:func:`.reference.query_row`).

    Args:
        query: ``[B, H, E]``; the same learned query for every image may be expanded.
        key: ``[B, N, H, E]``.
        value: ``[B, N, H, E]``.
        backend: see above.

    Returns:
        ``z [B, H, E]`` and ``alpha [B, H, N]``.

    Raises:
        ValueError: wrong shape, no tokens, or unknown backend.
    """
    expect("query", query, (None, None, SOME))
    images, heads, head_dim = query.shape
    expect("key", key, (images, None, heads, head_dim))
    expect("value", value, tuple(key.shape))
    if not key.shape[1]:
        raise ValueError("key and value have no tokens: there is nothing to attend to")
    expect_together(query=query, key=key, value=value)
    result: tuple[Tensor, Tensor] = call("query_row", query, key, value, backend)
    return result


def query_row_from_tokens(
    query: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    *,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor]:
    """Attention of one query, straight from the tokens (:func:`.reference.query_row_from_tokens`).

    Args:
        query: ``[B, H, E]``.
        tokens: ``[B, N, W]``, what keys and values are projected from.
        key_weight: ``[H, E, W]``.
        value_weight: ``[H, E, W]``.
        value_bias: ``[H, E]``.
        backend: see above.

    Returns:
        ``z [B, H, E]`` and ``alpha [B, H, N]``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    expect("query", query, (None, None, SOME))
    images, heads, head_dim = query.shape
    expect("tokens", tokens, (images, None, None))
    width = tokens.shape[2]
    expect("key_weight", key_weight, (heads, head_dim, width))
    expect("value_weight", value_weight, (heads, head_dim, width))
    expect("value_bias", value_bias, (heads, head_dim))
    expect_together(query=query, tokens=tokens, key_weight=key_weight, value_weight=value_weight)
    result: tuple[Tensor, Tensor] = call(
        "query_row_from_tokens", query, tokens, key_weight, value_weight, value_bias, backend
    )
    return result


def text_maps(
    alpha: Tensor,
    value: Tensor,
    text_basis: Tensor,
    out: Tensor,
    heads: Tensor | None = None,
    *,
    backend: str = AUTO,
) -> Tensor:
    """Adds per-token text scores, summed over heads, to ``out`` (:func:`.reference.text_maps`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        text_basis: ``[H, E, T]``.
        out: ``[B, N, T]``, contiguous, float32 or float64; changed in place.
        heads: integers ``[S]``, which heads to sum over, each once; all for None.
        backend: see above.

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape, a head that does not exist, or unknown backend.
    """
    expect_weighted_values(alpha, value, text_basis, "text_basis")
    expect_out(out, (value.shape[0], value.shape[1], text_basis.shape[2]))
    expect_heads(heads, value.shape[2])
    call("text_maps", alpha, value, text_basis, out, heads, backend)
    return out


def text_maps_from_tokens(
    alpha: Tensor,
    tokens: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    text_basis: Tensor,
    out: Tensor,
    *,
    backend: str = AUTO,
) -> Tensor:
    """:func:`text_maps`, straight from the tokens (:func:`.reference.text_maps_from_tokens`).

    Args:
        alpha: ``[B, H, N]``.
        tokens: ``[B, N, W]``, what values are projected from.
        value_weight: ``[H, E, W]``.
        value_bias: ``[H, E]``.
        text_basis: ``[H, E, T]``.
        out: ``[B, N, T]``, contiguous, float32 or float64; changed in place.
        backend: see above.

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    expect("tokens", tokens, (None, None, None))
    images, count, width = tokens.shape
    expect("text_basis", text_basis, (None, None, None))
    heads, head_dim, texts = text_basis.shape
    expect("alpha", alpha, (images, heads, count))
    expect("value_weight", value_weight, (heads, head_dim, width))
    expect("value_bias", value_bias, (heads, head_dim))
    expect_out(out, (images, count, texts))
    call("text_maps_from_tokens", alpha, tokens, value_weight, value_bias, text_basis, out, backend)
    return out


def layered_text_maps(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None = None, *, backend: str = AUTO
) -> Tensor:
    """Per-token text scores summed over layers and heads at once (:func:`.reference.layered_text_maps`).

    Args:
        alpha: ``[B, L, H, N]``.
        values: ``L`` times ``[B, N, H, E]``.
        text_basis: ``[L, H, E, T]``.
        heads: integers ``layer · H + head``, ``[S]``, what to sum over, each once; all for None.
        backend: see above.

    Returns:
        ``[B, N, T]`` in the dtype of ``alpha``.

    Raises:
        ValueError: wrong shape, a head that does not exist, or unknown backend.
    """
    expect("alpha", alpha, (None, None, None, None))
    images, layers, count, tokens = alpha.shape
    expect("text_basis", text_basis, (layers, count, None, None))
    if len(values) != layers:
        raise ValueError(f"values are {len(values)} layers, alpha has {layers}")
    for layer, value in enumerate(values):
        expect(f"values[{layer}]", value, (images, tokens, count, text_basis.shape[2]))
    expect_heads(heads, layers * count)
    result: Tensor = call("layered_text_maps", alpha, list(values), text_basis, heads, backend)
    return result


def head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, *, backend: str = AUTO) -> Tensor:
    """Per-token text scores of every head (:func:`.reference.head_maps`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        text_basis: ``[H, E, T]``.
        backend: see above.

    Returns:
        ``[B, H, N, T]`` in the dtype of ``alpha``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    expect_weighted_values(alpha, value, text_basis, "text_basis")
    result: Tensor = call("head_maps", alpha, value, text_basis, backend)
    return result


def token_contributions(
    alpha: Tensor,
    value: Tensor,
    basis: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    backend: str = AUTO,
) -> Tensor:
    """Every token's part through every head (:func:`.reference.token_contributions`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        basis: ``[H, E, D]``.
        shift: ``[B, D]``, added to every token's part of every head.
        scale: ``[B]``, multiplies the result.
        backend: see above.

    Returns:
        ``[B, N, H, D]`` in the dtype of ``basis``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    expect_weighted_values(alpha, value, basis, "basis")
    if shift is not None:
        expect("shift", shift, (value.shape[0], basis.shape[2]))
    if scale is not None:
        expect("scale", scale, (value.shape[0],))
    result: Tensor = call("token_contributions", alpha, value, basis, shift, scale, backend)
    return result


def moments(
    codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor, *, backend: str = AUTO
) -> None:
    """Adds a batch to the first two moments of every head's codes (:func:`.reference.moments`).

    Args:
        codes: ``[B, G, E]``.
        shared: ``[B, X]``.
        centre: ``[G, E + X]`` in the dtype of ``codes``; the same for every batch.
        total: ``[G, E + X]``, float64, contiguous; changed in place.
        second: ``[G, E + X, E + X]``, float64, contiguous; changed in place.
        backend: see above.

    Raises:
        ValueError: wrong shape or dtype, or unknown backend.
    """
    expect("codes", codes, (None, None, None))
    expect("shared", shared, (codes.shape[0], None))
    groups, columns = codes.shape[1], codes.shape[2] + shared.shape[1]
    expect("centre", centre, (groups, columns))
    expect("total", total, (groups, columns))
    expect("second", second, (groups, columns, columns))
    for name, sums in (("total", total), ("second", second)):
        if sums.dtype != torch.float64 or not sums.is_contiguous():
            raise ValueError(f"{name} is {sums.dtype}, expected contiguous torch.float64")
    expect_together(codes=codes, shared=shared, centre=centre, total=total, second=second)
    call("moments", codes, shared, centre, total, second, backend)


def span(
    texts: Tensor, factor: Tensor, size: int, floor: float = 1e-10, *, backend: str = AUTO
) -> tuple[Tensor, Tensor, Tensor]:
    """TEXTSPAN of many heads at once (:func:`.reference.span`).

    Args:
        texts: ``[G, T, R]``, texts in coordinates of each head's span; float32 or float64.
        factor: ``[G, R, R]``, ``L`` with covariance ``L Lᵀ``, in the dtype of ``texts`` or float64.
        size: texts to pick per head; picking ends earlier where nothing is left.
        floor: share of the first pick's variance at which nothing is left.
        backend: see above.

    Returns:
        ``picks [G, size]`` (int64, −1 after the end), ``variance [G, size]`` and orthonormal
        ``directions [G, size, R]``, both in the dtype of ``texts``.

    Raises:
        ValueError: wrong shape or dtype, no texts, a size below 1, or unknown backend.
    """
    expect("texts", texts, (None, None, None))
    groups, count, rank = texts.shape
    expect("factor", factor, (groups, rank, rank))
    if not count or size < 1:
        raise ValueError(f"{size} of {count} texts cannot be picked: at least one of each is needed")
    if texts.dtype not in (torch.float32, torch.float64) or factor.dtype not in (texts.dtype, torch.float64):
        wanted = "texts of float32 or float64, and a factor of the same or of float64"
        raise ValueError(f"texts are {texts.dtype} and factor {factor.dtype}: expected {wanted}")
    expect_together(texts=texts, factor=factor)
    result: tuple[Tensor, Tensor, Tensor] = call("span", texts, factor, size, floor, backend)
    return result
