"""What the fuzz test knows of each operation: arguments to draw, and the definition that results are compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fuzzing import Drawn, size
from hypothesis import strategies as st
from torch import Tensor

from clipfast.kernels import ops, reference
from clipfast.kernels.linear import native as native_linear

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
EITHER = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Operation:
    """What the fuzz test knows of one operation.

    Attributes:
        draw: its arguments.
        define: everything that it returns and changes, from arguments of any precision.
        terms: the magnitude of what is summed for each of them; errors are relative to it, as sums may cancel.
        settle: the arguments after the rounding that is part of the definition.
        exact: computes in float64 for arguments of any dtype.
        product: the part that torch computes; MKL's sums may depend on the number of threads, and so may results.
    """

    draw: Callable[[Drawn], list[Any]]
    define: Callable[..., tuple[Tensor, ...]]
    terms: Callable[..., tuple[Tensor, ...]]
    settle: Callable[..., tuple[Any, ...]] = lambda *arguments: arguments
    exact: bool = False
    product: Callable[..., Tensor | None] = lambda *arguments: None


def draw_attention(drawn: Drawn) -> list[Any]:
    row = drawn.draw(st.sampled_from(("cls", "mean", None)))
    tokens = size(drawn.draw, 67, 2 if row == "mean" else 0)
    shape = (size(drawn.draw, 3), tokens, 3, size(drawn.draw, 3), size(drawn.draw, 129, 1))
    return [drawn.tensor(*shape, dtype=drawn.draw(st.sampled_from(FORMATS))), row]


def define_attention(qkv: Tensor, row: reference.Row | None) -> tuple[Tensor, ...]:
    if not qkv.shape[1]:  # no tokens: no rows either
        return (qkv[:, :, 0], qkv.sum((1, 2, 4))[..., None][..., :0])[: 2 if row else 1]
    return reference.attention(qkv, row or "cls")[: 2 if row else 1]


def attention_terms(qkv: Tensor, row: reference.Row | None) -> tuple[Tensor, ...]:
    """Values and weights; of a weight e^x what x has lost is lost."""
    query, key, value = qkv.unbind(2)
    logits = torch.einsum("bnhe,bmhe->bhnm", query.abs(), key.abs()) * query.shape[-1] ** -0.5
    lost = 1 + logits.where(logits.isfinite(), 0).flatten().max() if logits.numel() else 1
    return value * lost, qkv.new_ones(1) * lost


def draw_linear_activation(drawn: Drawn) -> list[Any]:
    columns, inner, dtype = size(drawn.draw, 300), size(drawn.draw, 33), drawn.draw(st.sampled_from(FORMATS))
    before = [size(drawn.draw, most) for most in drawn.draw(st.sampled_from(((), (300,), (3, 65), (2, 2, 9))))]
    activation = drawn.draw(st.sampled_from(("gelu", "gelu_tanh", "quick_gelu")))
    tensors = [drawn.tensor(*shape, dtype=dtype) for shape in ((*before, inner), (columns, inner), (columns,))]
    return [*tensors, activation]


def define_linear_activation(*arguments: Any) -> tuple[Tensor, ...]:
    return (reference.linear_activation(*arguments),)


def linear_product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "") -> Tensor:
    return native_linear.linear(x, weight, None if x.dtype == torch.float32 and activation else bias)


def linear_activation_terms(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, ...]:
    return (x.abs() @ weight.abs().T + bias.abs(),)


def draw_add_layer_norm(drawn: Drawn) -> list[Any]:
    width, dtype = size(drawn.draw, 300), drawn.draw(st.sampled_from(FORMATS))
    before = [size(drawn.draw, most) for most in drawn.draw(st.sampled_from(((), (300,), (3, 65), (2, 2, 9))))]
    x = drawn.tensor(*before, width, dtype=dtype, rows=True)
    delta = drawn.tensor(*before, width, dtype=dtype) if drawn.draw(st.booleans()) else None
    weight, bias = (drawn.tensor(width, dtype=drawn.draw(st.sampled_from((dtype, torch.float32)))) for _ in range(2))
    return [x, delta, weight, bias, drawn.draw(st.sampled_from((1e-5, 1e-6)))]


def define_add_layer_norm(*arguments: Any) -> tuple[Tensor, ...]:
    added, normed = reference.add_layer_norm(*arguments)
    return normed, added


def add_layer_norm_terms(x: Tensor, delta: None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return define_add_layer_norm(x, None, weight, torch.zeros_like(bias), eps)[0].abs() + bias.abs(), x


def settle_add_layer_norm(x: Tensor, delta: Tensor | None, *others: Any) -> tuple[Any, ...]:
    return (x if delta is None else x + delta, None, *others)


def draw_moments(drawn: Drawn) -> list[Any]:
    images, groups, entries, extra = (size(drawn.draw, most) for most in (300, 3, 37, 5))
    dtypes = (*EITHER, torch.bfloat16, torch.float16)
    shapes = (images, groups, entries), (images, extra), (groups, entries + extra)
    codes, shared, centre = (drawn.tensor(*shape, dtype=drawn.draw(st.sampled_from(dtypes))) for shape in shapes)
    sums = (groups, entries + extra), (groups, entries + extra, entries + extra)
    return [codes, shared, centre, *(drawn.tensor(*shape, dtype=torch.float64, packed=True) for shape in sums)]


def define_moments(codes: Tensor, shared: Tensor, centre: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
    return tuple(was + added for was, added in zip(sums, reference.moments(codes, shared, centre), strict=True))


def draw_span(drawn: Drawn) -> list[Any]:
    groups, texts, rank = size(drawn.draw, 3), size(drawn.draw, 129, 1), size(drawn.draw, 33)
    dtype = drawn.draw(st.sampled_from(EITHER))
    factor_dtype = drawn.draw(st.sampled_from((dtype, torch.float64)))
    pool = drawn.tensor(groups, texts, rank, dtype=dtype)
    factor = drawn.tensor(groups, rank, rank, dtype=factor_dtype)
    return [pool, factor, drawn.draw(st.integers(1, rank + 3)), drawn.draw(st.sampled_from((1e-10, 1e-3, 0.5)))]


def draw_linear(drawn: Drawn) -> list[Any]:
    *tensors, _ = draw_linear_activation(drawn)
    return [*tensors[:2], tensors[2] if drawn.draw(st.booleans()) else None]


def define_linear(*arguments: Any) -> tuple[Tensor, ...]:
    return (reference.linear(*arguments),)


def linear_terms(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    return (x.abs() @ weight.abs().T + (0 if bias is None else bias.abs()),)


def draw_query_row(drawn: Drawn) -> list[Any]:
    images, tokens, heads = size(drawn.draw, 3), size(drawn.draw, 67, 1), size(drawn.draw, 3)
    width, dtype = size(drawn.draw, 129, 1), drawn.draw(st.sampled_from(FORMATS))
    query = drawn.tensor(images, heads, width, dtype=drawn.draw(st.sampled_from((dtype, torch.float32))))
    return [query, *(drawn.tensor(images, tokens, heads, width, dtype=dtype) for _ in range(2))]


def define_query_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(query.dtype, key.dtype)
    return reference.query_row(query.to(dtype), key.to(dtype), value.to(dtype))


def query_row_terms(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """As :func:`attention_terms`."""
    logits = torch.einsum("bhe,bnhe->bhn", query.abs(), key.abs()) * query.shape[-1] ** -0.5
    lost = 1 + logits.where(logits.isfinite(), 0).flatten().max() if logits.numel() else 1
    return value * lost, query.new_ones(1) * lost


def draw_weighted_rows(drawn: Drawn) -> list[Any]:
    images, tokens, heads, groups = (size(drawn.draw, most) for most in (3, 67, 3, 18))
    shape = (images, tokens, 3, heads, size(drawn.draw, 129, 1))
    return [drawn.tensor(*shape, dtype=drawn.draw(st.sampled_from(FORMATS))), drawn.tensor(images, groups, tokens)]


def define_weighted_rows(qkv: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    return (reference.weighted_rows(qkv.to(weights.dtype), weights),)


def weighted_rows_terms(qkv: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """The weights' sums; of a row's weight e^x what x has lost is lost, as in :func:`attention_terms`."""
    _, lost = attention_terms(qkv.to(weights.dtype), "cls")
    return (weights.abs().sum(-1) * lost,)


def draw_rotate(drawn: Drawn) -> list[Any]:
    images, tokens, parts, heads = (size(drawn.draw, most) for most in (3, 17, 3, 3))
    width = 2 * size(drawn.draw, 67, 1)
    dtypes = [drawn.draw(st.sampled_from(FORMATS)) for _ in range(3)]
    tables = drawn.draw(st.sampled_from((1, heads)))
    x = drawn.tensor(images, tokens, parts, heads, width, dtype=dtypes[0], rows=True)
    angles = [drawn.tensor(tables, tokens, width, dtype=dtype) for dtype in dtypes[1:]]
    return [x, *angles, drawn.draw(st.booleans())]


def define_rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (reference.rotate(x.to(dtype), cos.to(dtype), sin.to(dtype), halves).to(x.dtype),)


def rotate_terms(x: Tensor, cos: Tensor, sin: Tensor, halves: bool) -> tuple[Tensor, ...]:
    """Both products of every entry: what is subtracted may cancel."""
    own, other = (x * cos.transpose(0, 1)[:, None]).abs(), reference.rotate(x, torch.zeros_like(cos), sin, halves)
    return (own + other.abs(),)


def some_of(drawn: Drawn, count: int) -> Tensor | None:
    """Some heads, each once, or None for all."""
    if drawn.draw(st.booleans()):
        return None
    chosen = drawn.draw(st.lists(st.integers(0, count - 1), unique=True, max_size=5)) if count else []
    return torch.tensor(chosen, dtype=drawn.draw(st.sampled_from((torch.int64, torch.int32))))


def draw_text_maps(drawn: Drawn) -> list[Any]:
    images, tokens, heads, width, texts = (size(drawn.draw, most) for most in (3, 67, 3, 129, 96))
    value = drawn.tensor(images, tokens, heads, width, dtype=drawn.draw(st.sampled_from(FORMATS)))
    alpha, basis = drawn.tensor(images, heads, tokens), drawn.tensor(heads, width, texts)
    return [alpha, value, basis, drawn.tensor(images, tokens, texts, packed=True), some_of(drawn, heads)]


def define_text_maps(
    alpha: Tensor, value: Tensor, basis: Tensor, out: Tensor, heads: Tensor | None
) -> tuple[Tensor, ...]:
    return (
        out + reference.text_maps(alpha, value.to(alpha.dtype), basis.to(alpha.dtype), heads),
    ) * 2  # returned and changed


def text_maps_terms(*arguments: Any) -> tuple[Tensor, ...]:
    return define_text_maps(*(each.abs() if isinstance(each, Tensor) else each for each in arguments))


def draw_layered_text_maps(drawn: Drawn) -> list[Any]:
    images, tokens, heads, width, texts = (size(drawn.draw, most) for most in (3, 33, 3, 33, 33))
    layers, dtype = size(drawn.draw, 3, 1), drawn.draw(st.sampled_from(FORMATS))
    values = [drawn.tensor(images, tokens, heads, width, dtype=dtype) for _ in range(layers)]
    alpha, basis = drawn.tensor(images, layers, heads, tokens), drawn.tensor(layers, heads, width, texts)
    return [alpha, values, basis, some_of(drawn, layers * heads)]


def define_layered_text_maps(
    alpha: Tensor, values: list[Tensor], basis: Tensor, heads: Tensor | None
) -> tuple[Tensor, ...]:
    values, basis = [value.to(alpha.dtype) for value in values], basis.to(alpha.dtype)
    return (reference.layered_text_maps(alpha, values, basis, heads),)


def layered_text_maps_terms(
    alpha: Tensor, values: list[Tensor], basis: Tensor, heads: Tensor | None
) -> tuple[Tensor, ...]:
    return define_layered_text_maps(alpha.abs(), [value.abs() for value in values], basis.abs(), heads)


def draw_text_maps_from_tokens(drawn: Drawn) -> list[Any]:
    images, tokens, heads, head_dim, texts = (size(drawn.draw, most) for most in (3, 33, 3, 17, 33))
    width, dtype = size(drawn.draw, 33, 1), drawn.draw(st.sampled_from(FORMATS))
    weight, bias = drawn.tensor(heads, head_dim, width, dtype=dtype), drawn.tensor(heads, head_dim, dtype=dtype)
    seen, alpha = drawn.tensor(images, tokens, width, dtype=dtype), drawn.tensor(images, heads, tokens)
    basis, out = drawn.tensor(heads, head_dim, texts), drawn.tensor(images, tokens, texts, packed=True)
    return [alpha, seen, weight, bias, basis, out]


def define_text_maps_from_tokens(
    alpha: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, basis: Tensor, out: Tensor
) -> tuple[Tensor, ...]:
    value = torch.einsum("bnw,hew->bnhe", tokens, weight) + bias
    return (out + reference.text_maps(alpha, value.to(alpha.dtype), basis),) * 2


def text_maps_from_tokens_terms(*arguments: Tensor) -> tuple[Tensor, ...]:
    return define_text_maps_from_tokens(*(each.abs() for each in arguments))


def tokens_product(*arguments: Tensor) -> Tensor:
    """All of it: here it is made of torch's products."""
    *others, out = arguments
    return ops.text_maps_from_tokens(*others, out.clone(), backend="native")


