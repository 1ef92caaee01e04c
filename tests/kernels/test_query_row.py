"""One query's attention: numbers anyone can verify, and arguments that do not fit."""

from collections.abc import Callable
from math import log, sqrt
from types import ModuleType

import pytest
import torch
from contracting import DEVICES
from measures import error
from tolerances import OP_FLOAT32

from clipfast.kernels import dispatch, ops, reference

B, N, H, E = 2, 5, 3, 4
SHAPES = {"query": (B, H, E), "key": (B, N, H, E), "value": (B, N, H, E)}
BACKENDS = [backend.name for backend in dispatch.BACKENDS if not backend.unsupported_reasons()]


def call(**shapes: tuple[int, ...]) -> object:
    return ops.query_row(**{name: torch.ones(shape) for name, shape in {**SHAPES, **shapes}.items()})


@pytest.mark.parametrize("module", [reference, *BACKENDS], ids=["definition", *BACKENDS])
def test_two_tokens(module: ModuleType | str) -> None:
    """head_dim 4: q = (ln 3, 0, 0, 0), keys 2 and 0 there: logits ln 3 and 0 after the division by √4: (3/4, 1/4).

    Values (4, 0, 0, 1) and (8, 4, 0, 1) mix to (5, 1, 0, 1).
    """
    device = DEVICES.get(module, "cpu") if isinstance(module, str) else "cpu"
    query = torch.tensor([[[log(3), 0, 0, 0]]], device=device)
    key = torch.tensor([[[[2.0, 5, 5, 5]], [[0, 7, 7, 7]]]], device=device)
    value = torch.tensor([[[[4.0, 0, 0, 1]], [[8, 4, 0, 1]]]], device=device)
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]] = reference.query_row
    z, alpha = ops.query_row(query, key, value, backend=module) if isinstance(module, str) else run(query, key, value)
    assert error(alpha.cpu(), torch.tensor([[[3 / 4, 1 / 4]]])) <= OP_FLOAT32
    assert error(z.cpu(), torch.tensor([[[5.0, 1, 0, 1]]])) <= 5 * OP_FLOAT32


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_weigh_equally(backend: str) -> None:
    device = DEVICES.get(backend, "cpu")
    key = torch.full((1, 7, 2, 64), sqrt(2.0), device=device)
    value = torch.arange(7.0, device=device)[None, :, None, None].expand(1, 7, 2, 64)
    z, alpha = ops.query_row(torch.ones(1, 2, 64, device=device), key, value, backend=backend)
    assert error(alpha.cpu(), torch.full((1, 2, 7), 1 / 7)) <= OP_FLOAT32
    assert error(z.cpu(), torch.full((1, 2, 64), 3.0)) <= 3 * OP_FLOAT32


def test_arguments_that_fit_are_taken() -> None:
    call()


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_axis_names_the_argument(name: str) -> None:
    shape = SHAPES[name][1:]
    with pytest.raises(ValueError, match=rf"^{name} has shape \[{', '.join(map(str, shape))}\], expected \["):
        call(**{name: shape})


@pytest.mark.parametrize("axis", [0, 2, 3])
@pytest.mark.parametrize("name", ["key", "value"])
def test_a_size_that_does_not_fit_names_the_argument(name: str, axis: int) -> None:
    shape = [size + (place == axis) for place, size in enumerate(SHAPES[name])]
    with pytest.raises(ValueError, match=rf"^{name} has shape "):
        call(**{name: tuple(shape)})


def test_as_many_values_as_keys() -> None:
    with pytest.raises(ValueError, match=r"^value has shape \[2, 6, 3, 4\], expected \[2, 5, 3, 4\]"):
        call(value=(B, N + 1, H, E))


def test_nothing_to_attend_to() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        call(key=(B, 0, H, E), value=(B, 0, H, E))


def test_an_unknown_backend() -> None:
    with pytest.raises(dispatch.BackendUnavailable, match="unknown backend 'other'"):
        ops.query_row(*(torch.ones(shape) for shape in SHAPES.values()), backend="other")
