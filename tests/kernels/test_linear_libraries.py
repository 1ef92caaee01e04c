"""Float32 products of other libraries than torch's: the contract, the bits, and who is chosen when."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from contract_layers import EVERY_ACTIVATION, LayersContract
from contract_linear import LinearContract
from contracting import draw
from instructions import THREADS, capped, threads
from measures import relative_error
from tolerances import OP_FLOAT32
from torch import Tensor

from clipfast.kernels import dispatch, native, ops, reference, tuning
from clipfast.kernels.dispatch import BackendUnavailable
from clipfast.kernels.linear import libraries, onednn, openblas
from clipfast.kernels.linear import native as native_linear
from clipfast.kernels.reference import Activation

pytestmark = pytest.mark.skipif(bool(native.unsupported_reasons()), reason="; ".join(native.unsupported_reasons()))
MODULES = {"onednn": onednn, "openblas": openblas}
NEEDS_OPENBLAS = pytest.mark.skipif(
    bool(openblas.unsupported_reasons()), reason="; ".join(openblas.unsupported_reasons())
)


@pytest.fixture(autouse=True)
def chosen_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing chosen before, a folder of choices of its own, and no product too small."""
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(libraries, "LEAST_MULTIPLICATIONS", 1)
    monkeypatch.setattr(libraries, "LEAST_ROWS", 1)
    libraries.forget()
    dispatch.implementation.cache_clear()
    yield
    monkeypatch.undo()
    libraries.forget()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets ``CLIPFAST_PRODUCTS``; skips the test where that library cannot be used."""

    def setting(name: str) -> None:
        reasons = MODULES[name].unsupported_reasons() if name in MODULES else []
        if reasons:
            pytest.skip(", ".join(reasons))
        monkeypatch.setenv(libraries.VARIABLE, name)
        libraries.forget()

    return setting


@pytest.fixture(params=MODULES)
def library(request: pytest.FixtureRequest, use: Callable[[str], None]) -> str:
    use(request.param)
    return str(request.param)


class LibraryContract(LinearContract, LayersContract):
    """Not collected; a class per library inherits it."""

    backend = "native"
    not_in_float64: ClassVar[frozenset[str]] = frozenset({"add_layer_norm", "linear_activation"})
    name: str

    @pytest.fixture(autouse=True)
    def _used(self, use: Callable[[str], None]) -> None:
        use(self.name)

    def test_the_library_computes_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*arguments: object) -> Tensor:
            raise AssertionError("torch's product was called")

        monkeypatch.setattr(native_linear, "_torch_product", fails)
        x, weight, bias = self.draw_layer(4, 33, 65, torch.float32)
        self.linear(x, weight, bias)
        self.linear_activation(x, weight, bias, "gelu")


class TestOneDnn(LibraryContract):
    name = "onednn"

    def float32_bound(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
        """Its kernels for AVX2 add one product after the other: with 600 they may err a little more than other sums."""
        total = x.new_zeros(*x.shape[:-1], len(weight))
        for column in range(x.shape[-1]):
            total.addcmul_(x[..., column, None], weight[:, column])
        if bias is not None:
            total += bias
        return max(OP_FLOAT32, relative_error(total, self.expected(x, weight, bias)))


class TestOpenBlas(LibraryContract):
    name = "openblas"


LAYERS = [(1, 5, 3), (50, 768, 768), (400, 192, 2304), (1100, 100, 730), (2056, 40, 1500)]
"""Rows, depth and columns. The last three are cut into several parts, the last two of uneven size."""


@pytest.mark.parametrize(("rows", "depth", "columns"), LAYERS)
def test_results_do_not_depend_on_the_number_of_threads(library: str, rows: int, depth: int, columns: int) -> None:
    x, weight, bias = draw(1, rows, depth), draw(2, columns, depth) * depth**-0.5, draw(3, columns)
    results = []
    for count in (1, 2, 3, 7, *THREADS[3:]):
        with threads(count), torch.no_grad():
            plain = [ops.linear(x, weight, shift, backend="native") for shift in (bias, None)]
            results.append([*plain, ops.linear_activation(x, weight, bias, "quick_gelu", backend="native")])
    expected = reference.linear(x.double(), weight.double(), bias.double())
    assert relative_error(results[0][0], expected) <= OP_FLOAT32
    assert relative_error(results[0][1], expected - bias) <= OP_FLOAT32
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


@EVERY_ACTIVATION
def test_a_part_is_activated_like_the_whole(library: str, activation: Activation) -> None:
    """Bias and activation while a part is in the cache give the bits that a pass over the product gives."""
    x, weight, bias = draw(1, 2, 550, 60), draw(2, 1500, 60), draw(3, 1500)
    have = ops.linear_activation(x, weight, bias, activation, backend="native")
    expected = MODULES[library].product(x, weight, None, None)
    native_linear.activate(expected.view(1100, 1500), bias, activation, expected.view(1100, 1500))
    assert torch.equal(have, expected)


def test_instructions_of_the_activation_may_be_capped(library: str) -> None:
    x, weight, bias = draw(1, 70, 60), draw(2, 75, 60) / 8, draw(3, 75)
    expected = reference.linear_activation(x.double(), weight.double(), bias.double(), "gelu")
    for isa in native.ISAS:
        with capped(isa):
            have = ops.linear_activation(x, weight, bias, "gelu", backend="native")
        assert relative_error(have, expected) <= OP_FLOAT32


# ------------------------------------------------------------------------------------------------ csrc/product.cpp


@NEEDS_OPENBLAS
def test_product_writes_its_result_and_nothing_else() -> None:
    whole = torch.full((1103, 1510), torch.nan)
    rows, columns = draw(1, 1102, 77)[1:, 3:63], draw(2, 1500, 70)[:, 7:67]
    bias = draw(3, 1500)
    native.library().product(rows, columns, bias, None, whole[1:-1, 5:-5], 500, 300)
    assert relative_error(whole[1:-1, 5:-5], reference.linear(rows.double(), columns.double(), bias.double())) <= 1e-6
    whole[1:-1, 5:-5] = torch.nan
    assert whole.isnan().all()


@NEEDS_OPENBLAS
@pytest.mark.parametrize("parts", [(1, 1), (17, 1000), (1000, 17), openblas.PARTS, openblas.SMALL_PARTS])
def test_parts_of_every_size_make_the_whole(parts: tuple[int, int]) -> None:
    for rows, columns in [(1, 1), (1, 70), (33, 1), (15, 16), (97, 130), (1100, 1030)]:
        x, weight, bias = draw(1, rows, 40), draw(2, columns, 40) / 6, draw(3, columns)
        have = openblas.product(x, weight, bias, "quick_gelu", parts)
        expected = reference.linear_activation(x.double(), weight.double(), bias.double(), "quick_gelu")
        assert relative_error(have, expected) <= OP_FLOAT32


@NEEDS_OPENBLAS
def test_product_of_one_row_with_any_stride() -> None:
    x, weight, out = draw(1, 1, 6), draw(2, 5, 6), torch.empty(1, 5)
    native.library().product(x.as_strided((1, 6), (1, 1)), weight, None, None, out.as_strided((1, 5), (2, 1)), 9, 9)
    assert relative_error(out, reference.linear(x.double(), weight.double())) <= OP_FLOAT32


@NEEDS_OPENBLAS
def test_product_rejects_what_blas_would_read_wrongly() -> None:
    x, weight, out = draw(1, 4, 6), draw(2, 5, 6), torch.empty(4, 5)
    product = native.library().product
    wrong = [
        ((x.double(), weight, None, None, out), "x"),
        ((x, weight[:, :5], None, None, out), "weight"),
        ((x, weight.T.contiguous().T, None, None, out), "weight"),
        ((x, weight, weight[:4, 0], None, out), "bias"),
        ((x, weight, None, None, out.T.contiguous()), "out"),
        ((x.as_strided((4, 6), (3, 1)), weight, None, None, out), "x has rows that overlap"),
        ((x, weight, None, None, out.as_strided((4, 5), (0, 1))), "out has rows that overlap"),
        ((x[:, :0], weight[:, :0], None, None, out), "x has no columns"),
        ((x, weight, None, "relu", out), "no activation 'relu'"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            product(*arguments, 9, 9)  # type: ignore[arg-type]
    for parts in ((0, 9), (9, -1)):
        with pytest.raises(ValueError, match="a part has no rows or no columns"):
            product(x, weight, None, None, out, *parts)


@NEEDS_OPENBLAS
def test_openblas_gets_its_threads_back() -> None:
    blas = openblas.load().library
    assert blas is not None
    get, put = blas.handle.scipy_openblas_get_num_threads, blas.handle.scipy_openblas_set_num_threads
    before = get()
    put(2)
    try:
        openblas.product(draw(1, 50, 60), draw(2, 70, 60), None, None)
        assert get() == 2
        with pytest.raises(ValueError, match="activation"):
            openblas.product(draw(1, 50, 60), draw(2, 70, 60), None, "relu")  # type: ignore[arg-type]
        assert get() == 2
    finally:
        put(before)


# ------------------------------------------------------------------------------------------------------ the choice


def test_without_openblas_the_bits_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(libraries.VARIABLE)
    monkeypatch.setattr(openblas, "PACKAGE", "no_such_package_of_openblas")
    openblas.load.cache_clear()
    try:
        assert libraries.setting() == "torch"
        assert "no_such_package_of_openblas is not installed (pip install clipfast[openblas])" in openblas.load().reason
        x, weight, bias = draw(1, 600, 768), draw(2, 768, 768), draw(3, 768)
        with torch.no_grad():
            assert dispatch.choose("linear", (x, weight, bias)).backend == "eager"
            assert torch.equal(ops.linear(x, weight, bias, backend="native"), F.linear(x, weight, bias))
    finally:
        openblas.load.cache_clear()


@NEEDS_OPENBLAS
def test_with_openblas_the_fastest_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(libraries.VARIABLE)
    assert libraries.setting() == "tuned"
    with torch.no_grad():
        assert dispatch.choose("linear", (draw(1, 60, 96), draw(2, 96, 96), None)).backend == "native"


def test_what_is_no_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("mkl", "Torch"):
        monkeypatch.setenv(libraries.VARIABLE, setting)
        libraries.forget()
        with pytest.raises(BackendUnavailable, match="choose one of torch, tuned, onednn, openblas"):
            ops.linear_activation(draw(1, 3, 4), draw(2, 5, 4), draw(3, 5), "gelu", backend="native")


def test_a_library_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(libraries.VARIABLE, "openblas")
    monkeypatch.setattr(openblas, "PACKAGE", "no_such_package_of_openblas")
    openblas.load.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match="no_such_package_of_openblas is not installed"):
            ops.linear_activation(draw(1, 3, 4), draw(2, 5, 4), draw(3, 5), "gelu", backend="native")
    finally:
        openblas.load.cache_clear()


def test_small_products_and_other_dtypes_are_torchs(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = draw(1, 64, 64), draw(2, 64, 64)
    monkeypatch.setattr(libraries, "LEAST_ROWS", 64)
    assert libraries.considered(x, weight)
    assert not libraries.considered(x[1:], weight)
    monkeypatch.setattr(libraries, "LEAST_ROWS", 1)
    monkeypatch.setattr(libraries, "LEAST_MULTIPLICATIONS", 64**3)
    assert libraries.considered(x, weight)
    assert not libraries.considered(x[1:], weight)
    assert not libraries.considered(x.double(), weight.double())
    assert not libraries.considered(x.bfloat16(), weight.bfloat16())
    assert not libraries.considered(x, weight.T)


def test_gradients_are_torchs(library: str) -> None:
    x, weight = draw(1, 64, 64).requires_grad_(), draw(2, 64, 64)
    with torch.enable_grad():
        ops.linear(x, weight).sum().backward()
    assert x.grad is not None


class Calls:
    """Products that count how often they were called; each takes as long as it is told."""

    def __init__(self, **seconds: float) -> None:
        self.count = dict.fromkeys(seconds, 0)
        self.products = {name: self.product(name, each) for name, each in seconds.items()}

    def product(self, name: str, seconds: float) -> libraries.Product:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
            self.count[name] += 1
            time.sleep(seconds)
            return F.linear(x, weight, bias)

        return run


ARGUMENTS = (draw(1, 60, 96), draw(2, 80, 96), draw(3, 80), None)


@pytest.fixture
def tuned(use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> Calls:
    """``tuned``, with a library that takes a tenth of torch's time."""
    use("tuned")
    calls = Calls(torch=2e-3, quick=2e-4)
    monkeypatch.setattr(libraries, "others", lambda: {"quick": calls.products["quick"]})
    return calls


