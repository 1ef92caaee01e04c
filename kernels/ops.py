"""The operations as the rest of clipfast calls them: arguments checked once, then handed to a backend.

Axes: ``B`` images, ``N`` tokens, ``H`` heads, ``E`` head_dim, ``T`` texts, ``D`` embed_dim, ``W`` width.
"""

from torch import Tensor

from clipfast.kernels.dispatch import AUTO, choose
from clipfast.kernels.reference import Row


def _expect(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    fits = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("?" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected [{wanted}]")


def attention(qkv: Tensor, row: Row | None = "cls", *, backend: str = AUTO) -> tuple[Tensor, Tensor | None]:
    """Self-attention and the attention row of the pooled token (:func:`.reference.attention`).

    Args:
        qkv: ``[B, N, 3, H, E]``, any strides with a contiguous last axis.
        row: ``"cls"``, ``"mean"`` (average over the patches' queries) or ``None`` for no weights.
        backend: ``"auto"`` or a name from :data:`.dispatch.BACKENDS`.

    Returns:
        ``out [B, N, H, E]`` in the dtype of ``qkv``; ``alpha [B, H, N]`` in float32 (float64 for float64) or ``None``.

    Raises:
        ValueError: wrong shape, unknown row or backend.
    """
    _expect("qkv", qkv, (None, None, 3, None, None))
    if row not in ("cls", "mean", None):
        raise ValueError(f"row is {row!r}, expected 'cls', 'mean' or None")
    if row == "mean" and qkv.shape[1] < 2:
        raise ValueError("row='mean' averages over the patches, and qkv has no token but the first")
    result: tuple[Tensor, Tensor | None] = choose(backend).operations.attention(qkv, row)
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
        backend: ``"auto"`` or a name from :data:`.dispatch.BACKENDS`.

    Returns:
        ``z [B, H, E]`` and ``alpha [B, H, N]``, float32 (float64 for float64).

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    _expect("query", query, (None, None, None))
    images, heads, head_dim = query.shape
    _expect("tokens", tokens, (images, None, None))
    width = tokens.shape[2]
    _expect("key_weight", key_weight, (heads, head_dim, width))
    _expect("value_weight", value_weight, (heads, head_dim, width))
    _expect("value_bias", value_bias, (heads, head_dim))
    result: tuple[Tensor, Tensor] = choose(backend).operations.query_row_from_tokens(
        query, tokens, key_weight, value_weight, value_bias
    )
    return result


def _expect_weighted_values(alpha: Tensor, value: Tensor, basis: Tensor, basis_name: str) -> None:
    _expect("value", value, (None, None, None, None))
    images, tokens, heads, head_dim = value.shape
    _expect("alpha", alpha, (images, heads, tokens))
    _expect(basis_name, basis, (heads, head_dim, None))


def text_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, *, backend: str = AUTO) -> Tensor:
    """Adds per-token text scores, summed over heads, to ``out`` (:func:`.reference.text_maps`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        text_basis: ``[H, E, T]``.
        out: ``[B, N, T]``, contiguous, float32 or float64; changed in place.
        backend: ``"auto"`` or a name from :data:`.dispatch.BACKENDS`.

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    _expect_weighted_values(alpha, value, text_basis, "text_basis")
    _expect("out", out, (value.shape[0], value.shape[1], text_basis.shape[2]))
    result: Tensor = choose(backend).operations.text_maps(alpha, value, text_basis, out)
    return result


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
        backend: ``"auto"`` or a name from :data:`.dispatch.BACKENDS`.

    Returns:
        ``out``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    _expect("tokens", tokens, (None, None, None))
    images, count, width = tokens.shape
    _expect("text_basis", text_basis, (None, None, None))
    heads, head_dim, texts = text_basis.shape
    _expect("alpha", alpha, (images, heads, count))
    _expect("value_weight", value_weight, (heads, head_dim, width))
    _expect("value_bias", value_bias, (heads, head_dim))
    _expect("out", out, (images, count, texts))
    result: Tensor = choose(backend).operations.text_maps_from_tokens(
        alpha, tokens, value_weight, value_bias, text_basis, out
    )
    return result


def head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, *, backend: str = AUTO) -> Tensor:
    """Per-token text scores of every head (:func:`.reference.head_maps`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        text_basis: ``[H, E, T]``.
        backend: ``"auto"`` or a name from :data:`.dispatch.BACKENDS`.

    Returns:
        ``[B, H, N, T]`` in the dtype of ``text_basis``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    _expect_weighted_values(alpha, value, text_basis, "text_basis")
    result: Tensor = choose(backend).operations.head_maps(alpha, value, text_basis)
    return result


def token_contributions(alpha: Tensor, value: Tensor, basis: Tensor, *, backend: str = AUTO) -> Tensor:
    """Every token's part through every head (:func:`.reference.token_contributions`).

    Args:
        alpha: ``[B, H, N]``.
        value: ``[B, N, H, E]``.
        basis: ``[H, E, D]``.
        backend: ``"auto"`` or a name from :data:`.dispatch.BACKENDS`.

    Returns:
        ``[B, N, H, D]`` in the dtype of ``basis``.

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    _expect_weighted_values(alpha, value, basis, "basis")
    result: Tensor = choose(backend).operations.token_contributions(alpha, value, basis)
    return result


def layer_statistics(residual: Tensor, eps: float, *, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a LayerNorm's input (:func:`.reference.layer_statistics`).

    Args:
        residual: ``[B, W]``.
        eps: ε of the LayerNorm.
        backend: ``"auto"`` or a name from :data:`.dispatch.BACKENDS`.

    Returns:
        ``mean [B]`` and ``std [B]``, float32 (float64 for float64).

    Raises:
        ValueError: wrong shape or unknown backend.
    """
    _expect("residual", residual, (None, None))
    result: tuple[Tensor, Tensor] = choose(backend).operations.layer_statistics(residual, eps)
    return result
