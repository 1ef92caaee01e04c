"""How timm's models make one row of their last tokens, and the projection after it, as plain tensors."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers as timm_layers
from timm.layers import (
    AttentionPoolLatent,
    ClassifierHead,
    Mlp,
    NormMlpClassifierHead,
    SelectAdaptivePool2d,
    resample_abs_pos_embed,
)
from timm.models.eva import Eva
from torch import Tensor, nn

from clipfast.towers.patches import plain_type
from clipfast.towers.timm_parts import IDLE, LINEARS, Parts, apply_norm, classes, halves, zeros
from clipfast.towers.tower import AttentionPool, LayerNorm, Linear, PoolMlp

REFINING = classes(timm_layers, "AttentionPoolPrr")

Fields = dict[str, Any]
"""Arguments of :class:`AttentionPool`, or of :class:`Tower`."""


def attention_pool(parts: Parts, pool: Any, place: str, *, reads_prefix: bool) -> AttentionPool | None:
    """An attention pool; None if anything of it was noted."""
    before = parts.notes
    if not parts.expect(pool, (AttentionPoolLatent, *REFINING), place):
        return None
    read = _latent_pool if isinstance(pool, AttentionPoolLatent) else _refining_pool
    fields = read(parts, pool, place)
    return AttentionPool(**fields, reads_prefix=reads_prefix) if parts.notes == before else None


def _latent_pool(parts: Parts, pool: Any, place: str) -> Fields:
    """One learned query, or the mean of several."""
    before = parts.notes
    if pool.pool not in ("token", "avg"):
        parts.note("no_pool", place)
    if pool.pos_embed is not None:
        parts.note("pool_positions", place)
    if pool.scale != pool.head_dim**-0.5:
        parts.note("replaced", f"{place}: a scale of its own")
    parts.idle(place, proj_drop=pool.proj_drop)
    packed, out = (parts.linear(getattr(pool, name), f"{place}.{name}") for name in ("kv", "proj"))
    query_norm, key_norm = (parts.norm(getattr(pool, name), f"{place}.{name}") for name in ("q_norm", "k_norm"))
    to_query = None if type(pool.q) is nn.Identity else parts.linear(pool.q, f"{place}.q")
    mlp = _pool_mlp(parts, pool, place)
    if parts.notes != before:
        return {}
    count = pool.latent_len if pool.pool == "avg" else 1
    query = pool.latent[0, :count]
    if to_query is not None:
        query = F.linear(query, *to_query)
    if query_norm is not None:
        query = apply_norm(query.unflatten(1, (pool.num_heads, -1)), query_norm)
    key, value = (_repeated(layer, count) for layer in halves(packed))
    return {
        "query": query.flatten(),
        "key_weight": key.weight,
        "key_bias": key.bias,
        "value_weight": value.weight,
        "value_bias": value.bias,
        "out_weight": out.weight if count == 1 else out.weight.repeat(1, count) / count,
        "out_bias": zeros(out.weight) if out.bias is None else out.bias,
        "heads": pool.num_heads * count,
        "queries": count,
        "key_norm": key_norm,
        "mlp": mlp,
    }


def _repeated(layer: Linear, times: int) -> Linear:
    """A layer several times, one below the other."""
    if times == 1:
        return layer
    return Linear(layer.weight.repeat(times, 1), None if layer.bias is None else layer.bias.repeat(times))


def _pool_mlp(parts: Parts, pool: Any, place: str) -> PoolMlp | None:
    if pool.mlp is None:
        return None
    before = parts.notes
    norm = parts.norm(pool.norm, f"{place}.norm")
    if norm is None:
        parts.note("replaced", f"{place}.norm: no norm before the MLP")
    if not parts.expect(pool.mlp, (Mlp,), f"{place}.mlp"):
        return None
    mlp = pool.mlp
    parts.idle(f"{place}.mlp", drop1=mlp.drop1, drop2=mlp.drop2)
    parts.expect(mlp.norm, (nn.Identity,), f"{place}.mlp.norm")
    into, out = (parts.linear(getattr(mlp, name), f"{place}.mlp.{name}") for name in ("fc1", "fc2"))
    activation = parts.activation(mlp.act, f"{place}.mlp.act")
    if parts.notes != before or norm is None:
        return None
    biases = [zeros(each.weight) if each.bias is None else each.bias for each in (into, out)]
    return PoolMlp(norm, into.weight, biases[0], out.weight, biases[1], activation)


def _refining_pool(parts: Parts, pool: Any, place: str) -> Fields:
    """Attention without weights, of the class token or the mean of all tokens': they are queries, keys and values."""
    for name in ("pre_norm", "post_norm"):
        parts.expect(getattr(pool, name), (nn.Identity,), f"{place}.{name}")
    identity = torch.eye(pool.out_features, dtype=parts.like.dtype, device=parts.like.device)
    names = ("query", "key_weight", "value_weight", "out_weight")
    biases = {"key_bias": None, "value_bias": None, "out_bias": zeros(identity)}
    return dict.fromkeys(names, identity) | biases | {"heads": pool.num_heads, "every_query": pool.pool == "avg"}


