"""Who computes ``linear``: what ``backend=`` says, gradients enabled or not, compiled or not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contracting import draw
from torch import Tensor

from clipfast.kernels import dispatch, ops
from clipfast.kernels.linear import BACKENDS_WITH_LINEAR
from clipfast.kernels.linear import native as native_linear

NATIVE = next(backend for backend in dispatch.BACKENDS if backend.name == "native")
NEEDS_NATIVE = pytest.mark.skipif(bool(NATIVE.unsupported_reasons()), reason=", ".join(NATIVE.unsupported_reasons()))
EITHER_MODE = pytest.mark.parametrize("grad_enabled", [False, True], ids=["no-grad", "grad"])


def arguments(rows: int = 40, inner: int = 1040, columns: int = 2050) -> tuple[Tensor, Tensor, Tensor]:
    """Of a size at which threads divide the weight, unless it is given."""
    return draw(0, 1, rows, inner), draw(1, columns, inner), draw(2, columns)


def chosen(inputs: tuple[Tensor, ...], backend: str = "auto") -> dispatch.Choice:
    return dispatch.choose("linear", inputs, backend)


@pytest.fixture
def mkl_divides_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on AMD's CPUs."""
    dispatch.forget()
    with monkeypatch.context() as changed:
        changed.setattr(native_linear, "_mkl_divides_rows", lambda: True)
        yield
    dispatch.forget()


@EITHER_MODE
@NEEDS_NATIVE
@pytest.mark.parametrize("rows", [1, 40])
def test_a_named_backend_computes_it(grad_enabled: bool, rows: int) -> None:
    with torch.set_grad_enabled(grad_enabled):
        for backend in ("native", "eager"):
            assert chosen(arguments(rows), backend).backend == backend


@NEEDS_NATIVE
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch has no MKL")
def test_auto_takes_the_library_where_it_is_faster(mkl_divides_rows: None) -> None:
    with torch.no_grad():
        assert chosen(arguments()).backend == "native"
        small = chosen(arguments(rows=1))
        assert small.backend == "eager"
        assert small.skipped["native"] == ["torch's own product is as fast for these shapes"]
        assert chosen(tuple(tensor.bfloat16() for tensor in arguments(rows=1))).backend == "native"
    with torch.enable_grad():
        watched = chosen(arguments())
        assert watched.backend == "eager"
        assert watched.skipped["native"] == ["gradients are enabled, and only torch's own product has them"]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("rows", [1, 40])
def test_gradients_are_those_of_torch(backend: str, rows: int) -> None:
    gradients = []
    for function in (F.linear, lambda *inputs: ops.linear(*inputs, backend=backend)):
        inputs = [tensor.requires_grad_() for tensor in arguments(rows)]
        function(*inputs).square().sum().backward()
        gradients.append([tensor.grad for tensor in inputs])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@NEEDS_NATIVE
@pytest.mark.parametrize("rows", [1, 40])
def test_the_library_refuses_gradients_instead_of_leaving_them_to_torch(rows: int) -> None:
    inputs = [tensor.requires_grad_() for tensor in arguments(rows)]
    result = ops.linear(*inputs, backend="native")
    with pytest.raises(RuntimeError, match="autograd"):
        result.sum().backward()


@EITHER_MODE
@pytest.mark.parametrize(
    ("backend", "dtype", "traced"),
    [
        ("auto", torch.float32, True),
        ("eager", torch.float32, True),
        ("eager", torch.bfloat16, True),
        ("auto", torch.bfloat16, False),
        pytest.param("native", torch.float32, False, marks=NEEDS_NATIVE),
    ],
)
def test_a_compiler_sees_through_torchs_own_product(
    grad_enabled: bool, backend: str, dtype: torch.dtype, traced: bool
) -> None:
    """What is not traced is one custom op in the graph."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    x, weight, bias = (tensor.to(dtype) for tensor in arguments(3, 16, 24))
    compiled = torch.compile(lambda *inputs: ops.linear(*inputs, backend=backend), fullgraph=True, backend=keep)
    with torch.set_grad_enabled(grad_enabled):
        result = compiled(x, weight, bias)
        expected = ops.linear(x, weight, bias, backend=backend)
    assert torch.equal(result, expected)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("clipfast" in target for target in called) != traced


def test_backends_with_linear_are_known_to_compiled_calls() -> None:
    others = [backend for backend in dispatch.BACKENDS if backend is not dispatch.EAGER]
    having = {backend.name for backend in others if backend.implementation("linear") is not None}
    assert having == {*BACKENDS_WITH_LINEAR}


def test_a_backend_that_has_no_linear_leaves_it_to_torch() -> None:
    cuda = next(backend for backend in dispatch.BACKENDS if backend.name == "cuda")
    triton = next(backend for backend in dispatch.BACKENDS if backend.name == "triton")
    assert cuda.implementation("linear") is None
    if triton.unsupported_reasons():
        pytest.skip(", ".join(triton.unsupported_reasons()))
    assert chosen(arguments(), "triton").backend == "eager"
