"""``attention`` and the query rows as ``torch.library`` ops with unusual arguments: every row, strides, nothing."""

import pytest
import torch
from opchecking import Calls, cases, draw, opcheck


def weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    return draw(2, 16, 40, dtype=dtype), draw(2, 16, 40, dtype=dtype), draw(2, 16, dtype=dtype)


LOW = torch.bfloat16
CALLS: Calls = {
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
    "weighted_rows": {
        "float32": (draw(2, 9, 3, 2, 16), draw(2, 4, 9)),
        "bf16": (draw(2, 9, 3, 2, 16, dtype=LOW), draw(2, 4, 9)),
        "strided": (draw(2, 3, 2, 9, 16).permute(0, 3, 1, 2, 4), draw(9, 4, 2).permute(2, 1, 0)),
        "empty": (draw(0, 9, 3, 2, 16), draw(0, 4, 9)),
        "no weights": (draw(2, 9, 3, 2, 16), draw(2, 0, 9)),
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


@pytest.mark.parametrize(("name", "case", "backend"), cases(CALLS))
@pytest.mark.slow
def test_schema_and_fake(name: str, case: str, backend: str) -> None:
    opcheck(name, CALLS[name][case], backend)
