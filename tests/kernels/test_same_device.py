"""Every tensor of a call is on one device, else the error names them all: torch's own would name no argument."""

import inspect
from typing import Any

import pytest
from torch import Tensor

from clipfast.kernels import examples, ops


def _cases() -> list[tuple[str, int]]:
    """Operations of several tensors, and the place of each."""
    cases = []
    for name in ops.__all__:
        places = [place for place, each in enumerate(examples.arguments(name)) if isinstance(each, Tensor)]
        cases += [(name, place) for place in places] if len(places) > 1 else []
    return cases


@pytest.mark.parametrize(("name", "place"), _cases())
def test_a_tensor_on_another_device_is_refused(name: str, place: int) -> None:
    given: list[Any] = examples.arguments(name)
    given[place] = given[place].to("meta")
    call = getattr(ops, name)
    parameters = [each for each in inspect.signature(call).parameters if each != "backend"]
    with pytest.raises(ValueError, match=f"different devices: .*{parameters[place]} on meta"):
        call(**dict(zip(parameters, given, strict=False)))
