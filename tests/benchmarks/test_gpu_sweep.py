"""The sweep of configurations: what it writes, and that a wrong kernel is seen."""

from typing import Any

import pytest
import torch

from benchmarks import gpu_sweep
from clipfast.kernels import dispatch
from clipfast.kernels.examples import arguments as example_arguments
from clipfast.kernels.registration import operations


def test_orders_are_by_time() -> None:
    entries = {
        "linear(float32[8x4])": {
            "chosen": ["triton", "a"],
            "milliseconds": {"triton/b": 2.0, "eager": 3.0, "triton/a": 1.0},
        },
        "linear(float32[4x4])": {"chosen": ["eager", ""]},
    }
    assert gpu_sweep.document(90, entries, "NVIDIA H100") == {
        "capability": 90,
        "source": "measured",
        "device": "NVIDIA H100",
        "orders": {"linear(float32[8x4])": ["triton/a", "triton/b", "eager"]},
    }


@pytest.mark.parametrize("operation", sorted(operations()))
def test_every_operation_is_checked_against_float64(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = example_arguments(operation)
    assert gpu_sweep.error(operation, arguments) <= 1e-5
    right = dispatch.choose(operation, arguments).run

    def wrong(*given: Any) -> Any:
        before = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
        result = right(*given)
        for after, was in zip(given, before, strict=True):
            if isinstance(after, torch.Tensor) and not torch.equal(after, was):
                after[-1] = was[-1]  # the last row is not written
        for each in gpu_sweep._tensors(result):
            each[-1] = 0
        return result

    choice = dispatch.choose(operation, arguments)._replace(run=wrong)
    monkeypatch.setattr(dispatch, "choose", lambda *ignored: choice)
    assert not gpu_sweep.error(operation, arguments) <= 1e-2


def test_the_first_call_of_every_kind_is_kept_as_it_was() -> None:
    seen: dict[str, tuple[str, list[Any]]] = {}
    text_maps = operations()["text_maps"]
    arguments = example_arguments("text_maps")
    out = arguments[3].clone()
    with gpu_sweep._recorded(seen):
        text_maps(*arguments, "auto")
        text_maps(*arguments, "auto")
    text_maps(*arguments, "auto")
    ((operation, kept),) = seen.values()
    assert operation == "text_maps"
    assert torch.equal(kept[3], out)
    assert not torch.equal(arguments[3], out)
