"""What the definitions say in cases that one token, one head or one width cannot tell apart, by hand."""

from math import log, sqrt

import pytest
import torch
from measures import error
from tolerances import FLOAT64
from torch import Tensor

from clipfast.kernels import reference


def float64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sums_are_in_float32_unless_the_operands_are_in_float64() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert reference.accumulation_dtype(dtype) == torch.float32
    assert reference.accumulation_dtype(torch.float64) == torch.float64


def test_the_mean_row_is_over_queries_not_heads() -> None:
    """Logits of queries 1 and 2: (ln 3, 0, 0) and 0 for head 0: (3/5, 1/5, 1/5) and 1/3 each; head 1: all 1/3."""
    qkv = torch.zeros(1, 3, 3, 2, 4, dtype=torch.float64)
    qkv[0, 1, 0, 0, 0], qkv[0, 0, 1, 0, 0] = 2 * log(3), 1
    qkv[0, :, 2, 0, 0] = float64([15, 30, 45])
    out, alpha = reference.attention(qkv, "mean")
    assert error(alpha, float64([[[7 / 15, 4 / 15, 4 / 15], [1 / 3, 1 / 3, 1 / 3]]])) <= FLOAT64
    assert error(out[0, :, 0, 0], float64([30, 24, 30])) <= FLOAT64
    assert not out[0, :, 1].any()


def test_the_mean_row_in_a_batch_of_two() -> None:
    qkv = torch.zeros(2, 3, 3, 1, 1, dtype=torch.float64)
    qkv[1, 1, 0], qkv[1, 0, 1] = log(3), 1
    alpha = reference.attention(qkv, "mean")[1]
    assert error(alpha, float64([[[1 / 3, 1 / 3, 1 / 3]], [[7 / 15, 4 / 15, 4 / 15]]])) <= FLOAT64
    assert error(reference.attention(qkv)[1], float64([[[1 / 3, 1 / 3, 1 / 3]]] * 2)) <= FLOAT64


def test_weighted_rows_are_summed_over_queries() -> None:
    """Head 0: row 0 is (3/4, 1/4) (logits 2·ln 3/√4 and 0), row 1 (1/2, 1/2); head 1: row 0 is equal, row 1 (1/4, 3/4).

    Weights (8, −4) and (0, 4) per query: 8·(3/4, 1/4) − 4·(1/2, 1/2) = (4, 0) and 8·(1/2, 1/2) − 4·(1/4, 3/4) = (3, 1).
    """
    qkv = torch.zeros(1, 2, 3, 2, 4, dtype=torch.float64)
    qkv[0, 0, 0, 0, 0], qkv[0, 0, 1, 0, 0] = 2 * log(3), 1
    qkv[0, 1, 0, 1, 3], qkv[0, 1, 1, 1, 3] = 1, 2 * log(3)
    rows = reference.weighted_rows(qkv, float64([[[8, -4], [0, 4]]]))
    assert error(rows, float64([[[[4, 0], [3, 1]], [[2, 2], [1, 3]]]])) <= FLOAT64


def test_rotate_turns_pairs() -> None:
    """A quarter turn, (a, b) to (−b, a): of halves (1, 3) and (2, 4), of neighbours (1, 2) and (3, 4)."""
    x = float64([[[[[1, 2, 3, 4]]]]])
    quarter, none = torch.ones(1, 1, 4, dtype=torch.float64), torch.zeros(1, 1, 4, dtype=torch.float64)
    assert reference.rotate(x, none, quarter, True).flatten().tolist() == [-3, -4, 1, 2]
    assert reference.rotate(x, none, quarter, False).flatten().tolist() == [-2, 1, -4, 3]
    assert torch.equal(reference.rotate(x, quarter, none, False), x)