def pooling(parts: Parts, vit: Any) -> Fields:
    """How a transformer's last tokens become one row."""
    norm, after = parts.norm(vit.norm, "norm"), parts.norm(vit.fc_norm, "fc_norm")
    pool = getattr(vit, "attn_pool", None)
    reads_prefix = isinstance(vit, Eva) if pool is not None else False
    reads_prefix = getattr(vit, "pool_include_prefix", reads_prefix)
    if pool is not None:
        read = attention_pool(parts, pool, "attn_pool", reads_prefix=reads_prefix)
        return {"pooling": "attention", "ln_post": norm, "pool": None if read is None else replace(read, norm=after)}
    if norm is not None and after is not None and vit.global_pool in ("token", "avg"):
        return {"pooling": "attention", "ln_post": norm, "pool": _two_norms(parts, vit, after, reads_prefix)}
    if vit.global_pool == "token":
        return {"pooling": "cls", "ln_post": norm or after}
    if vit.global_pool == "avg":
        pooling = "mean" if norm is None else "normed_mean"
        return {"pooling": pooling, "ln_post": norm or after, "prefix_pooled": reads_prefix}
    parts.note("max_pool" if "max" in str(vit.global_pool) else "no_pool")
    return {}


def _two_norms(parts: Parts, vit: Any, after: LayerNorm, reads_prefix: bool) -> AttentionPool:
    """The class token's row of the final norm, or the mean of all tokens', with a norm after it."""
    rows, columns = vit.patch_embed.grid_size
    prefix = vit.num_prefix_tokens
    if vit.global_pool == "token":
        read, reads_prefix = _one_hot(parts, rows * columns + prefix, 0), True
    else:
        tokens = rows * columns + (prefix if reads_prefix else 0)
        read = torch.full_like(_one_hot(parts, tokens, 0), 1 / tokens)
    identity = torch.eye(vit.embed_dim, dtype=parts.like.dtype, device=parts.like.device)
    return replace(_fixed(read[None], identity, identity, zeros(identity), reads_prefix), norm=after)


def distilled(parts: Parts, vit: Any) -> Fields:
    """The mean of what two classifiers give for two tokens: one head each, whose output projection is the classifier.

    There is no norm after the pooling, whatever ``vit.fc_norm`` is.
    """
    heads = [_classifier(parts, getattr(vit, name), name, vit.embed_dim) for name in ("head", "head_dist")]
    if len(heads[0].weight) != len(heads[1].weight):
        parts.note("replaced", "head and head_dist: of different widths")
        return {}
    rows, columns = vit.patch_embed.grid_size
    read = torch.stack([_one_hot(parts, rows * columns + vit.num_prefix_tokens, token) for token in (0, 1)])
    identity = torch.eye(vit.embed_dim, dtype=parts.like.dtype, device=parts.like.device)
    weight = torch.cat([head.weight for head in heads], 1) / 2
    bias = torch.stack([zeros(head.weight) if head.bias is None else head.bias for head in heads]).mean(0)
    pool = _fixed(read, torch.cat((identity, identity)), weight, bias, True)
    return {"pooling": "attention", "ln_post": parts.norm(vit.norm, "norm"), "pool": pool}


def _classifier(parts: Parts, layer: nn.Module, place: str, width: int) -> Linear:
    """A classifier, or the identity in place of none."""
    if type(layer) is not nn.Identity:
        return parts.linear(layer, place)
    return Linear(torch.eye(width, dtype=parts.like.dtype, device=parts.like.device), None)


def _one_hot(parts: Parts, tokens: int, token: int) -> Tensor:
    """Weights ``[N]`` that read one token; not rounded to half precision, as are those of a mean."""
    dtype = torch.promote_types(parts.like.dtype, torch.float32)
    return torch.eye(tokens, dtype=dtype, device=parts.like.device)[token].clone()


def _fixed(weights: Tensor, value: Tensor, out: Tensor, bias: Tensor, reads_prefix: bool) -> AttentionPool:
    """A pool whose heads read each token with the same weights ``[heads, N]`` for all images."""
    return AttentionPool(
        query=value.new_zeros(len(value)),
        key_weight=value,
        key_bias=None,
        value_weight=value,
        value_bias=None,
        out_weight=out,
        out_bias=bias,
        heads=len(weights),
        reads_prefix=reads_prefix,
        weights=weights,
    )


def _is_linear(layer: Any) -> bool:
    """Whether it is a convolution over single places."""
    return plain_type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1