def chosen(calls: Calls, *arguments: Tensor | None) -> str:
    x, weight, bias, _ = arguments or ARGUMENTS
    assert x is not None
    assert weight is not None
    product = libraries.choose(x, weight, bias, None, calls.products["torch"])
    return next(name for name, known in calls.products.items() if known is product)


def test_the_fastest_is_remembered(tuned: Calls, tmp_path: Path) -> None:
    assert chosen(tuned) == "quick"
    timed = dict(tuned.count)
    assert timed["quick"] >= 1 + libraries.LEAST_ROUNDS
    assert chosen(tuned) == "quick"
    libraries.forget()
    tuning._choices.cache_clear()  # as in another process
    assert chosen(tuned) == "quick"
    assert tuned.count == timed
    (file,) = tmp_path.glob("*.json")
    (entry,) = json.loads(file.read_text()).values()
    assert entry["chosen"] == ["native", "quick"]
    assert entry["milliseconds"]["native/quick"] < entry["milliseconds"]["native/torch"]


def test_another_number_of_threads_is_another_question(tuned: Calls) -> None:
    asked = []
    for count in (1, 2, 1):
        with threads(count):
            before = tuned.count["quick"]
            chosen(tuned)
            asked.append(tuned.count["quick"] > before)
    assert asked == [True, True, False]


