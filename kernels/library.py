"""The operations as ``torch.library`` custom ops: what makes them work under ``torch.compile`` and fake tensors.

Each is registered as ``torch.ops.clipfast.NAME`` with its schema and a fake that gives shapes, dtypes and layout
without computing; the body asks :mod:`clipfast.kernels.dispatch` which backend computes. Results are contiguous
whatever the backend. There are no gradients: a decomposition is read, not trained through.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from clipfast.kernels import dispatch
from clipfast.kernels.reference import accumulation_dtype

_PLAIN = (Tensor, Parameter)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or like.dtype)


def _exact(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=accumulation_dtype(like.dtype))


def _attention(qkv: Tensor, row: str | None) -> tuple[Tensor, Tensor]:
    images, tokens, _, heads, head_dim = qkv.shape
    alpha = _exact(qkv, images, heads, tokens if row is not None else 0)
    return _empty(qkv, images, tokens, heads, head_dim), alpha


def _query_row(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    images, heads, head_dim = query.shape
    return _exact(key, images, heads, head_dim), _exact(key, images, heads, key.shape[1])


def _query_row_from_tokens(
    query: Tensor, tokens: Tensor, key_weight: Tensor, value_weight: Tensor, value_bias: Tensor
) -> tuple[Tensor, Tensor]:
    images, heads, head_dim = query.shape
    return _exact(tokens, images, heads, head_dim), _exact(tokens, images, heads, tokens.shape[1])


def _layered_text_maps(alpha: Tensor, values: list[Tensor], text_basis: Tensor, heads: Tensor | None) -> Tensor:
    return _empty(alpha, alpha.shape[0], alpha.shape[3], text_basis.shape[3])


def _head_maps(alpha: Tensor, value: Tensor, text_basis: Tensor) -> Tensor:
    images, tokens, heads, _ = value.shape
    return _empty(alpha, images, heads, tokens, text_basis.shape[2])


def _token_contributions(
    alpha: Tensor, value: Tensor, basis: Tensor, shift: Tensor | None, scale: Tensor | None
) -> Tensor:
    images, tokens, heads, _ = value.shape
    return _empty(basis, images, tokens, heads, basis.shape[2])


def _layer_statistics(residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _exact(residual, residual.shape[0]), _exact(residual, residual.shape[0])


def _span(texts: Tensor, factor: Tensor, size: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    groups, _, rank = texts.shape
    return (
        _empty(texts, groups, size, dtype=torch.long),
        _empty(texts, groups, size),
        _empty(texts, groups, size, rank),
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _empty(x, *x.shape[:-1], weight.shape[0])


def _linear_activation(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return _empty(x, *x.shape[:-1], weight.shape[0])


def _add_layer_norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _empty(x, *x.shape)


def _none(*arguments: Any) -> None:
    return None


# name → (arguments without the backend, results, fake)
_DEFINITIONS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "attention": ("Tensor qkv, str? row", "(Tensor, Tensor)", _attention),
    "query_row": ("Tensor query, Tensor key, Tensor value", "(Tensor, Tensor)", _query_row),
    "query_row_from_tokens": (
        "Tensor query, Tensor tokens, Tensor key_weight, Tensor value_weight, Tensor value_bias",
        "(Tensor, Tensor)",
        _query_row_from_tokens,
    ),
    "text_maps": ("Tensor alpha, Tensor value, Tensor text_basis, Tensor(a!) out, Tensor? heads", "()", _none),
    "text_maps_from_tokens": (
        "Tensor alpha, Tensor tokens, Tensor value_weight, Tensor value_bias, Tensor text_basis, Tensor(a!) out",
        "()",
        _none,
    ),
    "layered_text_maps": (
        "Tensor alpha, Tensor[] values, Tensor text_basis, Tensor? heads",
        "Tensor",
        _layered_text_maps,
    ),
    "head_maps": ("Tensor alpha, Tensor value, Tensor text_basis", "Tensor", _head_maps),
    "token_contributions": (
        "Tensor alpha, Tensor value, Tensor basis, Tensor? shift, Tensor? scale",
        "Tensor",
        _token_contributions,
    ),
    "layer_statistics": ("Tensor residual, float eps", "(Tensor, Tensor)", _layer_statistics),
    "moments": ("Tensor codes, Tensor shared, Tensor centre, Tensor(a!) total, Tensor(b!) second", "()", _none),
    "span": ("Tensor texts, Tensor factor, int size, float floor", "(Tensor, Tensor, Tensor)", _span),
    "linear": ("Tensor x, Tensor weight, Tensor? bias", "Tensor", _linear),
    "linear_activation": ("Tensor x, Tensor weight, Tensor bias, str activation", "Tensor", _linear_activation),
    "add_layer_norm": (
        "Tensor(a!) x, Tensor? delta, Tensor weight, Tensor bias, float eps",
        "Tensor",
        _add_layer_norm,
    ),
}

MUTATED: Mapping[str, tuple[int, ...]] = {
    name: tuple(place for place, argument in enumerate(arguments.split(", ")) if "!" in argument)
    for name, (arguments, _, _) in _DEFINITIONS.items()
}
"""Which arguments an operation changes, by position."""


def _compute(name: str, *given: Any) -> Any:
    *inputs, backend = given
    return dispatch.choose(name, inputs, backend).run(*inputs)


def _register(name: str, arguments: str, results: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    names = [argument.split()[-1] for argument in arguments.split(", ")]

    def compute(*given: Any) -> Any:
        return _compute(name, *given)

    def shapes(*given: Any) -> Any:
        return fake(*given[:-1])

    op = torch.library.custom_op(
        f"clipfast::{name}",
        compute,
        mutates_args=[names[place] for place in MUTATED[name]],
        schema=f"({arguments}, str backend) -> {results}",
    )
    op.register_fake(shapes)
    return op


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    name: _register(name, *definition) for name, definition in _DEFINITIONS.items()
}
"""Every operation by name, called with its arguments in order and a backend's name last."""


def call(name: str, *given: Any) -> Any:
    """An operation with its arguments in order and a backend's name last, as an op only where somebody would notice.

    What makes it an op takes longer than a small kernel: 0.1 ms, more where the caches are cold. So plain tensors go
    straight to the backend, unless the call is compiled, observed by a dispatch mode (fake tensors, counters), or
    reached by gradients, which the op refuses.
    """
    return OPERATIONS[name](*given) if _observed(given) else _compute(name, *given)


def _observed(given: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    traced = torch.is_grad_enabled()
    for each in given:
        for one in each if isinstance(each, list) else (each,):
            if isinstance(one, Tensor) and (type(one) not in _PLAIN or (traced and one.requires_grad)):
                return True
    return False
