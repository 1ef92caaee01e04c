"""``attention`` and the query rows as ``torch.library`` ops with unusual arguments: every row, strides, nothing."""

from typing import Any

import pytest
import torch
from contracting import DEVICES

from clipfast.kernels import dispatch, library


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return draw(2, 16, 40, dtype=dtype), draw(2, 16, 40, dtype=dtype), draw(2, 16, dtype=dtype)


LOW = torch.bfloat16
CALLS: dict[str, dict[str, tuple[Any, ...]]] = {
    "attention": {
        "cls": (draw(2, 9, 3, 2, 16), "cls"),
        "mean": (draw(2, 9, 3, 2, 16), "mean"),
        "none": (draw(2, 9, 3, 2, 16), None),
        "bf16": (draw(2, 9, 3, 2, 16, dtype=LOW), "cls"),
        "bf16-none": (draw(2, 9, 3, 2, 16, dtype=LOW), None),
        "apart": (draw(1, 257, 3, 1, 16), "cls"),
        "strided": (draw(2, 3, 2, 9, 16).permute(0, 3, 1, 2, 4), "mean"),
        "empty": (draw(0, 9, 3, 2, 16), "cls"),
    },
    "query_row": {
        "one-query": (draw(2, 16).expand(3, 2, 16), draw(3, 9, 2, 16), draw(3, 9, 2, 16)),
        "bf16": (draw(2, 2, 16, dtype=LOW), draw(2, 9, 2, 16, dtype=LOW), draw(2, 9, 2, 16, dtype=LOW)),
        "strided": (draw(2, 16, 2).mT, draw(2, 2, 9, 16).transpose(1, 2), draw(2, 9, 3, 2, 16)[:, :, 2]),
        "empty": (draw(0, 2, 16), draw(0, 9, 2, 16), draw(0, 9, 2, 16)),
    },
    "query_row_from_tokens": {
        "float32": (draw(2, 2, 16), draw(2, 9, 40), *weights()),
        "bf16": (draw(2, 2, 16, dtype=LOW), draw(2, 9, 40, dtype=LOW), *weights(LOW)),
        "strided": (draw(2, 16, 2).mT, draw(9, 2, 40).transpose(0, 1), *weights()),
        "empty": (draw(0, 2, 16), draw(0, 9, 40), *weights()),
    },
}
CASES = [
    pytest.param(name, case, backend.name, id=f"{name}-{case}-{backend.name}")
    for name, cases in CALLS.items()
    for case in cases
    for backend in dispatch.BACKENDS
    if backend is dispatch.EAGER or (not backend.refusals() and name in backend.implementations())
]


@pytest.mark.parametrize(("name", "case", "backend"), CASES)
def test_schema_and_fake(name: str, case: str, backend: str) -> None:
    device = DEVICES.get(backend, "cpu")
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in CALLS[name][case]]
    assert name in library.OPERATIONS  # importing the library registers them
    torch.library.opcheck(getattr(torch.ops.clipfast, name).default, (*arguments, backend))
