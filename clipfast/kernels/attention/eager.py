"""Attention in plain torch: fused, and the row of weights by a product of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.query_row.eager import row_logits
from clipfast.kernels.reference import Row, accumulation_dtype


def attention(qkv: Tensor, row: Row | None) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.attention`; for ``row=None`` the weights are ``[B, H, 0]``."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, N, E]
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous()  # [B, N, H, E]
    if row is None:
        return out, qkv.new_empty((qkv.shape[0], qkv.shape[3], 0), dtype=accumulation_dtype(qkv.dtype))
    acc_dtype = accumulation_dtype(qkv.dtype)
    query = query.to(acc_dtype) * query.shape[-1] ** -0.5
    if row == "cls":
        return out, row_logits(query[:, :, 0], qkv[:, :, 1].to(acc_dtype)).softmax(-1)
    # One image at a time: the [N, N] weights of all images together would be larger than the hidden state.
    alpha = torch.empty(key.shape[:3], dtype=acc_dtype, device=qkv.device)
    for image in range(qkv.shape[0]):
        logits = query[image, :, 1:] @ key[image].to(acc_dtype).transpose(-1, -2)
        alpha[image] = logits.softmax(-1).mean(1)
    return out, alpha


IMPLEMENTATIONS = {"attention": Implementation(attention)}
