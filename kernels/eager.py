"""The operations in plain torch, on any device and dtype: the backend that is always there.

Same signatures and meaning as :mod:`clipfast.kernels.reference`. What differs is how: fused attention, batched matrix
products, and no temporary as large as ``[B, N, H, D]``. Results that later sums depend on (``alpha``, ``z``, maps) are
float32 for low-precision inputs, float64 for float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.reference import Row


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are carried in: float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attention(qkv: Tensor, row: Row | None) -> tuple[Tensor, Tensor | None]:
    """:func:`clipfast.kernels.reference.attention`; ``row=None`` skips the weights."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, N, E]
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)  # [B, N, H, E]
    if row is None:
        return out, None
    exact = accumulation_dtype(qkv.dtype)
    scale = query.shape[-1] ** -0.5
    if row == "cls":
        logits = (query[:, :, :1].to(exact) * scale) @ key.to(exact).transpose(-1, -2)  # [B, H, 1, N]
        return out, logits.softmax(-1)[:, :, 0]
    # One image at a time: the [N, N] weights of all images together would be larger than the hidden state.
    alpha = torch.empty(key.shape[:3], dtype=exact, device=qkv.device)
    for image in range(qkv.shape[0]):
        logits = (query[image, :, 1:].to(exact) * scale) @ key[image].to(exact).transpose(-1, -2)
        alpha[image] = logits.softmax(-1).mean(1)
    return out, alpha


def query_row_from_tokens(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.query_row_from_tokens` without forming keys or values.

    ``q·(W_K x_n) = (W_Kᵀ q)·x_n`` and ``Σ_n α_n W_V x_n = W_V (Σ_n α_n x_n)``: both products touch the tokens once, at
    ``H`` columns instead of ``2·W``.
    """
    exact = accumulation_dtype(tokens.dtype)
    folded = torch.einsum("bhe,hew->bhw", query.to(exact), key_weight.to(exact))
    tokens = tokens.to(exact)
    logits = (folded * query.shape[-1] ** -0.5) @ tokens.transpose(1, 2)  # [B, H, N]
    alpha = logits.softmax(-1)
    mixed = alpha @ tokens  # [B, H, W]
    z = torch.einsum("bhw,hew->bhe", mixed, value_weight.to(exact)) + value_bias.to(exact)
    return z, alpha


def text_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor) -> Tensor:
    """Adds :func:`clipfast.kernels.reference.text_maps` to ``out [B, N, T]`` and returns it."""
    images, tokens, heads, head_dim = value.shape
    weighted = value.to(out.dtype) * alpha.transpose(1, 2)[..., None]  # [B, N, H, E]
    flat = weighted.view(images * tokens, heads * head_dim)
    out.view(images * tokens, -1).addmm_(flat, text_basis.reshape(heads * head_dim, -1))
    return out


def head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.head_maps`."""
    images, tokens, heads, head_dim = value.shape
    exact = text_basis.dtype
    per_head = value.to(exact).permute(2, 0, 1, 3).reshape(heads, images * tokens, head_dim)
    product = torch.bmm(per_head, text_basis).view(heads, images, tokens, -1)
    return product.permute(1, 0, 2, 3) * alpha[..., None]


def token_contributions(alpha: Tensor, value: Tensor, basis: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.token_contributions`."""
    return head_maps(alpha, value, basis).transpose(1, 2)


def layer_statistics(residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.layer_statistics`, two passes in the accumulation dtype."""
    exact = residual.to(accumulation_dtype(residual.dtype))
    mean = exact.mean(-1)
    variance = (exact - mean[..., None]).square().mean(-1)
    return mean, (variance + eps).sqrt()