def test_a_smaller_batch_is_not_another_question(tuned: Calls) -> None:
    x, weight, bias, _ = ARGUMENTS
    chosen(tuned)
    before = tuned.count["quick"]
    chosen(tuned, x[:33], weight, bias, None)
    assert tuned.count["quick"] == before
    chosen(tuned, x[:32], weight, bias, None)
    chosen(tuned, x, weight, None, None)
    assert tuned.count["quick"] == before + 2 * (1 + libraries.ROUNDS)


def test_without_timing_torch_computes_what_is_not_known(tuned: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_TUNE", "0")
    assert chosen(tuned) == "torch"
    assert tuned.count["quick"] == 0
    monkeypatch.setenv("CLIPFAST_TUNE", "1")
    assert chosen(tuned) == "quick"
    libraries.forget()
    monkeypatch.setenv("CLIPFAST_TUNE", "0")
    assert chosen(tuned) == "quick"


def test_a_small_gain_is_none() -> None:
    assert libraries.fastest({"torch": 1.0, "onednn": 0.95, "openblas": 0.93}) == "torch"
    assert libraries.fastest({"torch": 1.0, "onednn": 0.95, "openblas": 0.9}) == "openblas"
    assert libraries.fastest({"torch": 1.0}) == "torch"


def test_a_library_that_fails_or_disagrees_is_not_timed(caplog: pytest.LogCaptureFixture) -> None:
    def fails(*arguments: object) -> Tensor:
        raise RuntimeError("no memory")

    def wrong(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        return F.linear(x, weight)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation | None) -> Tensor:
        return F.linear(x, weight, bias)

    x, weight, bias, _ = ARGUMENTS
    products = {"torch": plain, "fails": fails, "wrong": wrong, "right": plain}
    assert list(libraries.time_each(products, x, weight, bias, None)) == ["torch", "right"]
    assert "a product of wrong differs from torch's by" in caplog.text