def test_every_token_and_head_has_its_angles() -> None:
    """Two tokens, two heads, cosines alone: every row times its own number; one table is for both heads."""
    x, cos = torch.ones(1, 2, 1, 2, 2, dtype=torch.float64), float64([[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    rotated = reference.rotate(x, cos, torch.zeros_like(cos), True)
    assert rotated[0, :, 0].tolist() == [[[1, 2], [5, 6]], [[3, 4], [7, 8]]]
    shared = reference.rotate(x, cos[:1], torch.zeros_like(cos[:1]), True)
    assert shared[0, :, 0].tolist() == [[[1, 2], [1, 2]], [[3, 4], [3, 4]]]


def test_query_row_divides_logits_by_the_root_of_head_dim() -> None:
    """Head 0: 2·ln 3/√4 and 0; head 1: 0 and 4·ln 3/√4."""
    query, key = torch.zeros(1, 2, 4, dtype=torch.float64), torch.zeros(1, 2, 2, 4, dtype=torch.float64)
    query[0, :, 0] = 2 * log(3)
    key[0, 0, 0, 0], key[0, 1, 1, 0] = 1, 2
    value = torch.zeros(1, 2, 2, 4, dtype=torch.float64)
    value[0, :, :, 3] = float64([[4, 10], [8, 20]])
    z, alpha = reference.query_row(query, key, value)
    assert error(alpha, float64([[[3 / 4, 1 / 4], [1 / 10, 9 / 10]]])) <= FLOAT64
    assert error(z, float64([[[0, 0, 0, 5], [0, 0, 0, 19]]])) <= FLOAT64


def test_text_maps_from_tokens() -> None:
    """v = x₁ + x₂ + 1 = 4 and 8 for head 0, x₁ − 1 = 0 and 2 for head 1."""
    maps = reference.text_maps_from_tokens(
        alpha=float64([[[1, 2], [3, 4]]]),
        tokens=float64([[[1, 2], [3, 4]]]),
        value_weight=float64([[[1, 1]], [[1, 0]]]),
        value_bias=float64([[1], [-1]]),
        text_basis=float64([[[1, 10]], [[100, 0]]]),
    )
    assert error(maps, float64([[[4, 40], [16 + 800, 160]]])) <= FLOAT64


def test_moments_of_three_images_of_two_heads() -> None:
    """Codes of width 1 and two shared entries, about (1, 0, 0) and (0, 0, 1)."""
    total, second = reference.moments(
        float64([[[1], [2]], [[3], [4]], [[5], [6]]]),
        float64([[1, 0], [0, 1], [2, 2]]),
        float64([[1, 0, 0], [0, 0, 1]]),
    )
    assert error(total, float64([[6, 3, 3], [12, 3, 0]])) == 0
    assert (
        error(
            second,
            float64([[[20, 8, 10], [8, 5, 4], [10, 4, 5]], [[56, 14, 4], [14, 5, 1], [4, 1, 2]]]),
        )
        == 0
    )


AXES, FALLING = float64([[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]), float64([[[4, 0, 0], [0, 2, 0], [0, 0, 1]]])


@pytest.mark.parametrize(
    ("floor", "picks"),
    [
        (0.1, [0, 1, -1]),  # the third is a quarter of the second, a sixteenth of the first
        (0.05, [0, 1, 2]),
        (0.25, [0, -1, -1]),  # the second is just that share
    ],
)
def test_the_floor_is_a_share_of_the_first_variance(floor: float, picks: list[int]) -> None:
    """Variances 16, 4 and 1."""
    result, variance, _ = reference.span(AXES, FALLING, 3, floor)
    assert result.tolist() == [picks]
    assert error(variance, float64([[[16, 4, 1][pick] if pick >= 0 else 0 for pick in picks]])) == 0


def test_no_variance_gives_no_picks() -> None:
    picks, variance, directions = reference.span(AXES, torch.zeros_like(FALLING), 2, 1e-10)
    assert picks.tolist() == [[-1, -1]]
    assert picks.dtype == torch.long
    assert not variance.any()
    assert not directions.any()


def test_every_head_has_its_own_texts_and_covariance() -> None:
    """Head 0 as above, head 1 with its axes turned round."""
    texts, factor = torch.cat([AXES, AXES]), torch.cat([FALLING, FALLING.flip(1, 2)])
    picks, variance, directions = reference.span(texts, factor, 2, 1e-10)
    assert picks.tolist() == [[0, 1], [2, 1]]
    assert variance.tolist() == [[16, 4], [16, 4]]
    assert torch.equal(directions, torch.stack([AXES[0, [0, 1]], AXES[0, [2, 1]]]))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_texts_are_equal_within_rounding_of_any_scale(scale: float) -> None:
    """Of lengths 1 and 1 + 2ε the first is taken, of 1 and 1.0001 the longer one."""
    factor = scale * float64([[[1]]])
    epsilon = torch.finfo(torch.float64).eps
    assert reference.span(float64([[[1], [1 + 2 * epsilon]]]), factor, 1, 1e-10)[0].tolist() == [[0]]
    assert reference.span(float64([[[1], [1.0001]]]), factor, 1, 1e-10)[0].tolist() == [[1]]


def test_texts_are_not_changed() -> None:
    texts = AXES.clone()
    reference.span(texts, FALLING, 3, 1e-10)
    assert torch.equal(texts, AXES)


def test_add_layer_norm_returns_the_sum_and_its_norm() -> None:
    """(10, 2) + (4, 4) = (14, 6) and (1, 7): means 10 and 4, deviations √(16 + 9) and √(9 + 9)."""
    x, delta = float64([[10, 2], [1, 7]]), float64([[4, 4], [0, 0]])
    weight, bias = float64([10, 5]), float64([1, 2])
    total, norm = reference.add_layer_norm(x, delta, weight, bias, 9.0)
    assert torch.equal(total, float64([[14, 6], [1, 7]]))
    expected = float64([[9, -2], [1 - 30 / sqrt(18), 2 + 15 / sqrt(18)]])
    assert error(norm, expected) <= FLOAT64
    total, norm = reference.add_layer_norm(x + delta, None, weight, bias, 9.0)
    assert torch.equal(total, float64([[14, 6], [1, 7]]))
    assert error(norm, expected) <= FLOAT64
