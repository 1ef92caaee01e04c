"""Products whose threads divide the weight, and the pass that turns them back."""

from collections.abc import Iterator

import pytest
import torch
from contracting import draw
from instructions import THREADS, capped, threads
from measures import relative_error
from tolerances import OP_FLOAT32
from torch import Tensor

from clipfast.kernels import native, native_linear, ops, reference
from clipfast.kernels.reference import Activation

pytestmark = pytest.mark.skipif(bool(native.refusals()), reason="; ".join(native.refusals()))
DEPTH, COLUMNS = 1040, 2050  # above native_linear.LARGE, and no multiples of a vector
EITHER_ACTIVATION = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", None])


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with capped(request.param) as used:
        if not used:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    with threads(2):
        yield


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of the library as they are called."""
    names: list[str] = []
    call = native.call
    monkeypatch.setattr(native, "call", lambda name, *arguments: (names.append(name), call(name, *arguments))[1])
    return names


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return draw(1, COLUMNS, DEPTH) * DEPTH**-0.5


@EITHER_ACTIVATION
@pytest.mark.parametrize("dtype", native_linear.FORMATS, ids=str)
def test_a_turned_product_gives_the_same_bits(isa: str, activation: Activation | None, dtype: torch.dtype) -> None:
    for rows, columns in [(1, 1), (3, 7), (4, 16), (31, 65), (32, 64), (33, 129), (70, 200), (257, 20)]:
        product, bias = draw(rows, rows, columns), draw(2, columns)
        turned = draw(3, columns + 2, rows + 5)[1:-1, 2:-3].copy_(product.T).T  # with others' numbers around
        assert turned.stride() == (1, rows + 5)
        for shift in (bias, None):
            want, have = torch.full((2, rows, columns + 3), torch.nan, dtype=dtype)
            native_linear.activate(product, shift, activation, want[:, :columns])
            native_linear.activate(turned, shift, activation, have[:, :columns])
            assert torch.equal(have[:, :columns], want[:, :columns])
            assert have[:, columns:].isnan().all()


@pytest.mark.parametrize("rows", [32, 50, 400, 512])
def test_the_product_is_that_of_the_definition(rows: int, weight: Tensor, called: list[str]) -> None:
    x, bias = draw(4, 2, rows // 2, DEPTH), draw(5, COLUMNS)
    for shift in (bias, None):
        have = ops.linear(x, weight, shift, backend="native")
        want = reference.linear(x.double(), weight.double(), None if shift is None else shift.double())
        assert have.is_contiguous()
        assert relative_error(have, want) <= OP_FLOAT32
    have = ops.linear_activation(x, weight, bias, "gelu", backend="native")
    want = reference.linear_activation(x.double(), weight.double(), bias.double(), "gelu")
    assert have.is_contiguous()
    assert relative_error(have, want) <= OP_FLOAT32
    assert called == ["activation_turned"] * 3 or not torch.backends.mkl.is_available()


def test_with_gradients_a_layer_is_torchs_own(weight: Tensor, called: list[str]) -> None:
    x = draw(4, 50, DEPTH).requires_grad_()
    with torch.enable_grad():
        ops.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert not called


def test_strides_are_nobodys_business(weight: Tensor) -> None:
    x, bias = draw(6, 40, DEPTH), draw(7, COLUMNS)
    want = reference.linear(x.double(), weight.double(), bias.double())
    apart = torch.stack([bias, bias], 1)[:, 0]
    for rows in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :DEPTH]):
        for columns in (weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :DEPTH]):
            assert relative_error(ops.linear(rows, columns, apart, backend="native"), want) <= OP_FLOAT32


def test_which_products_are_turned(weight: Tensor) -> None:
    few, most = native_linear.FEW
    assert not native_linear.divides_weight(draw(8, few - 1, DEPTH), weight)
    assert native_linear.divides_weight(draw(8, most, DEPTH), weight) == torch.backends.mkl.is_available()
    assert not native_linear.divides_weight(draw(8, most + 1, DEPTH), weight)
    assert not native_linear.divides_weight(draw(8, most, DEPTH), weight[: native_linear.LARGE // DEPTH])
    assert not native_linear.divides_weight(draw(8, most, DEPTH).double(), weight.double())


@pytest.mark.parametrize("rows", [50, 197, 400])
def test_results_do_not_depend_on_the_number_of_threads(rows: int, weight: Tensor) -> None:
    x, bias = draw(9, rows, DEPTH), draw(10, COLUMNS)
    found = []
    for count in (1, 2, 3, *THREADS[3:]):
        with threads(count):
            plain = [ops.linear(x, weight, shift, backend="native") for shift in (bias, None)]
            found.append([*plain, ops.linear_activation(x, weight, bias, "quick_gelu", backend="native")])
    assert all(torch.equal(*pair) for each in found[1:] for pair in zip(found[0], each, strict=True))
