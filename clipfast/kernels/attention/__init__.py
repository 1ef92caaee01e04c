"""Self-attention that also gives the attention row of the pooled token.

Axes: ``B`` images, ``N`` tokens, ``H`` heads, ``E`` head_dim.
"""

from typing import Any

from torch import Tensor

from clipfast.kernels.checks import NONEMPTY, check_shape
from clipfast.kernels.dispatch import AUTO
from clipfast.kernels.examples import HEAD_DIM, HEADS, IMAGES, TOKENS, Examples
from clipfast.kernels.reference import Row, accumulation_dtype
from clipfast.kernels.registration import register

__all__ = ["attention"]


def attention(qkv: Tensor, row: Row | None = "cls", *, backend: str = AUTO) -> tuple[Tensor, Tensor | None]:
    """Self-attention and the attention row of the pooled token (:func:`clipfast.kernels.reference.attention`).

    Args:
        qkv: ``[B, N, 3, H, E]``, any strides with a contiguous last axis.
        row: ``"cls"``, ``"mean"`` (average over the patches' queries) or ``None`` for no weights.
        backend: ``"auto"``, or the name of a backend (:data:`clipfast.kernels.dispatch.BACKENDS`).

    Returns:
        ``out [B, N, H, E]`` in the dtype of ``qkv``, and ``alpha [B, H, N]`` or ``None``; alpha is float32, float64 for
        float64.

    Raises:
        ValueError: wrong shape or unknown row.
        BackendUnavailable: the backend does not exist or does not support these arguments.
    """
    choice = _ATTENTION.known((qkv, row), backend)
    if choice is not None:
        out, alpha = choice.run(qkv, row)
        return out, None if row is None else alpha
    check_shape("qkv", qkv, (None, None, 3, None, NONEMPTY))
    if row not in ("cls", "mean", None):
        raise ValueError(f"row is {row!r}, expected 'cls', 'mean' or None")
    if row == "mean" and qkv.shape[1] < 2:
        raise ValueError("row='mean' averages over the patches, and qkv has no token but the first")
    out, alpha = _ATTENTION(qkv, row, backend)
    return out, None if row is None else alpha


def _fake(qkv: Tensor, row: str | None, backend: str) -> tuple[Tensor, Tensor]:
    images, tokens, _, heads, head_dim = qkv.shape
    alpha_shape = (images, heads, tokens if row is not None else 0)
    return qkv.new_empty(images, tokens, heads, head_dim), qkv.new_empty(
        alpha_shape, dtype=accumulation_dtype(qkv.dtype)
    )


def _example_arguments(examples: Examples) -> list[Any]:
    return [examples.draw(IMAGES, TOKENS, 3, HEADS, HEAD_DIM), "cls"]


_ATTENTION = register("attention", _fake, _example_arguments)
