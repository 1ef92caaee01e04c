"""Arithmetic that kernels share: how float32 is multiplied."""

from collections.abc import Callable, Iterator

import pytest
import torch

pytest.importorskip("triton")
from clipfast.kernels.arithmetic import dot_precision

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """The legacy setting first: it resets what the other ways have set."""
    yield
    torch.set_float32_matmul_precision("highest")
    MATMUL.fp32_precision = "none"


def by_name(value: str) -> None:
    MATMUL.fp32_precision = value


def by_flag(value: str) -> None:
    MATMUL.allow_tf32 = value == "tf32"


def by_level(value: str) -> None:
    torch.set_float32_matmul_precision("high" if value == "tf32" else "highest")


@pytest.mark.parametrize("setting", [by_name, by_flag, by_level])
def test_float32_is_multiplied_as_torch_does(setting: Callable[[str], None]) -> None:
    for value in ("tf32", "ieee", "tf32"):
        setting(value)
        assert dot_precision(torch.float32) == value
        assert dot_precision(torch.bfloat16) == "ieee"


def test_float32_is_exact_by_default() -> None:
    assert dot_precision(torch.float32) == "ieee"
