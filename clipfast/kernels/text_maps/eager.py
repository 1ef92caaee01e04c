"""Text maps in plain torch: as many heads at a time as keep the products no larger than the residual stream."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.dispatch import Implementation


def text_maps(alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None = None) -> None:
    """Adds :func:`clipfast.kernels.reference.text_maps` to ``out [B, N, T]``.

    The weights scale the products, not the values: more exact in low precision, and the values are read where they
    are. As many heads at a time as keep the products no larger than the residual stream.
    """
    if heads is not None:
        alpha, value, text_basis = alpha[:, heads], value[:, :, heads], text_basis[heads]
    count, head_dim, texts = text_basis.shape
    group = max(1, count * head_dim // max(texts, 1))
    for start in range(0, count, group):
        part = slice(start, start + group)
        products = _products(value[:, :, part].to(out.dtype), text_basis[part].to(out.dtype))  # [group, B, N, T]
        for head, product in enumerate(products, start):
            out.addcmul_(product, alpha[:, head, :, None])


def heads_of_layer(heads: Tensor | None, layer: int, count: int) -> Tensor | None:
    """Heads of one layer among ``heads``, which count as ``layer · count + head``; None for all."""
    if heads is None:
        return None
    return heads[torch.div(heads, count, rounding_mode="floor") == layer] - layer * count


def layered_text_maps(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None = None
) -> Tensor:
    """:func:`clipfast.kernels.reference.layered_text_maps`, layer by layer."""
    images, layers, count, tokens = alpha.shape
    out = alpha.new_zeros(images, tokens, text_basis.shape[-1])
    for layer in range(layers):
        text_maps(alpha[:, layer], values[layer], text_basis[layer], out, heads_of_layer(heads, layer, count))
    return out


def text_maps_from_tokens(
    alpha: Tensor,
    tokens: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    text_basis: Tensor,
    out: Tensor,
    *,
    project: Callable[..., Tensor] = F.linear,
) -> None:
    """Adds :func:`clipfast.kernels.reference.text_maps_from_tokens` to ``out [B, N, T]``.

    ``<W_V x, U> = <x, W_Vᵀ U>``: one product with ``H·T`` columns where forming the values takes ``H·E`` of them.
    """
    heads, head_dim, texts = text_basis.shape
    if heads * texts >= tokens.shape[2]:
        flat = project(tokens, value_weight.flatten(0, 1).to(tokens.dtype), value_bias.flatten().to(tokens.dtype))
        text_maps(alpha, flat.unflatten(2, (heads, head_dim)), text_basis, out)
        return
    acc_dtype = out.dtype
    text_basis = text_basis.to(acc_dtype)
    folded = torch.bmm(value_weight.to(acc_dtype).transpose(1, 2), text_basis)  # [H, W, T]
    products = tokens.to(acc_dtype) @ folded.transpose(0, 1).flatten(1)  # [B, N, H·T]
    shift = torch.bmm(value_bias.to(acc_dtype)[:, None], text_basis)[:, 0]  # [H, T]
    products = products.unflatten(2, (heads, texts)).add_(shift).mul_(alpha.transpose(1, 2)[..., None])
    out += products.sum(2)


def _products(value: Tensor, basis: Tensor) -> Tensor:
    """``v @ M[h]`` for every head, ``[B, N, H, E] × [H, E, C] → [H, B, N, C]``."""
    images, tokens, heads, head_dim = value.shape
    # For a slice of packed queries, keys and values this reshape is a view.
    per_head = value.permute(2, 0, 1, 3).reshape(heads, images * tokens, head_dim)
    return torch.bmm(per_head, basis).view(heads, images, tokens, basis.shape[-1])


IMPLEMENTATIONS = {
    "text_maps": Implementation(text_maps),
    "text_maps_from_tokens": Implementation(text_maps_from_tokens),
    "layered_text_maps": Implementation(layered_text_maps),
}
