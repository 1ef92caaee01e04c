"""The operations in C++ for the CPU: which of them, how their arguments become pointers, and what they refuse.

The mathematics is in ``csrc/``, a file per operation; here are allocation and strides. Results are allocated here, so
the library holds no memory but scratch of its own.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from clipfast.kernels import buffers, native
from clipfast.kernels.dispatch import Implementation
from clipfast.kernels.native_linear import FORMATS, linear, linear_activation
from clipfast.kernels.native_maps import layered_text_maps, text_maps, text_maps_from_tokens
from clipfast.kernels.reference import Activation, Row


def _unreadable(**tensors: Tensor) -> list[str]:
    """The reasons why memory does not hold what these tensors say."""
    return [f"{name} {fault}" for name, tensor in tensors.items() if (fault := _fault(tensor))]


def _fault(tensor: Tensor) -> str:
    """What keeps a tensor from being read at its address, empty for nothing."""
    if not tensor.is_cpu:
        return f"is on {tensor.device}"
    if tensor.is_neg():
        return "is a negated view"
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # sparse, or batched by torch.vmap
        return "has no memory of its own"
    if not address and tensor.numel():  # inside torch.func.functionalize; zeros that torch never wrote
        return "has no memory of its own"
    return "does not lie at a whole number of its elements" if address % tensor.element_size() else ""


def _other_formats(**tensors: Tensor) -> list[str]:
    """The reasons why what these tensors hold is not computed with here."""
    return [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if tensor.dtype not in FORMATS]


def attention(qkv: Tensor, row: Row | None) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.attention`, one thread per image and head; no weights for ``row=None``.

    In bfloat16 with AVX512-BF16 the values are multiplied by weights rounded to bfloat16, and what is smaller than
    2⁻¹²⁶ counts as zero; the weights returned are those of float32.
    """
    images, tokens, _, heads, width = qkv.shape
    out = buffers.empty(qkv, images, tokens, heads, width)
    alpha = qkv.new_empty(images, heads, tokens if row is not None else 0, dtype=torch.float32)
    if out.numel():
        qkv = qkv if qkv.stride(4) == 1 else qkv.contiguous()
        native.call(
            "attention",
            FORMATS[qkv.dtype],
            qkv,
            *qkv.stride()[:4],
            images,
            tokens,
            heads,
            width,
            width**-0.5,
            out,
            alpha if row is not None else None,
            row == "mean",
        )
    return out, alpha


