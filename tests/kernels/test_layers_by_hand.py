"""``linear``, ``linear_activation``, ``add_layer_norm``: numbers anyone can verify, and arguments that are refused."""

from collections.abc import Callable
from math import erf, exp, pi, sqrt, tanh

import pytest
import torch
from measures import error
from tolerances import FLOAT64
from torch import Tensor

from clipfast.kernels import ops, reference

EITHER = pytest.mark.parametrize(
    ("linear_activation", "add_layer_norm"),
    [
        pytest.param(reference.linear_activation, lambda *given: reference.add_layer_norm(*given)[1], id="definition"),
        pytest.param(ops.linear_activation, ops.add_layer_norm, id="called"),
    ],
)


def exactly(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Tokens (1, 2) and (0, 1), W = ((1, 1), (0, -1)), b = (0, 2): the hidden layer is (3, 0) and (1, 1).
X, WEIGHT, BIAS = exactly([[[1, 2], [0, 1]]]), exactly([[1, 1], [0, -1]]), exactly([0, 2])


@EITHER
@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", lambda h: h * (1 + erf(h / sqrt(2))) / 2),
        ("gelu_tanh", lambda h: h * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 * h**3))) / 2),
        ("quick_gelu", lambda h: h / (1 + exp(-1.702 * h))),
    ],
)
def test_linear_activation(
    linear_activation: Callable[..., Tensor],
    add_layer_norm: object,
    activation: str,
    function: Callable[[float], float],
) -> None:
    expected = exactly([[[function(3.0), 0], [function(1.0), function(1.0)]]])
    assert error(linear_activation(X, WEIGHT, BIAS, activation), expected) <= FLOAT64


@EITHER
def test_the_activations_are_three(linear_activation: Callable[..., Tensor], add_layer_norm: object) -> None:
    """At 3: Φ(3) = 0.99865, its tanh form 0.99879, the sigmoid of 5.106 0.99398."""
    for activation, share in {"gelu": 0.99865, "gelu_tanh": 0.99879, "quick_gelu": 0.99398}.items():
        have = linear_activation(X, WEIGHT, BIAS, activation)[0, 0, 0] / 3
        assert abs(float(have) - share) < 5e-6, activation


@EITHER
def test_add_layer_norm(linear_activation: object, add_layer_norm: Callable[..., Tensor]) -> None:
    """(10, 2) + (4, 4) = (14, 6): mean 10, variance 16; with ε = 9 the deviation is 5; (4/5, −4/5)·(10, 5) + (1, 2)."""
    have = add_layer_norm(exactly([[10, 2]]), exactly([[4, 4]]), exactly([10, 5]), exactly([1, 2]), 9.0)
    assert error(have, exactly([[9, -2]])) <= FLOAT64


@pytest.mark.parametrize("linear", [reference.linear, ops.linear], ids=["definition", "called"])
def test_linear(linear: Callable[..., Tensor]) -> None:
    """(1, 2)·(3, 4) = 11, with 5 more 16; (1, 2)·(−1, 0) = −1, with −2 more −3."""
    x, weight = exactly([[1, 2]]), exactly([[3, 4], [-1, 0]])
    assert error(linear(x, weight, exactly([5, -2])), exactly([[16, -3]])) <= FLOAT64
    assert error(linear(x, weight, None), exactly([[11, -1]])) <= FLOAT64


