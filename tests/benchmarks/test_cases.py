"""The calls of the benchmarks, built from plain values as a new process builds them."""

from typing import Any

import pytest
import torch

from benchmarks import cases

ARGUMENTS = {"name": "scenes", "batch": 2, "threads": 1}


@pytest.mark.parametrize(
    "build", [cases.explain_call, cases.heads_only_call, cases.all_tokens_call], ids=lambda build: build.__name__
)
def test_calls_agree_with_the_plain_forward(build: Any) -> None:
    plain = cases.plain_call(**ARGUMENTS)()
    contributions, array = build(**ARGUMENTS)()
    assert isinstance(plain, torch.Tensor)
    heads = array.sum(2) if array.ndim == 5 else array
    assert array.shape[:2] == (2, 6)
    assert all(check.passed for check in cases.against_plain(contributions, heads, plain))


@pytest.mark.parametrize("spatial", [True, False])
def test_calls_agree_with_the_naive_implementation(spatial: bool) -> None:
    result: Any = cases.naive_call(**ARGUMENTS, spatial=spatial)()
    contributions, array = (cases.all_tokens_call if spatial else cases.heads_only_call)(**ARGUMENTS)()  # type: ignore[misc]
    assert all(check.passed for check in cases.against_naive(contributions, array, result))
