"""The kernel of ``csrc/cuda`` without a GPU: its threads run on the CPU, as fibers that take turns (``cuda_on_cpu/``).

That shows what a thread computes, that no barrier is missing and that shared memory suffices; not what a GPU makes of
it, nor how fast.
"""

import ctypes
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import ROOT
from contract_heads import SpanContract
from contracting import draw, in_double
from test_span import GAP, Drawn, misses
from torch import Tensor

from clipfast.kernels import cuda, dispatch, manifest, ops, reference
from clipfast.kernels.span import cuda as span_cuda

FOLDER = Path(__file__).parent / "cuda_on_cpu"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
OPTIONS = ["-std=gnu++20", "-O2", "-Wno-unknown-pragmas", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-x", "c++"]
ORDERS = (0, 1, 2)  # of threads, see device.cpp


@pytest.fixture(scope="module", autouse=True)
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """A device for tensors on the CPU."""
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("no C++ compiler" if COMPILER is None else "fibers as Linux has them")
    library = tmp_path_factory.mktemp("cuda") / cuda.LIBRARY.name
    sources = [ROOT / "csrc" / "cuda" / "span.cu", FOLDER / "device.cpp"]
    subprocess.run([COMPILER, *OPTIONS, f"-I{FOLDER}", *sources, "-o", library], check=True)
    manifest.write(library, ROOT / "csrc" / "cuda")
    before = cuda.LIBRARY, cuda.DEVICE
    cuda.LIBRARY, cuda.DEVICE = library, "cpu"
    cuda.forget()
    dispatch.forget()
    loaded = cuda.load().library
    assert loaded is not None
    yield loaded
    cuda.LIBRARY, cuda.DEVICE = before
    cuda.forget()
    dispatch.forget()


@pytest.fixture(autouse=True)
def in_order(device: ctypes.CDLL) -> Iterator[None]:
    yield
    device.on_cpu_order(0)
    device.on_cpu_skip(-1, -1)


class OnCpu(SpanContract):
    """Not collected; inherited with so many blocks of a cluster at most, and an order of threads."""

    backend = "cuda"
    blocks: int
    order: int

    @pytest.fixture(autouse=True)
    def _blocks(self, device: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "MOST_BLOCKS", self.blocks)
        cuda.clusters.cache_clear()
        dispatch.forget()
        device.on_cpu_order(self.order)


class TestOneBlock(OnCpu):
    blocks, order = 1, 1


class TestThreeBlocks(OnCpu):
    blocks, order = 3, 0


class TestSevenBlocks(OnCpu):
    blocks, order = 7, 2


HARD = [
    pytest.param("spread", (0.9, 0.99), 64, 5, id="texts that are alike"),
    pytest.param("aligned", (0.7, 1e-5), 67, 2, id="variances that fall to the floor"),
    pytest.param("shrinking", (0.8, 0.7), 80, 4, id="texts of which little is left"),
]


@pytest.mark.parametrize(("kind", "how", "rank", "blocks"), HARD)
def test_picks_are_those_of_float64(kind: str, how: tuple[float, float], rank: int, blocks: int) -> None:
    texts, factor = getattr(Drawn(rank, rank, 1000), kind)(*how)
    picks, _, _ = span_cuda.span(texts, factor, 60, 1e-10, blocks)
    assert max(misses(texts, factor, picks)) <= GAP


@pytest.mark.parametrize("rank", [1, 2, 31, 33, 65, 104])
def test_ranks_texts_and_blocks_that_are_multiples_of_nothing(device: ctypes.CDLL, rank: int) -> None:
    """More blocks than rows, or than pairs of texts; fewer texts than are asked for."""
    for texts, blocks, order in ((2 * rank + 1, 3, 2), (1, 16, 0), (rank // 2 + 2, 2, 1)):
        arguments = draw(rank, 1, texts, rank), draw(texts, 1, rank, rank) * 0.9 ** torch.arange(rank)
        device.on_cpu_order(order)
        have = span_cuda.span(*arguments, rank + 2, 1e-10, blocks)
        expected = reference.span(*in_double(*arguments), rank + 2, 1e-10)
        assert have[0].tolist() == expected[0].tolist()


def test_neither_blocks_nor_the_order_of_threads_change_a_bit_of_what_is_picked(device: ctypes.CDLL) -> None:
    arguments = draw(0, 1, 300, 35).double(), draw(1, 1, 35, 35).double()
    expected = span_cuda.span(*arguments, 12, 1e-10, 1)
    for blocks, orders in ((2, ORDERS), (5, ORDERS), (16, ORDERS[:1])):
        for order in orders:
            device.on_cpu_order(order)
            for have, one in zip(span_cuda.span(*arguments, 12, 1e-10, blocks), expected, strict=True):
                assert torch.equal(have, one)


def wrong(device: ctypes.CDLL, arguments: tuple[Tensor, Tensor], expected: Tensor) -> bool:
    """Whether some order of threads shows that something is not waited for."""
    for order in (*ORDERS, 3):
        device.on_cpu_order(order)
        try:
            picks, variance, _ = span_cuda.span(*arguments, 6, 1e-10, 3)
        except cuda.CudaError:
            return True
        if picks.tolist() != expected.tolist() or not bool(variance.isfinite().all()):
            return True
    return False


def test_every_barrier_is_missed(device: ctypes.CDLL) -> None:
    """Else none of these tests would notice one that is not there."""
    arguments = draw(0, 1, 700, 9), draw(1, 1, 9, 9) * 0.9 ** torch.arange(9)
    expected = reference.span(*in_double(*arguments), 6, 1e-10)[0]
    assert not wrong(device, arguments, expected)
    for barrier in range(6):  # one before the first pick, three of each
        device.on_cpu_skip(barrier, -1)
        assert wrong(device, arguments, expected), f"barrier {barrier} of the cluster"
    for barrier in range(3):  # one before the first pick, one of each
        device.on_cpu_skip(-1, barrier)
        assert wrong(device, arguments, expected), f"barrier {barrier} of a block"


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e150, 1e300])
def test_variances_beyond_what_float64_holds_end_the_picks(scale: float) -> None:
    """Squares that overflow or vanish: no endless loop, no pick twice."""
    texts, factor = draw(0, 3, 100, 12).double() * scale, draw(1, 3, 12, 12).double()
    picks, variance, directions = span_cuda.span(texts, factor, 12, 1e-10, 2)
    for row in picks.tolist():
        picked = [pick for pick in row if pick >= 0]
        assert len(picked) == len({*picked})
        assert row == picked + [-1] * (12 - len(picked))
    assert not variance[picks < 0].any()
    assert bool(directions.isfinite().all())


def test_sizes_that_are_worth_timing() -> None:
    """This device has room for 132 blocks: of as many rounds the most blocks, the fewest rounds first."""
    assert span_cuda.sizes(draw(0, 1, 40, 8)) == [16]
    assert span_cuda.sizes(draw(0, 20, 40, 8)) == [6, 13, 16]  # 22, 10 and 8 heads at once
    labels = [label for label, _ in span_cuda.variants(draw(0, 20, 40, 8), draw(1, 20, 8, 8), 3, 1e-10)]
    assert labels == ["cluster 6", "cluster 13", "cluster 16"]


def test_a_head_whose_texts_are_too_many() -> None:
    texts, factor = torch.zeros(1, 20_000, 67), torch.zeros(1, 67, 67)
    with pytest.raises(dispatch.BackendUnavailable, match=r"20000 texts of rank 67 are more than the shared memory of"):
        ops.span(texts, factor, 3, backend="cuda")
    enough = span_cuda.sizes(texts[:, :12_000])
    assert enough == [16]
    assert not span_cuda.sizes(texts[:, :12_000].double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_memory_is_what_the_model_of_its_costs_counts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pools that fit are those that it counts as fitting."""
    monkeypatch.syspath_prepend(ROOT)  # benchmarks are not installed
    span_costs = importlib.import_module("benchmarks.span_costs")
    for rank, blocks in ((67, 16), (67, 5), (33, 3), (8, 1)):
        fits = [blocks in cuda.clusters(0, dtype, texts, rank) for texts in range(2, 60_000, 997)]
        counted = [
            span_costs.shared_bytes(texts, rank, blocks, dtype.itemsize) <= 227 * 1024
            for texts in range(2, 60_000, 997)
        ]
        assert fits == counted
        assert {*fits} == {True, False}


def test_tensors_that_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = draw(0, 1, 9, 4), draw(1, 1, 4, 4)
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    assert span_cuda.unsupported_reasons(*arguments, 3, 1e-10) == ["texts is on cpu", "factor is on cpu"]
    assert dispatch.choose("span", [*arguments, 3, 1e-10]).skipped["cuda"] == ["the tensors are not on a GPU"]


def test_a_launch_that_fails_says_what_cuda_says(device: ctypes.CDLL) -> None:
    device.on_cpu_skip(-1, -1)
    with pytest.raises(cuda.CudaError, match=r"^span: "):
        span_cuda.span(draw(0, 1, 9, 4), draw(1, 1, 4, 4), 3, 1e-10, 0)
