"""Arguments of moments and span that do not fit are refused by name, before any backend sees them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clipfast.kernels import ops

B, G, E, X, T, R = 2, 3, 4, 1, 5, 6
MOMENTS: dict[str, tuple[int, ...]] = {
    "codes": (B, G, E),
    "shared": (B, X),
    "centre": (G, E + X),
    "total": (G, E + X),
    "second": (G, E + X, E + X),
}
SPAN: dict[str, tuple[int, ...]] = {"texts": (G, T, R), "factor": (G, R, R)}


def moments(**changed: Any) -> None:
    exact = {"total": torch.float64, "second": torch.float64}
    made = {name: torch.zeros(shape, dtype=exact.get(name)) for name, shape in MOMENTS.items()}
    ops.moments(**(made | changed))


def span(**changed: Any) -> tuple[Tensor, Tensor, Tensor]:
    made = {name: torch.ones(shape) for name, shape in SPAN.items()}
    return ops.span(**({"size": 2} | made | changed))


def test_arguments_that_fit_are_taken() -> None:
    moments()
    span()


@pytest.mark.parametrize("name", MOMENTS)
def test_shapes_of_moments(name: str) -> None:
    dtype = torch.float64 if name in ("total", "second") else torch.float32
    with pytest.raises(ValueError, match=rf"^{name} has shape \["):
        moments(**{name: torch.zeros(MOMENTS[name][1:], dtype=dtype)})
    for axis in range(len(MOMENTS[name])):
        wrong = [size + (i == axis) for i, size in enumerate(MOMENTS[name])]
        with pytest.raises(ValueError, match=rf"^({'|'.join(MOMENTS)}) has shape \["):
            moments(**{name: torch.zeros(wrong, dtype=dtype)})


@pytest.mark.parametrize("name", ["total", "second"])
def test_sums_are_contiguous_float64(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is torch.float32, expected contiguous torch.float64"):
        moments(**{name: torch.zeros(MOMENTS[name])})
    turned = torch.zeros(MOMENTS[name][::-1], dtype=torch.float64).permute(*reversed(range(len(MOMENTS[name]))))
    with pytest.raises(ValueError, match=rf"^{name} is .*expected contiguous torch.float64"):
        moments(**{name: turned})


@pytest.mark.parametrize("name", SPAN)
def test_shapes_of_span(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} has shape \["):
        span(**{name: torch.ones(SPAN[name][1:])})
    for axis in {"texts": (0, 2), "factor": (0, 1, 2)}[name]:  # how many texts there are nothing else says
        wrong = [size + (i == axis) for i, size in enumerate(SPAN[name])]
        with pytest.raises(ValueError, match=r"^factor has shape \["):
            span(**{name: torch.ones(wrong)})


def test_span_of_no_texts_or_of_no_size() -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        span(texts=torch.ones(G, 0, R))
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"^{size} of {T} texts cannot be picked"):
            span(size=size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_span_in_low_precision(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"texts are {dtype}"):
        span(texts=torch.ones(SPAN["texts"], dtype=dtype), factor=torch.ones(SPAN["factor"], dtype=dtype))


def test_span_of_two_precisions() -> None:
    """A factor may be more exact than the texts, never less."""
    with pytest.raises(ValueError, match=r"texts are torch.float64 and factor torch.float32"):
        span(texts=torch.ones(SPAN["texts"], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"texts are torch.float32 and factor torch.bfloat16"):
        span(factor=torch.ones(SPAN["factor"], dtype=torch.bfloat16))
    span(factor=torch.ones(SPAN["factor"], dtype=torch.float64))
