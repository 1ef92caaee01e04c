"""The calls of the benchmarks, built from plain numbers as a fresh process builds them."""

from typing import Any

import pytest
import torch

from benchmarks import cases

ARGUMENTS = {"name": "scenes", "batch": 2, "threads": 1}


@pytest.mark.parametrize(
    "build", [cases.explain_call, cases.heads_only_call, cases.all_tokens_call], ids=lambda build: build.__name__
)
def test_every_side_sees_the_same_images(build: Any) -> None:
    plain = cases.plain_call(**ARGUMENTS)()
    found, kept = build(**ARGUMENTS)()
    assert isinstance(plain, torch.Tensor)
    heads = kept.sum(2) if kept.ndim == 5 else kept
    assert kept.shape[:2] == (2, 6)
    assert all(check.passed for check in cases.against_plain(found, heads, plain))


@pytest.mark.parametrize("spatial", [True, False])
def test_the_naive_side_too(spatial: bool) -> None:
    result: Any = cases.naive_call(**ARGUMENTS, spatial=spatial)()
    found, kept = (cases.all_tokens_call if spatial else cases.heads_only_call)(**ARGUMENTS)()  # type: ignore[misc]
    assert all(check.passed for check in cases.against_naive(found, kept, result))
