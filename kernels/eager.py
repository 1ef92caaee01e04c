"""The operations in plain torch, on any device and dtype: the backend that is always there.

Same signatures and meaning as :mod:`clipfast.kernels.reference`. What differs is how: fused attention, batched matrix
products, and no temporary as large as ``[B, N, H, D]``. Results that later sums depend on (``alpha``, ``z``, maps) are
float32 for low-precision inputs, float64 for float64.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.reference import EQUAL, Activation, Row, accumulation_dtype


def attention(qkv: Tensor, row: Row | None) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.attention`; for ``row=None`` the weights are ``[B, H, 0]``."""
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, N, E]
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).contiguous()  # [B, N, H, E]
    if row is None:
        return out, qkv.new_empty((qkv.shape[0], qkv.shape[3], 0), dtype=accumulation_dtype(qkv.dtype))
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


def query_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.query_row`."""
    exact = accumulation_dtype(key.dtype)
    alpha = _row_logits(query.to(exact) * query.shape[-1] ** -0.5, key.to(exact)).softmax(-1)
    z = (value.to(exact) * alpha.transpose(1, 2)[..., None]).sum(1)  # [B, H, E]
    return z, alpha


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
    return z.contiguous(), alpha


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


def of_layer(heads: Tensor | None, layer: int, count: int) -> Tensor | None:
    """Which heads of one layer are among ``layer · count + head``, None for all."""
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
        text_maps(alpha[:, layer], values[layer], text_basis[layer], out, of_layer(heads, layer, count))
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
    exact = out.dtype
    text_basis = text_basis.to(exact)
    folded = torch.bmm(value_weight.to(exact).transpose(1, 2), text_basis)  # [H, W, T]
    products = tokens.to(exact) @ folded.transpose(0, 1).flatten(1)  # [B, N, H·T]
    shift = torch.bmm(value_bias.to(exact)[:, None], text_basis)[:, 0]  # [H, T]
    products = products.unflatten(2, (heads, texts)).add_(shift).mul_(alpha.transpose(1, 2)[..., None])
    out += products.sum(2)


def _products(value: Tensor, basis: Tensor) -> Tensor:
    """``v @ M[h]`` for every head, ``[B, N, H, E] × [H, E, C] → [H, B, N, C]``."""
    images, tokens, heads, head_dim = value.shape
    # For a slice of packed queries, keys and values this reshape is a view.
    per_head = value.permute(2, 0, 1, 3).reshape(heads, images * tokens, head_dim)
    return torch.bmm(per_head, basis).view(heads, images, tokens, basis.shape[-1])


def head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> Tensor:
    """:func:`clipfast.kernels.reference.head_maps`."""
    images, tokens, heads, _ = value.shape
    out = torch.empty((images, heads, tokens, text_basis.shape[2]), dtype=alpha.dtype, device=alpha.device)
    value, text_basis = value.to(alpha.dtype), text_basis.to(alpha.dtype)
    for image in range(images):  # each product lands where it belongs
        torch.bmm(value[image].transpose(0, 1), text_basis, out=out[image])
    return out.mul_(alpha[..., None])


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


def layer_statistics(residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.layer_statistics`, two passes in the accumulation dtype."""
    exact = residual.to(accumulation_dtype(residual.dtype))
    mean = exact.mean(-1)
    variance = (exact - mean[..., None]).square().mean(-1)
    return mean, (variance + eps).sqrt()


def moments(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> None:
    """Adds :func:`clipfast.kernels.reference.moments` to ``total`` and ``second``, all of it in float64.

    ``second`` stays exactly symmetric, which matrix products alone do not promise.
    """
    codes, shared, centre = codes.double(), shared.double(), centre.double()
    x = torch.cat([codes, shared[:, None].expand(-1, codes.shape[1], -1)], 2) - centre  # [B, G, E + X]
    total += x.sum(0)
    x = x.transpose(0, 1)  # [G, B, E + X]
    products = x.transpose(1, 2) @ x
    second += (products + products.transpose(1, 2)) / 2


def span(texts: Tensor, factor: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.span` for many heads at once, without deflating texts or covariance.

    Removing a direction ``w`` changes every variance by products with two vectors: with ``P`` the projection away from
    earlier directions, ``u = P S w``, ``s = A w`` and ``x = A u``, it is ``v ← v − s (2 x − s w·u)``. In float64
    whatever the texts are: as variances fall, such differences lose the digits that float32 has.
    """
    groups, count, rank = texts.shape
    picks = torch.full((groups, size), -1, dtype=torch.long, device=texts.device)
    variances, directions = texts.new_zeros(groups, size), texts.new_zeros(groups, size, rank)
    together = max(1, 2**24 // max(count * rank, 1))  # heads: what they take in float64 stays around 256 MB
    for start in range(0, groups, together):
        part = slice(start, start + together)
        _span(texts[part], factor[part], floor, picks[part], variances[part], directions[part])
    return picks, variances, directions


def _span(texts: Tensor, factor: Tensor, floor: float, picks: Tensor, variances: Tensor, directions: Tensor) -> None:
    columns = texts.transpose(1, 2).to(torch.float64, memory_format=torch.contiguous_format)  # [G, R, T]
    groups, rank, _ = columns.shape
    factor = factor.double()
    covariance = factor @ factor.transpose(1, 2)
    left = (factor.transpose(1, 2) @ columns).square_().sum(1)  # [G, T], the variance that each text explains
    known = left.new_zeros(groups, min(picks.shape[1], rank), rank)
    everyone = torch.arange(groups, device=texts.device)
    going = torch.ones(groups, dtype=torch.bool, device=texts.device)
    first, tiny = left.amax(1), torch.finfo(torch.float64).tiny
    limit = left.new_full((groups,), floor * tiny)
    for step in range(known.shape[1]):
        best = left.amax(1)
        going &= best > limit
        if not bool(going.any()):
            break
        limit = floor * first.clamp_min(tiny)
        pick = (left >= (best - EQUAL * first)[:, None]).to(torch.uint8).argmax(1)  # the first of equals
        direction = columns[everyone, :, pick]
        for _ in range(2):  # Gram-Schmidt twice is exact to rounding
            direction = _without(direction, known[:, :step])
            direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(tiny)
        shadow = _without(torch.einsum("grs,gs->gr", covariance, direction), known[:, :step])
        known[:, step] = direction
        picks[:, step] = torch.where(going, pick, -1)
        variances[:, step] = torch.where(going, left[everyone, pick], 0)
        directions[:, step] = torch.where(going[:, None], direction, 0)
        along, across = (torch.stack([direction, shadow], 1) @ columns).unbind(1)  # [G, T] each
        left -= along * (2 * across - along * (direction * shadow).sum(1, keepdim=True))


def _without(x: Tensor, known: Tensor) -> Tensor:
    """``x [G, R]`` less its components along the orthonormal rows of ``known [G, S, R]``."""
    return x - torch.einsum("gsr,gs->gr", known, torch.einsum("gsr,gr->gs", known, x))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`clipfast.kernels.reference.linear`."""
    return F.linear(x, weight, bias).contiguous()


def linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """:func:`clipfast.kernels.reference.linear_activation`, the activation in place."""
    hidden = F.linear(x, weight, bias)
    if activation == "quick_gelu":
        if hidden.dtype in (torch.float32, torch.float64):  # x·sigmoid(1.702 x) = silu(1.702 x) / 1.702, in place
            return F.silu(hidden.mul_(1.702), inplace=True).div_(1.702)
        return hidden.mul_(torch.sigmoid(1.702 * hidden))  # in 16 bits 1.702 x would be rounded, or overflow
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_(hidden, approximate=approximate)  # type: ignore[no-any-return]


def add_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Adds ``delta`` to ``x`` and returns the LayerNorm, :func:`clipfast.kernels.reference.add_layer_norm`.

    The norm runs in the dtype of its own weights: mixed-precision models keep those in float32.
    """
    if delta is not None:
        x += delta
    return F.layer_norm(x.to(weight.dtype), weight.shape, weight, bias, eps).to(x.dtype).contiguous()


_ALL = (
    attention,
    query_row,
    query_row_from_tokens,
    text_maps,
    text_maps_from_tokens,
    layered_text_maps,
    head_maps,
    token_contributions,
    layer_statistics,
    moments,
    span,
    linear,
    linear_activation,
    add_layer_norm,
)
IMPLEMENTATIONS: Mapping[str, Implementation] = {run.__name__: Implementation(run) for run in _ALL}
"""By the operations' names in :mod:`clipfast.kernels.ops`."""
