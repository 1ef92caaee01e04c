"""Rotary positions in plain torch."""

from torch import Tensor

from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import accumulation_dtype


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> None:
    """:func:`clipfast.kernels.reference.rotate` in place; half of ``x`` is copied."""
    acc_dtype = accumulation_dtype(x.dtype)
    tables = (table.to(acc_dtype).transpose(0, 1)[:, None] for table in (cos, sin))  # [N, 1, H, E]
    first, second, *factors = (part for each in (x, *tables) for part in _pairs(each, halves))
    cos_first, cos_second, sin_first, sin_second = factors
    a, b = first.to(acc_dtype), second.to(acc_dtype)
    turned = (a * cos_first).addcmul_(b, sin_first, value=-1)
    second.copy_((b * cos_second).addcmul_(a, sin_second))
    first.copy_(turned)


def _pairs(x: Tensor, halves: bool) -> tuple[Tensor, Tensor]:
    """The first entry of every pair, and the second."""
    if halves:
        first, second = x.chunk(2, -1)
        return first, second
    return x[..., ::2], x[..., 1::2]


IMPLEMENTATIONS = {"rotate": Implementation(rotate)}
