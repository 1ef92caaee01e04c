"""Naming heads from weights alone, against each ``W_VO`` written out."""

from typing import Any

import pytest
import torch
from builders import directions, vision_tower
from measures import error
from tolerances import FLOAT64
from torch import Tensor

import clipfast
from clipfast.analyses.weights import weight_spans, weight_textspan

WIDTH, HEAD_DIM = 32, 16


@pytest.fixture(scope="module")
def visual() -> Any:
    return vision_tower(seed=4, dtype=torch.float64)


def written_out(visual: Any, layer: int, head: int) -> Tensor:
    """What a head makes of each direction of a normalised token, ``[W, D]``."""
    block = visual.transformer.resblocks[layer]
    centre = torch.eye(WIDTH, dtype=torch.float64) - 1 / WIDTH
    rows = slice(2 * WIDTH + head * HEAD_DIM, 2 * WIDTH + (head + 1) * HEAD_DIM)
    values = block.attn.in_proj_weight[rows].T  # [W, E]
    out = block.attn.out_proj.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM].T  # [E, W]
    map_in, map_out = centre @ torch.diag(block.ln_1.weight), torch.diag(visual.ln_post.weight) @ visual.proj
    return (map_in @ values @ out @ map_out).detach()


def test_covariance_is_that_of_white_tokens(visual: Any) -> None:
    heads = [(0, 1), (2, 0), (-1, 1)]
    spans = weight_spans(clipfast.wrap(visual), heads)
    for at, (layer, head) in enumerate(heads):
        matrix = written_out(visual, layer % 3, head)
        half = spans.factor[at].T @ spans.axes[at]
        assert error(half.T @ half, matrix.T @ matrix) <= FLOAT64
        assert spans.ranks[at] == torch.linalg.matrix_rank(matrix) == HEAD_DIM
    assert error(spans.mean, torch.zeros(3, 20)) == 0


@pytest.mark.parametrize("method", ["greedy", "omp"])
def test_texts_are_those_of_the_singular_vectors(visual: Any, method: Any) -> None:
    texts = directions(90, 20, dtype=torch.float64)
    result = weight_textspan(clipfast.wrap(visual), texts, 8, method=method)
    assert list(result) == [(layer, head) for layer in range(3) for head in range(2)]
    for (layer, head), span in result.items():
        matrix = written_out(visual, layer, head)
        expected = clipfast.textspan(torch.cat([matrix, -matrix]), texts, 8, method=method)  # their mean is zero
        assert span.picks == expected.picks
        assert error(span.explained, expected.explained) <= FLOAT64


def test_a_rank_keeps_the_largest_singular_values(visual: Any) -> None:
    (rank,) = weight_spans(clipfast.wrap(visual), [(1, 0)], rank=3).ranks
    assert rank == 3
    spans = weight_spans(clipfast.wrap(visual), [(1, 0)], rank=3)
    values = torch.linalg.svdvals(written_out(visual, 1, 0))
    assert error(spans.factor.square().sum(), values[:3].square().sum()) <= FLOAT64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": [(3, 0)]}, "layer 3 does not exist"),
        ({"heads": [(0, 2)]}, "head 2 does not exist"),
        ({"rank": 0}, "rank is 0"),
        ({"size": 0}, "size is 0"),
        ({"method": "somp"}, "without images choose greedy or omp"),
    ],
)
def test_what_does_not_fit(visual: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(clipfast.InputError, match=message):
        weight_textspan(clipfast.wrap(visual), directions(9, 20), **{"size": 2, **arguments})
