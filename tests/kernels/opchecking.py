"""Operations as ``torch.library`` ops under every backend that has them: schema, fake tensors, compilation."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from contracting import DEVICES
from torch import Tensor

from clipfast.kernels import dispatch
from clipfast.kernels.registration import operations

Calls = dict[str, dict[str, tuple[Any, ...]]]
"""Arguments without the backend, by operation and by what is unusual about them."""


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def backends(name: str) -> list[str]:
    """Those that have the operation and run here."""
    return [
        backend.name
        for backend in dispatch.BACKENDS
        if backend is dispatch.EAGER or (not backend.unsupported_reasons() and backend.implementation(name) is not None)
    ]


def cases(calls: Calls) -> Iterable[Any]:
    """Parameters ``name, case, backend`` of a test."""
    return [
        pytest.param(name, case, backend, id=f"{name}-{case}-{backend}")
        for name, of_name in calls.items()
        for case in of_name
        for backend in backends(name)
    ]


def put(argument: Any, device: str) -> Any:
    if isinstance(argument, list):
        return [put(each, device) for each in argument]
    return argument.to(device, copy=True) if isinstance(argument, Tensor) else argument


def opcheck(name: str, arguments: Iterable[Any], backend: str) -> None:
    """Torch's own check of the operation on copies of these arguments."""
    here = [put(argument, DEVICES.get(backend, "cpu")) for argument in arguments]
    torch.library.opcheck(operations()[name].op, (*here, backend))
