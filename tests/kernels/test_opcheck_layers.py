"""Linear layers and ``add_layer_norm`` as ``torch.library`` ops with unusual arguments."""

import pytest
import torch
from opchecking import Calls, cases, draw, opcheck

LOW = torch.bfloat16
VECTOR = draw(24)
CALLS: Calls = {
    "linear": {
        "bf16": (draw(2, 3, 16, dtype=LOW), draw(24, 16, dtype=LOW), draw(24, dtype=LOW)),
        "without a bias": (draw(2, 3, 16, dtype=LOW), draw(24, 16, dtype=LOW), None),
        "strided": (draw(2, 16, 3).mT, draw(16, 24).T, draw(24, 2)[:, 0]),
        "no images": (draw(0, 3, 16), draw(24, 16), VECTOR),
    },
    "linear_activation": {
        "bf16": (draw(2, 3, 16, dtype=LOW), draw(24, 16, dtype=LOW), draw(24, dtype=LOW), "gelu"),
        "strided": (draw(2, 16, 3).mT, draw(16, 24).T, draw(24, 2)[:, 0], "quick_gelu"),
        "no images": (draw(0, 3, 16), draw(24, 16), VECTOR, "gelu_tanh"),
    },
    "add_layer_norm": {
        "without a term": (draw(2, 3, 24), None, VECTOR, VECTOR, 1e-5, None),
        "bf16": (draw(2, 3, 24, dtype=LOW), draw(2, 3, 24, dtype=LOW), VECTOR, VECTOR, 1e-5, None),
        "bf16 without a term": (draw(2, 3, 24, dtype=LOW), None, VECTOR, VECTOR, 1e-5, None),
        "no images": (draw(0, 3, 24), draw(0, 3, 24), VECTOR, VECTOR, 1e-5, None),
    },
    "rotate": {
        "halves": (draw(2, 5, 2, 3, 8), draw(1, 5, 8), draw(1, 5, 8), True),
        "neighbours": (draw(2, 5, 2, 3, 8), draw(3, 5, 8), draw(3, 5, 8), False),
        "bf16": (draw(2, 5, 2, 3, 8, dtype=LOW), draw(1, 5, 8), draw(1, 5, 8), False),
        "strided": (draw(2, 2, 3, 5, 8).permute(0, 3, 1, 2, 4), draw(8, 5, 1).permute(2, 1, 0), draw(1, 5, 8), True),
        "no images": (draw(0, 5, 2, 3, 8), draw(1, 5, 8), draw(1, 5, 8), False),
    },
    "add_linear": {
        "bf16": (draw(2, 3, 24, dtype=LOW), draw(2, 3, 16, dtype=LOW), draw(24, 16, dtype=LOW)),
        "strided": (draw(2, 3, 24), draw(2, 16, 3).mT, draw(16, 24).T),
        "no images": (draw(0, 3, 24), draw(0, 3, 16), draw(24, 16)),
    },
    "linear_unrounded": {
        "bf16": (draw(2, 16, dtype=LOW), draw(24, 16, dtype=LOW), draw(24, dtype=LOW)),
        "strided": (draw(16, 2).T, draw(16, 24).T, draw(24, 2)[:, 0]),
        "no images": (draw(0, 16), draw(24, 16), VECTOR),
    },
}


@pytest.mark.parametrize(("name", "case", "backend"), cases(CALLS))
@pytest.mark.slow
def test_schema_and_fake(name: str, case: str, backend: str) -> None:
    opcheck(name, CALLS[name][case], backend)
