"""``rotate``, ``linear_unrounded``, carried biases and rows in float8: the definitions in numbers anyone can verify."""

import torch
from torch import Tensor

from clipfast.kernels import reference


def exactly(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# One image and token, two parts of one head: (1, 2, 3, 4) and ten times as much.
X = exactly([[[[[1, 2, 3, 4]], [[10, 20, 30, 40]]]]])
COS, SIN = exactly([[[1, 10, 100, 1000]]]), exactly([[[2, 20, 200, 2000]]])


def test_pairs_half_a_head_apart_are_rotated() -> None:
    """Turned: (−3, −4, 1, 2)."""
    expected = exactly([1 - 6, 20 - 80, 300 + 200, 4000 + 4000])
    have = reference.rotate(X, COS, SIN, True)
    assert torch.equal(have, torch.stack([expected, 10 * expected]).view_as(X))


def test_pairs_of_neighbours_are_rotated() -> None:
    """Turned: (−2, 1, −4, 3)."""
    expected = exactly([1 - 4, 20 + 20, 300 - 800, 4000 + 6000])
    have = reference.rotate(X, COS, SIN, False)
    assert torch.equal(have, torch.stack([expected, 10 * expected]).view_as(X))


def test_angles_are_those_of_the_head_and_the_token() -> None:
    """Two heads and two tokens, each rotated by a number of its own."""
    x = torch.ones(1, 2, 1, 2, 2, dtype=torch.float64)
    cos = exactly([[[1, 1], [2, 2]], [[3, 3], [4, 4]]])  # [head, token, entry]
    have = reference.rotate(x, cos, torch.zeros_like(cos), True)
    assert have[0, :, 0, :, 0].tolist() == [[1, 3], [2, 4]]


def test_a_layer_of_few_rows() -> None:
    """(1, 2) through ((1, 1), (0, −1)) and (0, 2): (3, 0), in float32 for 16 bits."""
    x, weight, bias = exactly([[1, 2]]), exactly([[1, 1], [0, -1]]), exactly([0, 2])
    assert torch.equal(reference.linear_unrounded(x, weight, bias), exactly([[3, 0]]))
    low = reference.linear_unrounded(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert torch.equal(low, torch.tensor([[3.0, 0.0]]))
    assert low.dtype == torch.float32


def test_a_carried_bias_is_normed_and_not_added() -> None:
    """(10, 2) + (4, 4): mean 10, variance 16, with ε = 9 a deviation of 5; (4/5, −4/5)·(10, 5) + (1, 2)."""
    stream, normed = reference.add_layer_norm(
        exactly([[10, 2]]), None, exactly([10, 5]), exactly([1, 2]), 9.0, exactly([4, 4])
    )
    assert torch.equal(stream, exactly([[10, 2]]))
    assert torch.allclose(normed, exactly([[9, -2]]))


def test_rows_in_float8() -> None:
    """The largest number of a row is 448, the largest of float8; a row of zeros has the scale 1."""
    values, scale = reference.quantize_rows(torch.tensor([[896.0, -448.0, 2.0], [0.0, 0.0, 0.0]]))
    assert scale.tolist() == [2, 1]
    assert values.view(torch.float8_e4m3fn).float().tolist() == [[448, -224, 1], [0, 0, 0]]
    weight, weight_scale = reference.quantize_rows(torch.tensor([[224.0, 112.0, 0.5]]))
    assert weight_scale.tolist() == [0.5]
    have = reference.scaled_linear(values, scale, weight, weight_scale, torch.tensor([3.0]))
    assert have.tolist() == [[896 * 224 - 448 * 112 + 2 * 0.5 + 3], [3]]