def query_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.query_row`, one thread per image and head."""
    images, tokens, heads, width = key.shape
    z = key.new_empty(images, heads, width, dtype=torch.float32)
    alpha = key.new_empty(images, heads, tokens, dtype=torch.float32)
    if z.numel():
        key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (key, value))
        native.call(
            "query_row",
            FORMATS[key.dtype],
            query.float().contiguous(),
            key,
            *key.stride()[:3],
            value,
            *value.stride()[:3],
            images,
            tokens,
            heads,
            width,
            width**-0.5,
            z,
            alpha,
        )
    elif alpha.numel():  # heads of no width: every product is 0
        alpha.fill_(1 / tokens)
    return z, alpha


def add_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Adds ``delta`` to ``x`` and returns the LayerNorm, :func:`clipfast.kernels.reference.add_layer_norm`."""
    out = buffers.empty(x, *x.shape)
    rows = _rows(x)
    if out.numel() and rows is not None:
        native.call(
            "layer_norm",
            FORMATS[x.dtype],
            x,
            *rows.stride()[:2],
            *rows.shape,
            None if delta is None else delta.contiguous(),
            weight.float().contiguous(),
            bias.float().contiguous(),
            eps,
            out,
        )
    return out


def _rows(x: Tensor) -> Tensor | None:
    """``x [..., W]`` as ``[outer, inner, W]`` where it lies, None where two strides do not say where rows are."""
    if x.ndim == 3:
        return x
    if x.ndim < 3:
        return x[None, None] if x.ndim == 1 else x[None]
    try:
        return x.view(-1, *x.shape[-2:])
    except RuntimeError:
        return None


def moments(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> None:
    """Adds :func:`clipfast.kernels.reference.moments` to ``total`` and ``second``, all of it in float64."""
    images, groups, entries = codes.shape
    columns = entries + shared.shape[1]
    if not (images and groups and columns):
        return
    given = (codes, shared, centre)
    dtype = torch.float64 if torch.float64 in {each.dtype for each in given} else torch.float32
    codes, shared, centre = (each.to(dtype) for each in given)  # what is smaller is widened, exactly
    native.call(
        "moments",
        dtype == torch.float64,
        codes,
        *codes.stride(),
        shared,
        *shared.stride(),
        centre.contiguous(),
        images,
        groups,
        entries,
        columns,
        total,
        second,
    )


def span(texts: Tensor, factor: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.span`, one thread per head; of float32 texts in float64, too."""
    groups, count, rank = texts.shape
    picks = torch.full((groups, size), -1, dtype=torch.long)
    variance, directions = texts.new_zeros(groups, size), texts.new_zeros(groups, size, rank)
    if groups and rank:
        native.call(
            "span",
            texts.dtype == torch.float64,
            texts,
            *texts.stride(),
            factor.double().contiguous(),
            groups,
            count,
            rank,
            size,
            floor,
            picks,
            variance,
            directions,
        )
    return picks, variance, directions


def _refuses_attention(qkv: Tensor, row: Row | None) -> list[str]:
    return _unreadable(qkv=qkv) or _other_formats(qkv=qkv)


def _refuses_query_row(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    given = {"query": query, "key": key, "value": value}
    reasons = _unreadable(**given) or _other_formats(**given)
    return reasons or ([f"value is {value.dtype}, key is {key.dtype}"] if value.dtype != key.dtype else [])


def _refuses_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    given = {"x": x, "weight": weight}
    if bias is not None:
        given["bias"] = bias
    return _unreadable(**given) or [
        f"{name} is {tensor.dtype}, x is {x.dtype}" for name, tensor in given.items() if tensor.dtype != x.dtype
    ]


def _refuses_linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> list[str]:
    return _refuses_linear(x, weight, bias) or _other_formats(x=x)


def _refuses_add_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> list[str]:
    given = {"x": x, "weight": weight, "bias": bias}
    if delta is not None:
        given["delta"] = delta
    reasons = _unreadable(**given) or _other_formats(**given)
    if not reasons and delta is not None and delta.dtype != x.dtype:
        reasons = [f"delta is {delta.dtype}, x is {x.dtype}"]
    if x.numel() and (_meets_itself(x) or x.stride(-1) != 1 or _rows(x) is None):
        reasons.append(f"x has strides {list(x.stride())}")
    if not reasons and delta is not None and _changes_with(x, delta):
        reasons = ["delta shares memory with x"]
    return reasons


def _meets_itself(x: Tensor) -> bool:
    """Whether two entries may lie in one place: rows of one matrix that overlap, one row for all."""
    if x.is_contiguous():
        return False
    length = 1  # of what lies within the axis
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < length:
                return True
            length += (size - 1) * stride
    return False


def _changes_with(x: Tensor, delta: Tensor) -> bool:
    """Whether an entry of ``x`` changes another one of ``delta``, which is read where it lies if it is contiguous."""
    apart = (delta.data_ptr() - x.data_ptr()) // x.element_size()
    count = x.numel()
    if not count or apart <= -count or (apart >= count and x.is_contiguous()):
        return False
    if not apart and x.stride() == delta.stride():
        return False
    length = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return apart < length and delta.is_contiguous()


def _refuses_text_maps(
    alpha: Tensor, value: Tensor, text_basis: Tensor, out: Tensor, heads: Tensor | None = None
) -> list[str]:
    given = {"alpha": alpha, "value": value, "text_basis": text_basis, "out": out}
    return _unreadable(**given | ({} if heads is None else {"heads": heads})) or _other_formats(**given)


def _refuses_layered_text_maps(
    alpha: Tensor, values: Sequence[Tensor], text_basis: Tensor, heads: Tensor | None
) -> list[str]:
    given = {"alpha": alpha, "text_basis": text_basis} | {f"values[{i}]": value for i, value in enumerate(values)}
    return _unreadable(**given | ({} if heads is None else {"heads": heads})) or _other_formats(**given)


def _refuses_text_maps_from_tokens(
    alpha: Tensor, tokens: Tensor, value_weight: Tensor, value_bias: Tensor, text_basis: Tensor, out: Tensor
) -> list[str]:
    given = {"alpha": alpha, "tokens": tokens, "value_weight": value_weight, "value_bias": value_bias}
    given |= {"text_basis": text_basis, "out": out}
    return _unreadable(**given) or [
        f"{name} is {tensor.dtype}" for name, tensor in given.items() if tensor.dtype not in (*FORMATS, torch.float64)
    ]


def _refuses_moments(codes: Tensor, shared: Tensor, centre: Tensor, total: Tensor, second: Tensor) -> list[str]:
    read = {"codes": codes, "shared": shared, "centre": centre}
    reasons = _unreadable(**read, total=total, second=second)
    return reasons or [f"{name} is {each.dtype}" for name, each in read.items() if not each.dtype.is_floating_point]


def _refuses_span(texts: Tensor, factor: Tensor, size: int, floor: float) -> list[str]:
    return _unreadable(texts=texts, factor=factor)


IMPLEMENTATIONS: Mapping[str, Implementation] = {
    "add_layer_norm": Implementation(add_layer_norm, _refuses_add_layer_norm),
    "attention": Implementation(attention, _refuses_attention),
    "layered_text_maps": Implementation(layered_text_maps, _refuses_layered_text_maps),
    "linear": Implementation(linear, _refuses_linear),
    "linear_activation": Implementation(linear_activation, _refuses_linear_activation),
    "moments": Implementation(moments, _refuses_moments),
    "query_row": Implementation(query_row, _refuses_query_row),
    "span": Implementation(span, _refuses_span),
    "text_maps": Implementation(text_maps, _refuses_text_maps),
    "text_maps_from_tokens": Implementation(text_maps_from_tokens, _refuses_text_maps_from_tokens),
}
"""By the operations' names in :mod:`clipfast.kernels.ops`."""
