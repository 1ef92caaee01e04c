"""Transposed products, for which threads divide the weight, and the pass that transposes them back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contracting import draw
from instructions import THREADS, capped, threads
from measures import relative_error
from tolerances import OP_FLOAT32
from torch import Tensor

from clipfast.kernels import native, ops, reference
from clipfast.kernels.linear import native as native_linear
from clipfast.kernels.reference import Activation

pytestmark = pytest.mark.skipif(bool(native.unsupported_reasons()), reason="; ".join(native.unsupported_reasons()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEPTH, COLUMNS = 1040, 2050  # above native_linear.MIN_WEIGHT_NUMEL, and not multiples of a vector's length
EVERY_ACTIVATION = pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", None])


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


@pytest.fixture(autouse=True)
def rows_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is MKL, the CPU counts as one on which it divides rows: transposed products run on every CPU."""
    monkeypatch.setattr(native_linear, "_mkl_divides_rows", torch.backends.mkl.is_available)


@pytest.fixture
def transposed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every pass that follows a product: whether it transposes."""
    calls: list[bool] = []
    activate = native_linear.activate

    def recorded(x: Tensor, *others: Any) -> None:
        calls.append(not x.is_contiguous())
        activate(x, *others)

    monkeypatch.setattr(native_linear, "activate", recorded)
    return calls


@pytest.fixture(scope="module")
def weight() -> Tensor:
    return draw(1, COLUMNS, DEPTH) * DEPTH**-0.5


@EVERY_ACTIVATION
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_product_gives_the_same_bits(isa: str, activation: Activation | None, dtype: torch.dtype) -> None:
    for rows, columns in [(1, 1), (3, 7), (4, 16), (31, 65), (32, 64), (33, 129), (70, 200), (257, 20)]:
        product, bias = draw(rows, rows, columns), draw(2, columns)
        transposed = draw(3, columns + 2, rows + 5)[1:-1, 2:-3].copy_(product.T).T  # with other values around
        assert transposed.stride() == (1, rows + 5)
        for shift in (bias, None):
            expected, have = torch.full((2, rows, columns + 3), torch.nan, dtype=dtype)
            native_linear.activate(product, shift, activation, expected[:, :columns])
            native_linear.activate(transposed, shift, activation, have[:, :columns])
            assert torch.equal(have[:, :columns], expected[:, :columns])
            assert have[:, columns:].isnan().all()


@pytest.mark.parametrize("rows", [32, 50, 400, 512])
def test_transposed_product_agrees_with_the_definition(rows: int, weight: Tensor, transposed: list[bool]) -> None:
    x, bias = draw(4, 2, rows // 2, DEPTH), draw(5, COLUMNS)
    for shift in (bias, None):
        have = ops.linear(x, weight, shift, backend="native")
        expected = reference.linear(x.double(), weight.double(), None if shift is None else shift.double())
        assert have.is_contiguous()
        assert relative_error(have, expected) <= OP_FLOAT32
    have = ops.linear_activation(x, weight, bias, "gelu", backend="native")
    expected = reference.linear_activation(x.double(), weight.double(), bias.double(), "gelu")
    assert have.is_contiguous()
    assert relative_error(have, expected) <= OP_FLOAT32
    assert transposed == [True] * 3 or not torch.backends.mkl.is_available()


def test_with_gradients_torch_computes_the_layer(weight: Tensor, transposed: list[bool]) -> None:
    x = draw(4, 50, DEPTH).requires_grad_()
    with torch.enable_grad():
        ops.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert not transposed


def test_any_strides(weight: Tensor) -> None:
    x, bias = draw(6, 40, DEPTH), draw(7, COLUMNS)
    expected = reference.linear(x.double(), weight.double(), bias.double())
    apart = torch.stack([bias, bias], 1)[:, 0]
    for rows in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :DEPTH]):
        for columns in (weight.T.contiguous().T, torch.cat([weight, weight], 1)[:, :DEPTH]):
            assert relative_error(ops.linear(rows, columns, apart, backend="native"), expected) <= OP_FLOAT32


def test_which_products_are_transposed(weight: Tensor) -> None:
    fewest, most = native_linear.ROW_RANGE
    assert not native_linear.divides_weight(draw(8, fewest - 1, DEPTH), weight)
    assert native_linear.divides_weight(draw(8, most, DEPTH), weight) == torch.backends.mkl.is_available()
    assert not native_linear.divides_weight(draw(8, most + 1, DEPTH), weight)
    assert not native_linear.divides_weight(draw(8, most, DEPTH), weight[: native_linear.MIN_WEIGHT_NUMEL // DEPTH])
    assert not native_linear.divides_weight(draw(8, most, DEPTH).double(), weight.double())


@pytest.mark.parametrize(("vendor", "transposes"), [("GenuineIntel", False), ("AuthenticAMD", True)])
def test_products_are_transposed_where_mkl_divides_rows(
    vendor: str, transposes: bool, weight: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where it divides the weight itself, a transposed product takes longer."""
    monkeypatch.undo()
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(native_linear, "CPUINFO", path)
    native_linear._mkl_divides_rows.cache_clear()
    try:
        transposed = native_linear.divides_weight(draw(8, 50, DEPTH), weight)
    finally:
        native_linear._mkl_divides_rows.cache_clear()
    assert transposed == (transposes and torch.backends.mkl.is_available())


@pytest.mark.parametrize("rows", [50, 197, 400])
def test_results_do_not_depend_on_the_number_of_threads(rows: int, weight: Tensor) -> None:
    x, bias = draw(9, rows, DEPTH), draw(10, COLUMNS)
    results, products = [], []
    for count in (1, 2, 3, *THREADS[3:]):
        with threads(count):
            products.append(x @ weight.T)
            plain = [ops.linear(x, weight, shift, backend="native") for shift in (bias, None)]
            results.append([*plain, ops.linear_activation(x, weight, bias, "quick_gelu", backend="native")])
    if not all(torch.equal(products[0], other) for other in products):
        pytest.skip("the sums of torch's own product depend on the number of threads on this CPU")
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
