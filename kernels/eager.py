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
    query = query.to(exact) * query.shape[-1] ** -0.5
    if row == "cls":
        return out, _row_logits(query[:, :, 0], qkv[:, :, 1].to(exact)).softmax(-1)
    # One image at a time: the [N, N] weights of all images together would be larger than the hidden state.
    alpha = torch.empty(key.shape[:3], dtype=exact, device=qkv.device)
    for image in range(qkv.shape[0]):
        logits = query[image, :, 1:] @ key[image].to(exact).transpose(-1, -2)
        alpha[image] = logits.softmax(-1).mean(1)
    return out, alpha


def _row_logits(query: Tensor, key: Tensor) -> Tensor:
    """``q·k`` of one query, ``[B, H, E] × [B, N, H, E] → [B, H, N]``.

    As a product and a sum: a matrix product with one column would copy the strided keys first, at twice the time.
    """
    return (key * query[:, None]).sum(-1).transpose(1, 2).contiguous()


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
    """Adds :func:`clipfast.kernels.reference.text_maps` to ``out [B, N, T]`` and returns it.

    The weights scale the products, not the values: more exact in low precision, and the values are read where they
    are. As many heads at a time as keep the products no larger than the residual stream.
    """
    heads, head_dim, texts = text_basis.shape
    group = max(1, heads * head_dim // max(texts, 1))
    for start in range(0, heads, group):
        part = slice(start, start + group)
        products = _products(value[:, :, part].to(out.dtype), text_basis[part])  # [group, B, N, T]
        for head, product in enumerate(products, start):
            out.addcmul_(product, alpha[:, head, :, None])
    return out


def text_maps_from_tokens(
    alpha: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor, text_basis: Tensor, out: Tensor
) -> Tensor:
    """Adds :func:`clipfast.kernels.reference.text_maps_from_tokens` to ``out [B, N, T]`` and returns it.

    ``<W_V x, U> = <x, W_Vᵀ U>``: one product with ``H·T`` columns where forming the values takes ``H·E`` of them.
    """
    heads, head_dim, texts = text_basis.shape
    if heads * texts >= tokens.shape[2]:
        flat = F.linear(tokens, value_weight.flatten(0, 1).to(tokens.dtype), value_bias.flatten().to(tokens.dtype))
        return text_maps(alpha, flat.unflatten(2, (heads, head_dim)), text_basis, out)
    folded = torch.bmm(value_weight.to(out.dtype).transpose(1, 2), text_basis)  # [H, W, T]
    products = tokens.to(out.dtype) @ folded.transpose(0, 1).flatten(1)  # [B, N, H·T]
    shift = torch.bmm(value_bias.to(out.dtype)[:, None], text_basis)[:, 0]  # [H, T]
    products = products.unflatten(2, (heads, texts)).add_(shift).mul_(alpha.transpose(1, 2)[..., None])
    return out.add_(products.sum(2))


def _products(value: Tensor, basis: Tensor) -> Tensor:
    """``v @ M[h]`` for every head, ``[B, N, H, E] × [H, E, C] → [H, B, N, C]``."""
    images, tokens, heads, head_dim = value.shape
    # For a slice of packed queries, keys and values this reshape is a view.
    per_head = value.permute(2, 0, 1, 3).reshape(heads, images * tokens, head_dim)
    return torch.bmm(per_head, basis).view(heads, images, tokens, basis.shape[-1])


def head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.head_maps`."""
    products = _products(value.to(text_basis.dtype), text_basis)
    return products.permute(1, 0, 2, 3).mul_(alpha[..., None])


def token_contributions(alpha: Tensor, value: Tensor, basis: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.token_contributions`."""
    return head_maps(alpha, value, basis).transpose(1, 2)


def layer_statistics(residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.layer_statistics`, two passes in the accumulation dtype."""
    exact = residual.to(accumulation_dtype(residual.dtype))
    mean = exact.mean(-1)
    variance = (exact - mean[..., None]).square().mean(-1)
    return mean, (variance + eps).sqrt()
