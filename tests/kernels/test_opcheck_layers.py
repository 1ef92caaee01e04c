"""``linear_activation`` and ``add_layer_norm`` as custom ops: schema, fake tensors, compilation."""

import pytest
import torch
from contracting import DEVICES, draw
from torch import Tensor

from clipfast.kernels import library
from clipfast.kernels.dispatch import BACKENDS

assert library.OPERATIONS  # registers them


@pytest.fixture(params=[backend.name for backend in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    refused = next(backend for backend in BACKENDS if backend.name == name).refusals()
    if refused:
        pytest.skip(f"{name}: {', '.join(refused)}")
    return name


def on(backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(DEVICES.get(backend, "cpu")) for tensor in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_activation(backend: str, dtype: torch.dtype) -> None:
    x, weight, bias = on(backend, *(draw(seed, *shape) for seed, shape in enumerate([(2, 3, 16), (24, 16), (24,)])))
    arguments = (x.to(dtype), weight.to(dtype), bias.to(dtype), "gelu", backend)
    torch.library.opcheck(torch.ops.clipfast.linear_activation.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_delta", [True, False])
def test_add_layer_norm(backend: str, with_delta: bool, dtype: torch.dtype) -> None:
    x, delta, weight, bias = on(
        backend, draw(0, 2, 3, 24, dtype=dtype), draw(1, 2, 3, 24, dtype=dtype), *draw(2, 2, 24)
    )
    arguments = (x, delta if with_delta else None, weight, bias, 1e-5, backend)
    torch.library.opcheck(torch.ops.clipfast.add_layer_norm.default, arguments)
