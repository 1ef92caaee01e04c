"""Two tokens, numbers anyone can verify: the definitions themselves, and every operation as it is called."""

from math import log, sqrt
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


# One image, two tokens, one head of width 1: q = (0, ln 3), k = (1, 0), v = (4, 8).
QKV = exactly([[[[[0]], [[1]], [[4]]], [[[log(3)]], [[0]], [[8]]]]])


@EITHER
def test_attention(module: ModuleType) -> None:
    """Query 0 has equal logits: (1/2, 1/2) → 6. Query 1 has logits (ln 3, 0): (3/4, 1/4) → 5."""
    out, alpha = module.attention(QKV, "cls")
    assert error(out, exactly([[[[6]], [[5]]]])) <= FLOAT64
    assert error(alpha, exactly([[[1 / 2, 1 / 2]]])) <= FLOAT64
    assert error(module.attention(QKV, "mean")[1], exactly([[[3 / 4, 1 / 4]]])) <= FLOAT64


@EITHER
def test_logits_are_divided_by_the_root_of_head_dim(module: ModuleType) -> None:
    """head_dim 4: q·k = 2·ln 3 becomes ln 3."""
    qkv = torch.zeros(1, 2, 3, 1, 4, dtype=torch.float64)
    qkv[0, 0, 0, 0] = exactly([2 * log(3), 0, 0, 0])
    qkv[0, 0, 1, 0] = exactly([1, 5, 5, 5])
    assert error(module.attention(qkv, "cls")[1], exactly([[[3 / 4, 1 / 4]]])) <= FLOAT64


@EITHER
def test_query_row_from_tokens(module: ModuleType) -> None:
    """Tokens (1, 2) and (3, 4), keys x₁/2 = 1/2 and 3/2, q = −ln 3: (3/4, 1/4); values x₂ + 10 = 12 and 14: 12.5."""
    z, alpha = module.query_row_from_tokens(
        exactly([[[-log(3)]]]), exactly([[[1, 2], [3, 4]]]), exactly([[[0.5, 0]]]), exactly([[[0, 1]]]), exactly([[10]])
    )
    assert error(alpha, exactly([[[3 / 4, 1 / 4]]])) <= FLOAT64
    assert error(z, exactly([[[12.5]]])) <= FLOAT64


# One image, two tokens, two heads of width 1, two texts.
ALPHA = exactly([[[1 / 2, 1 / 2], [1 / 4, 3 / 4]]])
VALUE = exactly([[[[2], [4]], [[6], [8]]]])
BASIS = exactly([[[1, 10]], [[1, -1]]])
PER_HEAD = exactly([[[[1, 10], [3, 30]], [[1, -1], [6, -6]]]])  # [image, head, token, text]: α·v·U


@EITHER
def test_head_maps_and_token_contributions(module: ModuleType) -> None:
    assert error(module.head_maps(ALPHA, VALUE, BASIS), PER_HEAD) <= FLOAT64
    assert error(module.token_contributions(ALPHA, VALUE, BASIS), PER_HEAD.transpose(1, 2)) <= FLOAT64


def test_text_maps_sum_over_heads() -> None:
    summed = exactly([[[2, 9], [9, 24]]])
    assert error(reference.text_maps(ALPHA, VALUE, BASIS), summed) <= FLOAT64
    out = exactly([[[100, 100], [100, 100]]])
    assert error(ops.text_maps(ALPHA, VALUE, BASIS, out), summed + 100) <= FLOAT64


@EITHER
def test_layer_statistics(module: ModuleType) -> None:
    """(14, 6): mean 10, variance 16, biased; with ε = 9 the deviation is 5."""
    mean, std = module.layer_statistics(exactly([[14, 6], [1, 1]]), 9.0)
    assert error(mean, exactly([10, 1])) <= FLOAT64
    assert error(std, exactly([5, 3])) <= FLOAT64
    assert error(module.layer_statistics(exactly([[3, 1, 1, 3]]), 0.5)[1], exactly([sqrt(1.5)])) <= FLOAT64
