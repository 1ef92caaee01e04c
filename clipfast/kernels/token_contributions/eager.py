"""Contributions of every token through every head in plain torch: each product is written where it belongs."""

import torch
from torch import Tensor

from clipfast.kernels.dispatch import Implementation


def token_contributions(
    alpha: Tensor, value: Tensor, basis: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """:func:`clipfast.kernels.reference.token_contributions`."""
    images, tokens, heads, head_dim = value.shape
    out = torch.empty((images * tokens, heads, basis.shape[2]), dtype=basis.dtype, device=value.device)
    weights = alpha if scale is None else alpha * scale[:, None, None]
    weighted = value * weights.transpose(1, 2)[..., None].to(basis.dtype)  # [B, N, H, E], small beside the result
    for head in range(heads):  # each product lands where it belongs
        torch.mm(weighted[:, :, head].reshape(-1, head_dim).to(basis.dtype), basis[head], out=out[:, head])
    result = out.view(images, tokens, heads, basis.shape[2])
    if shift is not None:
        result += (shift if scale is None else shift * scale[:, None])[:, None, None]
    return result


def head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.head_maps`."""
    images, tokens, heads, _ = value.shape
    out = torch.empty((images, heads, tokens, text_basis.shape[2]), dtype=alpha.dtype, device=alpha.device)
    value, text_basis = value.to(alpha.dtype), text_basis.to(alpha.dtype)
    for image in range(images):  # each product lands where it belongs
        torch.bmm(value[image].transpose(0, 1), text_basis, out=out[image])
    return out.mul_(alpha[..., None])


IMPLEMENTATIONS = {"token_contributions": Implementation(token_contributions), "head_maps": Implementation(head_maps)}
