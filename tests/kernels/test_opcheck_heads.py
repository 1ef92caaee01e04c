"""``moments`` and ``span`` as ``torch.library`` ops with unusual arguments: strides, dtypes, early ends, nothing."""

import pytest
import torch
from opchecking import Calls, cases, draw, opcheck


def sums(groups: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(groups, columns).double(), draw(groups, columns, columns).double()


CALLS: Calls = {
    "moments": {
        "bf16": (*(draw(*shape, dtype=torch.bfloat16) for shape in ((3, 2, 20), (3, 3), (2, 23))), *sums(2, 23)),
        "strided": (draw(20, 2, 3).permute(2, 1, 0), draw(3, 3).T, draw(23, 2).T, *sums(2, 23)),
        "no images": (draw(0, 2, 20), draw(0, 3), draw(2, 23), *sums(2, 23)),
        "no heads": (draw(3, 0, 20), draw(3, 3), draw(0, 23), *sums(0, 23)),
    },
    "span": {
        "strided": (draw(5, 20).T.expand(2, -1, -1), draw(5, 5, 2).permute(2, 1, 0), 3, 1e-10),
        "more than there is": (draw(2, 3, 5), draw(2, 5, 5), 7, 1e-10),
        "no variance": (draw(2, 9, 5), torch.zeros(2, 5, 5), 4, 1e-10),
        "no heads": (draw(0, 9, 5), draw(0, 5, 5), 4, 1e-10),
    },
}


@pytest.mark.parametrize(("name", "case", "backend"), cases(CALLS))
@pytest.mark.slow
def test_schema_and_fake(name: str, case: str, backend: str) -> None:
    opcheck(name, CALLS[name][case], backend)
