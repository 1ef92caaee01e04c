"""What is kept under a tensor: for as long as the tensor lives and is not changed."""

import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from clipfast.kernels.derived import Derived


def doubling(source: Tensor, calls: list[int]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        calls.append(1)
        return 2 * source

    return make


def test_made_once_per_source_and_kind() -> None:
    derived, calls, source = Derived(), [], torch.ones(3)
    first = derived.get(source, "twice", doubling(source, calls))
    assert derived.get(source, "twice", doubling(source, calls)) is first
    assert len(calls) == 1
    assert derived.get(source, "again", doubling(source, calls)) is not first
    other = source.clone()
    assert derived.get(other, "twice", doubling(other, calls)) is not first
    assert len(calls) == 3


def test_a_source_changed_in_place_is_read_again() -> None:
    derived, calls, source = Derived(), [], torch.ones(3)
    derived.get(source, 0, doubling(source, calls))
    source.mul_(5)
    assert derived.get(source, 0, doubling(source, calls)).tolist() == [10, 10, 10]
    source[1:].zero_()  # through a view
    assert derived.get(source, 0, doubling(source, calls)).tolist() == [10, 0, 0]


def test_the_entry_ends_with_its_source() -> None:
    derived, calls, source = Derived(), [], torch.ones(3)
    derived.get(source, 0, doubling(source, calls))
    derived.get(source, 2, partial(torch.unsqueeze, source, 0))  # a view is not kept: it would keep its source
    assert len(derived) == 1
    del source
    gc.collect()
    assert len(derived) == 0


def test_inference_tensors_record_no_changes_and_are_read_every_time() -> None:
    derived, calls = Derived(), []
    with torch.inference_mode():
        source = torch.ones(3)
        derived.get(source, 0, doubling(source, calls))
        source.mul_(5)
        assert derived.get(source, 0, doubling(source, calls)).tolist() == [10, 10, 10]


def test_what_inference_mode_makes_can_be_used_outside() -> None:
    derived, source = Derived(), torch.ones(3)
    with torch.inference_mode():
        made = derived.get(source, 0, lambda: 2 * source)
    assert not made.is_inference()


def test_an_error_leaves_nothing() -> None:
    derived, source = Derived(), torch.ones(3)

    def fail() -> Tensor:
        raise ValueError("no memory")

    with pytest.raises(ValueError, match="no memory"):
        derived.get(source, 0, fail)
    assert derived.get(source, 0, lambda: 2 * source).tolist() == [2, 2, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_other_streams_and_captures_read_what_was_made() -> None:
    derived, source = Derived(), torch.ones(1 << 20, device="cuda")
    first = derived.get(source, 0, lambda: 2 * source)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert derived.get(source, 0, lambda: 3 * source) is first
        assert float(first.sum()) == 2 << 20
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert derived.get(source, 0, lambda: 3 * source) is first
        inside = derived.get(source, 1, lambda: 4 * source)
    graph.replay()
    assert float(inside[0]) == 4
    assert float(derived.get(source, 1, lambda: 4 * source)[0]) == 4