def test_the_stream_is_changed_in_place() -> None:
    x, delta = exactly([[10, 2]]), exactly([[4, 4]])
    ops.add_layer_norm(x, delta, exactly([10, 5]), exactly([1, 2]), 9.0)
    assert torch.equal(x, exactly([[14, 6]]))
    assert torch.equal(delta, exactly([[4, 4]]))
    ops.add_layer_norm(x, None, exactly([10, 5]), exactly([1, 2]), 9.0)
    assert torch.equal(x, exactly([[14, 6]]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": (2, 5, 8)}, r"x has shape \[2, 5, 8\], expected \[\?, \?, 7\]"),
        ({"weight": (6, 7, 1)}, r"weight has shape \[6, 7, 1\], expected \[\?, \?\]"),
        ({"bias": (7,)}, r"bias has shape \[7\], expected \[6\]"),
        ({"activation": "relu"}, "activation is 'relu', expected one of gelu, gelu_tanh, quick_gelu"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_of_linear_activation(change: dict[str, object], told: str) -> None:
    given = {"x": (2, 5, 7), "weight": (6, 7), "bias": (6,), "activation": "gelu", **change}
    tensors = {name: torch.ones(shape) if isinstance(shape, tuple) else shape for name, shape in given.items()}
    with pytest.raises(ValueError, match=f"^{told}"):
        ops.linear_activation(**tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": (2, 5, 8)}, r"x has shape \[2, 5, 8\], expected \[\?, \?, 7\]"),
        ({"weight": (6, 7, 1)}, r"weight has shape \[6, 7, 1\], expected \[\?, \?\]"),
        ({"bias": (7,)}, r"bias has shape \[7\], expected \[6\]"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_of_linear(change: dict[str, object], told: str, dtype: torch.dtype) -> None:
    given = {"x": (2, 5, 7), "weight": (6, 7), "bias": (6,), **change}
    tensors = {k: torch.ones(shape, dtype=dtype) if isinstance(shape, tuple) else shape for k, shape in given.items()}
    with pytest.raises(ValueError, match=f"^{told}"):
        ops.linear(**tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"delta": (2, 5)}, r"delta has shape \[2, 5\], expected \[2, 5, 7\]"),
        ({"delta": (1, 1, 7)}, r"delta has shape \[1, 1, 7\], expected \[2, 5, 7\]"),
        ({"weight": (1,)}, r"weight has shape \[1\], expected \[7\]"),
        ({"bias": (5, 7)}, r"bias has shape \[5, 7\], expected \[7\]"),
        ({"carried": (5, 7)}, r"carried has shape \[5, 7\], expected \[7\]"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_of_add_layer_norm(change: dict[str, object], told: str) -> None:
    given = {"x": (2, 5, 7), "delta": (2, 5, 7), "weight": (7,), "bias": (7,), "eps": 1e-5, **change}
    tensors = {name: torch.ones(shape) if isinstance(shape, tuple) else shape for name, shape in given.items()}
    with pytest.raises(ValueError, match=f"^{told}"):
        ops.add_layer_norm(**tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"h": (2, 4, 6)}, r"x has shape \[2, 5, 7\], expected \[2, 4, 7\]"),
        ({"h": (2, 5, 7)}, r"h has shape \[2, 5, 7\], expected \[\?, \?, 6\]"),
        ({"weight": (7,)}, r"weight has shape \[7\], expected \[\?, \?\]"),
        ({"weight": torch.ones(7, 6).half()}, "weight is torch.float16, expected torch.float32"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_of_add_linear(change: dict[str, object], told: str) -> None:
    given = {"x": (2, 5, 7), "h": (2, 5, 6), "weight": (7, 6), **change}
    tensors = {name: torch.ones(shape) if isinstance(shape, tuple) else shape for name, shape in given.items()}
    with pytest.raises(ValueError, match=f"^{told}"):
        ops.add_linear(**tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": (2, 5, 7)}, r"x has shape \[2, 5, 7\], expected \[\?, 7\]"),
        ({"bias": (7,)}, r"bias has shape \[7\], expected \[6\]"),
        ({"bias": torch.ones(6).half()}, "bias is torch.float16, expected torch.float32"),
        ({"backend": "abacus"}, "unknown backend 'abacus'"),
    ],
)
def test_wrong_arguments_of_linear_unrounded(change: dict[str, object], told: str) -> None:
    given = {"x": (5, 7), "weight": (6, 7), "bias": (6,), **change}
    tensors = {name: torch.ones(shape) if isinstance(shape, tuple) else shape for name, shape in given.items()}
    with pytest.raises(ValueError, match=f"^{told}"):
        ops.linear_unrounded(**tensors)  # type: ignore[arg-type]


def test_products_that_add_themselves() -> None:
    """(1, 2) + 3 · (10, 20), and a stream (1, 5) with carried (9, −3): (10, 2), of mean 6 and deviation √(16 + 9)."""
    x = exactly([[1, 2]])
    ops.add_linear(x, exactly([[3]]), exactly([[10], [20]]))
    assert x.tolist() == [[31, 62]]
    stream = exactly([[1, 5]])
    have = ops.add_layer_norm(stream, None, exactly([10, 5]), exactly([1, 2]), 9.0, exactly([9, -3]))
    assert error(have, exactly([[9, -2]])) <= FLOAT64
    assert stream.tolist() == [[1, 5]]
    assert ops.linear_unrounded(exactly([[3]]), exactly([[10], [20]]), exactly([1, 2])).tolist() == [[31, 62]]