def _after(fields: Fields, layer: Linear) -> Fields:
    """The projection of :class:`Tower` with one more layer after it."""
    weight, bias = layer.weight.T, layer.bias
    if fields["projection"] is None:
        return {"projection": weight, "projection_bias": bias}
    if fields["projection_bias"] is not None:
        shift = fields["projection_bias"] @ weight
        bias = shift if bias is None else shift + bias
    return {"projection": fields["projection"] @ weight, "projection_bias": bias}


def projection(parts: Parts, layers: Iterable[Any]) -> Fields:
    """The linear map after the pooling, with its bias: of several layers, their product."""
    fields: Fields = {"projection": None, "projection_bias": None}
    for layer in layers:
        if plain_type(layer) in (*IDLE, nn.Flatten):
            continue
        if isinstance(layer, Mlp):
            parts.note("mlp_head")
        elif plain_type(layer) in LINEARS or _is_linear(layer):
            before = parts.notes
            linear = Linear(layer.weight.flatten(1), layer.bias) if _is_linear(layer) else parts.linear(layer, "head")
            if fields["projection"] is not None and fields["projection"].shape[1] != linear.weight.shape[1]:
                parts.note("replaced", "head: a layer that does not fit the one before it")
            if parts.notes == before:
                fields = _after(fields, linear)
        elif "Pool" in type(layer).__name__:
            parts.note("head_pool", type(layer).__name__)
        else:
            parts.expect(layer, LINEARS, "head")
    return fields


def classifier(parts: Parts, layers: Any, head: list[nn.Module]) -> Fields:
    """The mean of a feature map, with a norm after it or none, and the projection."""
    if not parts.expect(layers, (ClassifierHead, NormMlpClassifierHead), "head"):
        return {}
    _mean(parts, layers.global_pool)
    ln_post = None
    if isinstance(layers, NormMlpClassifierHead):
        ln_post = parts.norm(layers.norm, "head.norm")
        if type(layers.pre_logits) is not nn.Identity:
            parts.note("mlp_head")
    fields = projection(parts, [layers.drop, layers.fc, layers.flatten, *head])
    return {"pooling": "mean", "ln_post": ln_post} | fields


def map_pool(parts: Parts, pool: Any, place: str) -> Fields:
    """CLIP's attention pool over a feature map, whose query is made of the first of :func:`map_tokens`."""
    before = parts.notes
    if pool.pool_type != "token":
        parts.note("no_pool")
    if pool.scale != pool.head_dim**-0.5:
        parts.note("replaced", f"{place}: a scale of its own")
    parts.idle(place, drop=pool.drop)
    names = ("q", "k", "v") if pool.qkv is None else ("qkv",)
    layers = [parts.linear(getattr(pool, name), f"{place}.{name}") for name in names]
    out = _classifier(parts, pool.proj, f"{place}.proj", pool.embed_dim)
    fields: Fields = {"pooling": "attention", "ln_post": None}
    if parts.notes != before:
        return fields
    if len(layers) == 1:
        weights = layers[0].weight.chunk(3)
        biases = (None, None, None) if layers[0].bias is None else layers[0].bias.chunk(3)
        layers = [Linear(*pair) for pair in zip(weights, biases, strict=True)]
    query, key, value = layers
    read = AttentionPool(
        query=query.weight,
        query_bias=query.bias,
        key_weight=key.weight,
        key_bias=key.bias,
        value_weight=value.weight,
        value_bias=value.bias,
        out_weight=out.weight,
        out_bias=zeros(out.weight) if out.bias is None else out.bias,
        heads=pool.num_heads,
    )
    return fields | {"pool": read}


def map_tokens(pool: Any, x: Tensor) -> Tensor:
    """What an ``AttentionPool2d`` reads of a feature map ``[B, W, rows, columns]``: ``[B, 1 + rows·columns, W]``.

    The first token is the mean of the others, or a class token.
    """
    size = list(x.shape[2:])
    x = x.flatten(2).mT
    first = x.mean(1, keepdim=True) if pool.cls_token is None else pool.cls_token.expand(len(x), 1, -1)
    position = resample_abs_pos_embed(pool.pos_embed[None], size, old_size=list(pool.feat_size), num_prefix_tokens=1)
    return torch.cat((first, x), 1) + position


def plain_classifier(parts: Parts, pool: Any, layer: nn.Module, head: list[nn.Module]) -> Fields:
    """The mean of a feature map, and the projection, in a network that keeps them apart."""
    _mean(parts, pool)
    return {"pooling": "mean", "ln_post": None} | projection(parts, [layer, *head])


def _mean(parts: Parts, pool: Any) -> None:
    """Notes what is no mean over a feature map."""
    if not parts.expect(pool, (SelectAdaptivePool2d,), "global_pool"):
        return
    kind = pool.pool_type
    if kind.removeprefix("fast") != "avg" and kind != "fast":
        parts.note("max_pool" if "max" in kind else "no_pool")
