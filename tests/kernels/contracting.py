"""What all parts of the contract suite share: inputs, and memory that nobody wrote being NaN."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from tolerances import OP_FLOAT32
from torch import Tensor

from clipfast.kernels.dispatch import BACKENDS, EAGER, BackendUnavailable, unsupported_reasons

IMAGES, HEADS, WIDTH = 3, 2, 48  # an odd batch
TOKENS = (1, 2, 17, 50, 197, 257, 577)
HEAD_DIMS = (64, 80, 104)
SHAPES = [pytest.param(n, e, id=f"N{n}-E{e}") for n, e in product(TOKENS, HEAD_DIMS)]
COLUMNS = (1, 3, 100)
LOW = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]

DEVICES = (
    {"triton": "cuda", "cuda": "cuda"} if torch.cuda.is_available() else {}
)  # where a backend runs, if not on the CPU


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Random numbers that do not depend on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def in_double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def floor(expected: Tensor) -> float:
    """Where the low-precision definition happens to be exact, a backend may still round in float32."""
    return OP_FLOAT32 * float(expected.abs().max())


@contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Memory that nobody wrote is NaN, so that reading it shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(8, device=device).isnan().all(), "uninitialised memory is not poisoned"
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic)


class Contract:
    """What every part starts from; a backend's class says which backend and on which device.

    Every case runs with gradients disabled, as in a forward, and with gradients enabled.
    """

    backend: str
    device = "cpu"
    grad_modes: tuple[bool, ...] = (False, True)
    float64 = True  # whether the backend supports float64
    not_in_float64: frozenset[str] = frozenset()  # operations whose float64 it does not support, if it does others'

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        ids = ["grad" if enabled else "no-grad" for enabled in self.grad_modes]
        metafunc.parametrize("grad_enabled", self.grad_modes, ids=ids)

    @pytest.fixture(autouse=True)
    def _runs_here(self) -> None:
        reasons = next(backend for backend in BACKENDS if backend.name == self.backend).unsupported_reasons()
        if reasons:
            pytest.skip(f"{self.backend}: {', '.join(reasons)}")

    @pytest.fixture(autouse=True)
    def _grad_mode(self, grad_enabled: bool) -> Iterator[None]:
        with torch.set_grad_enabled(grad_enabled):
            yield

    def draw(self, seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Random numbers on the suite's device."""
        return draw(seed, *shape, dtype=dtype, device=self.device)

    def draw_weighted_values(
        self, tokens: int, head_dim: int, columns: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``alpha`` and ``basis`` in float32 and ``value`` in ``dtype``, with the strides of a layer's values."""
        alpha = self.draw(1, IMAGES, HEADS, tokens).softmax(-1)
        value = self.draw(2, IMAGES, tokens, 3, HEADS, head_dim, dtype=dtype)[:, :, 2]
        return alpha, value, self.draw(3, HEADS, head_dim, columns)

    @pytest.fixture(autouse=True)
    def _poisoned(self) -> Iterator[None]:
        with poisoned(self.device):
            yield

    def reasons(self, operation: str, *arguments: Any) -> list[str]:
        """Why the backend, or eager for an operation that it does not have, cannot compute this."""
        backend = next(backend for backend in BACKENDS if backend.name == self.backend)
        computing = EAGER if backend.implementation(operation) is None else backend
        return unsupported_reasons(computing, operation, arguments)

    def takes_float64(self, operation: str) -> bool:
        return self.float64 and operation not in self.not_in_float64

    def refuses_float64(self) -> "pytest.RaisesExc[BackendUnavailable]":
        """For backends that leave float64 to another: they say so."""
        return pytest.raises(BackendUnavailable, match=f"{self.backend} cannot compute .*float64")
