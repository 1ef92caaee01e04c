"""Maps and contributions as ``torch.library`` ops with unusual arguments: some heads, low precision, nothing at all."""

import pytest
import torch
from opchecking import Calls, cases, draw, opcheck
from torch import Tensor


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(2, 17, 3, 2, 20, dtype=dtype)[:, :, 2]


LOW = torch.bfloat16
EMPTY = draw(0, 2, 17), draw(0, 17, 2, 20)  # opcheck itself fails on a slice of nothing
ALPHA, SOME, NONE = draw(2, 2, 17), torch.tensor([1, 0]), torch.zeros(0, dtype=torch.int32)
CALLS: Calls = {
    "text_maps": {
        "some heads": (ALPHA, values(), draw(2, 20, 5), draw(2, 17, 5), SOME),
        "no heads": (ALPHA, values(), draw(2, 20, 5), draw(2, 17, 5), NONE),
        "bf16": (ALPHA, values(dtype=LOW), draw(2, 20, 5), draw(2, 17, 5), None),
        "no images": (*EMPTY, draw(2, 20, 5), draw(0, 17, 5), None),
        "strided": (draw(2, 17, 2).transpose(1, 2), values(), draw(2, 5, 20).transpose(1, 2), draw(2, 17, 5), None),
    },
    "text_maps_from_tokens": {
        "bf16": (
            ALPHA,
            *(draw(*shape, dtype=LOW) for shape in ((2, 17, 30), (2, 20, 30), (2, 20))),
            draw(2, 20, 5),
            draw(2, 17, 5),
        ),
        "no images": (EMPTY[0], draw(0, 17, 30), draw(2, 20, 30), draw(2, 20), draw(2, 20, 5), draw(0, 17, 5)),
    },
    "layered_text_maps": {
        "some heads": (ALPHA[:, None], [values()], draw(1, 2, 20, 5), SOME),
        "no heads": (ALPHA[:, None], [values()], draw(1, 2, 20, 5), NONE),
        "apart, bf16": (draw(2, 3, 2, 17), [values(dtype=LOW) for _ in range(3)], draw(3, 2, 20, 5), None),
        "weights in bf16": (draw(2, 1, 2, 17, dtype=LOW), [values(dtype=LOW)], draw(1, 2, 20, 5, dtype=LOW), None),
        "no layers": (draw(2, 0, 2, 17), [], draw(0, 2, 20, 5), None),
        "no images": (EMPTY[0][:, None], [EMPTY[1]], draw(1, 2, 20, 5), None),
    },
    "head_maps": {
        "bf16": (ALPHA, values(dtype=LOW), draw(2, 20, 5)),
        "weights in bf16": (ALPHA.to(LOW), values(dtype=LOW), draw(2, 20, 5, dtype=LOW)),
        "no images": (*EMPTY, draw(2, 20, 5)),
        "no texts": (ALPHA, values(), draw(2, 20, 0)),
    },
    "token_contributions": {
        "alone": (ALPHA, values(), draw(2, 20, 5), None, None),
        "shifted": (ALPHA, values(), draw(2, 20, 5), draw(5, 2).T, None),
        "scaled": (ALPHA, values(), draw(2, 20, 5), None, draw(2)),
        "bf16": (ALPHA, values(dtype=LOW), draw(2, 20, 5, dtype=LOW), draw(2, 5), draw(2)),
        "no images": (*EMPTY, draw(2, 20, 5), draw(0, 5), draw(0)),
    },
}


@pytest.mark.parametrize(("name", "case", "backend"), cases(CALLS))
@pytest.mark.slow
def test_schema_and_fake(name: str, case: str, backend: str) -> None:
    opcheck(name, CALLS[name][case], backend)
