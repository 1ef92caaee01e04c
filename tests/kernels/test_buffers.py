"""Buffers that a forward reuses: which memory is used again, when, and that nobody else can still read it."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from builders import directions, pixels, vision_tower
from torch import Tensor
from torch.utils._pytree import tree_leaves

import clipfast
from clipfast.kernels import buffers, ops

CPU = torch.device("cpu")
LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def without_kept_buffers() -> Iterator[None]:
    """Every test starts as a thread does that has run no forward."""
    vars(buffers._OPEN).pop("kept", None)
    yield
    vars(buffers._OPEN).pop("kept", None)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[buffers.BufferPool]:
    """Every pool that is opened; their free memory is NaN, and they note where their buffers are."""
    opened: list[buffers.BufferPool] = []

    class WatchedPool(buffers.BufferPool):
        poison = True

        def __init__(self, kept: Sequence[buffers.Memory] = ()) -> None:
            super().__init__(kept)
            self.places: dict[int, buffers.Memory] = {}  # kept, so that nothing else gets the same place
            opened.append(self)

        def _take(self, size: int) -> buffers.Memory:
            memory = super()._take(size)
            self.places[memory.ctypes.data] = memory
            return memory

    monkeypatch.setattr(buffers, "BufferPool", WatchedPool)
    return opened


def test_a_buffer_is_reused_once_no_tensor_uses_it() -> None:
    with buffers.reuse(CPU):
        first = buffers.empty(LIKE, 3, 4)
        second = buffers.empty(LIKE, 3, 4)
        assert first.data_ptr() != second.data_ptr()
        assert (first.shape, first.dtype) == ((3, 4), LIKE.dtype)
        assert first.is_contiguous()
        place, view = first.data_ptr(), first[1:, 2]
        del first
        assert buffers.empty(LIKE, 3, 4).data_ptr() not in (place, second.data_ptr())  # the view still uses it
        del view
        assert buffers.empty(LIKE, 2, 5).data_ptr() == place


def test_buffers_are_aligned_as_torch_aligns_memory() -> None:
    with buffers.reuse(CPU):
        assert all(buffers.empty(LIKE, size).data_ptr() % 64 == 0 for size in (1, 7, 1000))


def test_a_buffer_is_reused_for_what_is_at_least_half_as_large() -> None:
    with buffers.reuse(CPU):
        place = buffers.empty(LIKE, 100).data_ptr()
        small = buffers.empty(LIKE, 40)
        assert small.data_ptr() != place
        low_precision = buffers.empty(LIKE.bfloat16(), 150)
        assert low_precision.dtype == torch.bfloat16
        assert low_precision.data_ptr() == place
        del low_precision
        large = buffers.empty(LIKE, 150).data_ptr()  # the buffer of 100 is given up for it
        assert buffers.empty(LIKE, 100).data_ptr() == large
        assert buffers.empty(LIKE, 0, 7).shape == (0, 7)


def test_a_pool_belongs_to_one_thread_and_one_block() -> None:
    with buffers.reuse(CPU):
        place = buffers.empty(LIKE, 8).data_ptr()
        open_elsewhere: list[bool] = []
        thread = threading.Thread(target=lambda: open_elsewhere.append(buffers.is_open()))
        thread.start()
        thread.join()
        assert open_elsewhere == [False]
        with buffers.reuse(CPU):
            assert buffers.empty(LIKE, 8).data_ptr() != place
        assert buffers.empty(LIKE, 8).data_ptr() == place
        with buffers.reuse(torch.device("meta")):
            assert buffers.is_open()  # that of the CPU
    assert not buffers.is_open()


def test_a_tensor_that_outlives_its_pool_keeps_its_own_memory_alone(pools: list[Any]) -> None:
    with buffers.reuse(CPU):
        late = buffers.empty(LIKE, 10).fill_(1)
        buffers.empty(LIKE, 10_000)
        assert len(pools[0]._free) == 1
    assert pools[0]._free == []
    assert torch.equal(late, torch.ones(10))
    del late
    assert pools[0]._free == []


def test_a_thread_keeps_buffers_for_the_next_pool(pools: list[Any]) -> None:
    with buffers.reuse(CPU):
        place = buffers.empty(LIKE, 1000).fill_(1).data_ptr()
    with buffers.reuse(CPU):
        outside: list[int] = []
        thread = threading.Thread(target=lambda: outside.append(len(vars(buffers._OPEN))))
        thread.start()
        thread.join()
        assert outside == [0]
        again = buffers.empty(LIKE, 900)
        assert again.data_ptr() == place
        assert again.isnan().all()
        assert buffers.empty(LIKE, 300).data_ptr() != place
    assert [pool.allocated for pool in pools] == [1, 1]


def test_kept_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "MAX_KEPT_BYTES", 4000)
    with buffers.reuse(CPU):
        tensors = [buffers.empty(LIKE, size) for size in (100, 300, 500, 1001)]
        while tensors:
            del tensors[0]
    assert [len(memory) for memory in buffers._OPEN.kept] == [2000, 1200, 400]  # the last is too large
    with buffers.reuse(CPU):
        buffers.empty(LIKE, 300)
    assert [len(memory) for memory in buffers._OPEN.kept] == [1200]  # others were not used


def test_operations_write_into_the_pool() -> None:
    x, weight, bias = torch.randn(2, 5, 16), torch.randn(48, 16), torch.randn(48)
    expected = ops.linear(x, weight, bias)
    with buffers.reuse(CPU):
        place = buffers.empty(LIKE, *expected.shape).data_ptr()
        result = ops.linear(x, weight, bias)
        assert result.data_ptr() == place
        assert torch.equal(result, expected)


# -------------------------------------------------------------------------------------------------- in a forward


def tensors(contributions: clipfast.Contributions) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(vars(contributions)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["tok", "avg"])
def test_a_forward_allocates_as_many_buffers_for_any_number_of_layers(
    pools: list[Any], pooling: str, dtype: torch.dtype
) -> None:
    """One more than these, and something is held for longer than it must be."""
    options: dict[str, Any] = {"texts": directions(3, 20), "maps": "summed", "attention": True, "tokens": True}
    for layers in (2, 7):
        vars(buffers._OPEN).pop("kept", None)
        visual = vision_tower(layers=layers, pool_type=pooling, final_ln_after_pool=True, dtype=dtype)
        model = clipfast.wrap(visual)
        contributions = model.decompose(pixels(visual, dtype=dtype), class_token=pooling == "tok", **options)
        results = tensors(contributions)
        assert len(results) > 5
        in_the_pool = [tensor for tensor in results if tensor.untyped_storage().data_ptr() in pools[-1].places]
        assert [tensor.shape for tensor in in_the_pool if tensor.numel()] == []
        model.decompose(pixels(visual, dtype=dtype), class_token=pooling == "tok", **options)
    assert len(pools) == 4
    assert 0 < pools[0].allocated == pools[2].allocated <= (11 if pooling == "tok" else 6)
    assert pools[1].allocated == pools[3].allocated <= 1  # a second forward has the buffers of the first


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_no_memory_is_read_after_its_release(pools: list[Any], backend: str) -> None:
    """Released memory is NaN: the results are those of a forward that reuses none."""
    visual = vision_tower(layers=3)
    model = clipfast.wrap(visual, backend=backend)
    options: dict[str, Any] = {"texts": directions(3, 20), "maps": "per_head", "attention": True, "tokens": True}
    poisoned = tensors(model.decompose(pixels(visual), class_token=True, **options))
    assert pools[-1].allocated > 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "empty", lambda like, *shape: like.new_empty(shape))
        fresh = tensors(model.decompose(pixels(visual), class_token=True, **options))
    assert all(torch.equal(*pair) for pair in zip(poisoned, fresh, strict=True))


def test_the_next_forward_changes_no_results_of_the_last() -> None:
    visual = vision_tower()
    model = clipfast.wrap(visual)
    options: dict[str, Any] = {"texts": directions(3, 20), "maps": "per_head", "attention": True, "tokens": True}
    contributions = model.decompose(pixels(visual, seed=1), **options)
    before = [tensor.clone() for tensor in tensors(contributions)]
    model.decompose(pixels(visual, seed=2), **options)
    assert all(torch.equal(*pair) for pair in zip(before, tensors(contributions), strict=True))


@pytest.mark.parametrize("rows", [3, 64])  # few rows: torch's product; many: the one whose threads divide the weight
@pytest.mark.parametrize("is_open", [True, False], ids=["pool", "no pool"])
def test_results_are_put_into_a_place(rows: int, is_open: bool) -> None:
    x, weight, bias = torch.randn(1, rows, 1024), torch.randn(1536, 1024), torch.randn(1536)
    expected = ops.linear(x, weight, bias)
    packed = torch.full((1, rows, 3, 1536), torch.nan)
    place = packed[:, :, 1]
    if is_open:
        with buffers.reuse(CPU):
            buffers.into(place, lambda: ops.linear(x, weight, bias))
            other = ops.linear(x, weight, bias)  # the next result goes elsewhere
    else:
        buffers.into(place, lambda: ops.linear(x, weight, bias))
        other = expected
    assert torch.equal(place, expected)
    assert torch.equal(other, expected)
    assert packed[:, :, ::2].isnan().all()


def test_a_place_is_written_without_a_copy() -> None:
    x, weight = torch.randn(1, 3, 8), torch.randn(8, 8)
    place, results = torch.empty(1, 3, 2, 8)[:, :, 0], []

    def compute() -> Tensor:
        results.append(ops.linear(x, weight))
        return results[0]

    with buffers.reuse(CPU):
        buffers.into(place, compute)
    assert results[0] is place


def test_an_operation_that_fails_leaves_no_place() -> None:
    place = torch.empty(1, 3, 2, 8)[:, :, 0]
    with buffers.reuse(CPU):
        with pytest.raises(ZeroDivisionError):
            buffers.into(place, lambda: torch.empty(1 // 0))
        assert ops.linear(torch.randn(1, 3, 8), torch.randn(8, 8)) is not place
