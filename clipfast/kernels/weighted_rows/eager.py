"""Weighted sums of attention rows in plain torch, a block of queries at a time."""

from torch import Tensor

from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import accumulation_dtype

BLOCK = 2**22
"""Most attention weights that exist at once, of all heads of one image, unless one query has more."""


def weighted_rows(qkv: Tensor, weights: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.weighted_rows`."""
    images, tokens, _, heads, width = qkv.shape
    acc_dtype = accumulation_dtype(qkv.dtype)
    out = weights.new_empty(images, weights.shape[1], heads, tokens)
    queries = max(1, BLOCK // max(1, heads * tokens))
    for image in range(images):
        query, key = (qkv[image, :, part].to(acc_dtype).transpose(0, 1) for part in (0, 1))  # [H, N, E]
        rows = weights.new_zeros(heads, weights.shape[1], tokens)
        for start in range(0, tokens, queries):
            block = slice(start, start + queries)
            alpha = ((query[:, block] * width**-0.5) @ key.mT).softmax(-1)
            rows += weights[image, :, block] @ alpha
        out[image] = rows.transpose(0, 1)
    return out


IMPLEMENTATIONS = {"weighted_rows": Implementation(weighted_rows)}