OPERATIONS: dict[str, Operation] = {
    "add_layer_norm": Operation(
        draw_add_layer_norm, define_add_layer_norm, add_layer_norm_terms, settle_add_layer_norm
    ),
    "attention": Operation(draw_attention, define_attention, attention_terms),
    "layered_text_maps": Operation(draw_layered_text_maps, define_layered_text_maps, layered_text_maps_terms),
    "linear": Operation(draw_linear, define_linear, linear_terms, product=linear_product),
    "linear_activation": Operation(
        draw_linear_activation, define_linear_activation, linear_activation_terms, product=linear_product
    ),
    "moments": Operation(draw_moments, define_moments, define_moments, exact=True),
    "query_row": Operation(draw_query_row, define_query_row, query_row_terms),
    "rotate": Operation(draw_rotate, define_rotate, rotate_terms),
    "span": Operation(draw_span, reference.span, reference.span, exact=True),
    "text_maps": Operation(draw_text_maps, define_text_maps, text_maps_terms),
    "text_maps_from_tokens": Operation(
        draw_text_maps_from_tokens, define_text_maps_from_tokens, text_maps_from_tokens_terms, product=tokens_product
    ),
    "weighted_rows": Operation(draw_weighted_rows, define_weighted_rows, weighted_rows_terms),
}
