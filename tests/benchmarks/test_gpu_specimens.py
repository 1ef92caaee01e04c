"""Running specimens: memory of their shapes, and bits that change are seen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
gpu_specimens = pytest.importorskip("benchmarks.gpu_specimens")
launch = pytest.importorskip("clipfast.kernels.launch")


class Kernel:
    """A Python function in place of a kernel."""

    __name__ = "_kernel"

    def __init__(self, run: Callable[..., object]) -> None:
        self._run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        return lambda num_warps, num_stages, **arguments: self._run(**arguments)


def launched(run: Callable[..., object]) -> Any:
    arguments = {"p_in": torch.empty(4, 3, device="meta"), "p_out": torch.empty(4, 3, device="meta"), "rows": 4}
    return gpu_specimens.with_memory(launch.Launch(Kernel(run), (4,), arguments, {}), "cpu")


def test_a_kernel_with_the_same_bits_every_time() -> None:
    runs = []

    def add(p_in: Tensor, p_out: Tensor, rows: int) -> None:
        runs.append(rows)
        p_out += p_in  # on what was there before, as it was at the first run

    assert gpu_specimens.repeat(launched(add), 5) == (0, True)
    assert runs == [4] * 6


def test_a_kernel_with_other_bits_now_and_then() -> None:
    runs = []

    def race(p_in: Tensor, p_out: Tensor, rows: int) -> None:
        runs.append(rows)
        p_out.copy_(p_in)
        p_out[2, 1] += 1e-6 * (len(runs) in (3, 5))

    assert gpu_specimens.repeat(launched(race), 5) == (2, True)


def test_a_kernel_that_writes_nothing_is_reported() -> None:
    assert gpu_specimens.repeat(launched(lambda p_in, p_out, rows: None), 2) == (0, False)


def test_not_a_number_is_a_pattern_of_bits() -> None:
    assert gpu_specimens.repeat(launched(lambda p_in, p_out, rows: p_out.fill_(torch.nan)), 3) == (0, True)
    assert gpu_specimens.same_bits(torch.tensor([0.0]), torch.tensor([0.0]))
    assert not gpu_specimens.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_specimens_are_those_of_the_compiler_at_another_batch() -> None:
    few, many = gpu_specimens.chosen(90, 1), gpu_specimens.chosen(90, 2)
    assert len(few) == len(many) > 100
    assert [specimen.operation for specimen in few] == [specimen.operation for specimen in many]
    smallest = gpu_specimens.chosen(90, 1, 3)
    sizes = sorted(sum(gpu_specimens._sizes(specimen.launch)) for specimen in few)
    assert [sum(gpu_specimens._sizes(specimen.launch)) for specimen in smallest] == sizes[:3]


def test_memory_has_the_strides_of_the_specimen() -> None:
    value = torch.empty(2, 17, 3, 4, 8, dtype=torch.bfloat16, device="meta")[:, :, 2]
    heads = torch.empty(3, dtype=torch.int64, device="meta")
    given = launch.Launch(Kernel(print), (1,), {"p_value": value, "p_heads": heads, "p_none": None, "n": 5}, {})
    made = gpu_specimens.with_memory(given, "cpu").arguments
    assert made["p_value"].stride() == value.stride()
    assert made["p_value"].dtype == torch.bfloat16
    assert made["p_value"].float().std() > 0.05
    assert made["p_heads"].tolist() == [0, 0, 0]
    assert (made["p_none"], made["n"]) == (None, 5)
