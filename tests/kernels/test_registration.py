"""Every operation is a good citizen of ``torch.library``: schema, fake, layout, under every backend."""

from typing import Any

import pytest
import torch
from contracting import DEVICES
from opchecking import backends, opcheck
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from clipfast.kernels import dispatch, examples
from clipfast.kernels.registration import operations

CALLS = [pytest.param(name, backend, id=f"{name}-{backend}") for name in operations() for backend in backends(name)]
ON = {backend.name: "cpu" for backend in dispatch.BACKENDS} | DEVICES


def copies(arguments: list[Any]) -> list[Any]:
    return [argument.clone() if isinstance(argument, torch.Tensor) else argument for argument in arguments]


@pytest.mark.parametrize(("name", "backend"), CALLS)
@pytest.mark.slow
def test_schema_fake_and_layout(name: str, backend: str) -> None:
    opcheck(name, examples.arguments(name), backend)


@pytest.mark.parametrize(("name", "backend"), CALLS)
@pytest.mark.slow
def test_results_are_contiguous(name: str, backend: str) -> None:
    results = operations()[name].op(*examples.arguments(name, ON[backend]), backend)
    for result in results if isinstance(results, tuple) else (results,):
        assert result is None or result.is_contiguous()


@pytest.mark.parametrize(("name", "backend"), CALLS)
@pytest.mark.slow
def test_only_what_the_schema_says_is_changed(name: str, backend: str) -> None:
    arguments = examples.arguments(name, ON[backend])
    before = copies(arguments)
    operations()[name].op(*arguments, backend)
    for place, (have, was) in enumerate(zip(arguments, before, strict=True)):
        if isinstance(have, torch.Tensor):
            assert torch.equal(have, was) == (place not in operations()[name].mutated)


@pytest.mark.parametrize(("name", "backend"), [p for p in CALLS if not operations()[p.values[0]].mutated])
@pytest.mark.slow
def test_a_compiled_call_gives_the_same(name: str, backend: str) -> None:
    torch._dynamo.reset()
    arguments = examples.arguments(name, ON[backend])
    op = operations()[name].op
    compiled = torch.compile(lambda *given: op(*given, backend), fullgraph=True, backend="aot_eager")
    have, expected = compiled(*arguments), op(*arguments, backend)
    for one, other in zip(*(r if isinstance(r, tuple) else (r,) for r in (have, expected)), strict=True):
        assert torch.equal(one, other)


class Seen(TorchDispatchMode):
    """Notes the names of what runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_called_directly_and_as_an_op_alike(name: str, backend: str) -> None:
    direct = examples.arguments(name, ON[backend])
    observed = copies(direct)
    have = operations()[name](*direct, backend)
    with Seen() as seen:
        expected = operations()[name](*observed, backend)
    assert f"clipfast::{name}" in seen.names
    for one, other in zip(pytree.tree_leaves([have, direct]), pytree.tree_leaves([expected, observed]), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(("name", "backend"), CALLS)
def test_gradients_are_refused_not_wrong(name: str, backend: str) -> None:
    arguments = examples.arguments(name, ON[backend])
    first = next(
        i
        for i, a in enumerate(arguments)
        if isinstance(a, torch.Tensor) and a.is_floating_point() and i not in operations()[name].mutated
    )
    arguments[first].requires_grad_()
    changed = [arguments[place] for place in operations()[name].mutated]
    result = [t for t in pytree.tree_leaves(operations()[name](*arguments, backend)) if t is not None] + changed
    reached = [tensor for tensor in result if tensor.requires_grad]
    assert reached or operations()[name].mutated
    for tensor in reached:
        with pytest.raises(RuntimeError, match="autograd"):
            tensor.sum().backward()
