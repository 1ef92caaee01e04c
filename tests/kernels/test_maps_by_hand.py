"""Maps over layers, of some heads, and shifted and scaled contributions: numbers anyone can verify."""

from types import ModuleType

import pytest
import torch
from measures import error
from tolerances import FLOAT64
from torch import Tensor

from clipfast.kernels import ops, reference

EITHER = pytest.mark.parametrize("module", [reference, ops], ids=["definition", "called"])


def exactly(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# One image, two tokens, two layers of two heads of width 1, two texts. Weights and values are small integers.
ALPHA = exactly([[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]])  # [image, layer, head, token]
FIRST, LAST = exactly([[[[1], [1]], [[2], [0]]]]), exactly([[[[1], [2]], [[0], [1]]]])  # [image, token, head, 1]
BASIS = exactly([[[[1, 0]], [[0, 1]]], [[[1, 1]], [[10, -10]]]])  # [layer, head, 1, text]
# alpha·v of the four (layer, head) pairs: (1, 4), (3, 0), (5, 0), (14, 8) for the two tokens.


@EITHER
@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (None, [[1 + 5 + 140, 3 + 5 - 140], [4 + 80, -80]]),
        ([0], [[1, 0], [4, 0]]),
        ([3, 1], [[140, 3 - 140], [80, -80]]),
        ([], [[0, 0], [0, 0]]),
    ],
)
def test_layered_text_maps(module: ModuleType, pairs: list[int] | None, expected: list[list[int]]) -> None:
    heads = None if pairs is None else torch.tensor(pairs, dtype=torch.long)
    assert error(module.layered_text_maps(ALPHA, [FIRST, LAST], BASIS, heads), exactly([expected])) <= FLOAT64


def test_text_maps_of_one_head_are_added() -> None:
    out = exactly([[[1000, 1000], [1000, 1000]]])
    ops.text_maps(ALPHA[:, 1], LAST, BASIS[1], out, torch.tensor([1]))
    assert error(out, exactly([[[1140, 860], [1080, 920]]])) <= FLOAT64


@EITHER
def test_contributions_are_shifted_then_scaled(module: ModuleType) -> None:
    """Of the first layer's two heads the parts are (1, 0), (0, 3) for token 0 and (4, 0), (0, 0) for token 1."""
    shift, half = exactly([[10, 20]]), exactly([0.5])
    shifted = exactly([[[[11, 20], [10, 23]], [[14, 20], [10, 20]]]])
    given = ALPHA[:, 0], FIRST, BASIS[0]
    assert error(module.token_contributions(*given, shift), shifted) <= FLOAT64
    assert error(module.token_contributions(*given, shift, half), shifted / 2) <= FLOAT64
    parts = exactly([[[[0.5, 0], [0, 1.5]], [[2, 0], [0, 0]]]])
    assert error(module.token_contributions(*given, None, half), parts) <= FLOAT64


def test_text_maps_from_tokens() -> None:
    """Tokens (1, 2) and (3, 4); v = x₁ + x₂ + 1 = 4 and 8; alpha 1 and 2; U = (1, 10)."""
    out = exactly([[[0, 0], [1, 1]]])
    arguments = exactly([[[1, 2]]]), exactly([[[1, 2], [3, 4]]]), exactly([[[1, 1]]]), exactly([[1]])
    ops.text_maps_from_tokens(*arguments, exactly([[[1, 10]]]), out)
    assert error(out, exactly([[[4, 40], [17, 161]]])) <= FLOAT64
