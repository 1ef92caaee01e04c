"""The real shapes: widths, heads, tokens and depths of the models people use, with random weights."""

import os
from collections.abc import Iterator

import pytest
import torch
from builders import named_tower, pixels
from measures import relative_error
from tolerances import EMBEDDING_BFLOAT16, EMBEDDING_FLOAT32, SUM_BFLOAT16, SUM_FLOAT32

from clipfast import wrap


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


# H-14 whole is 630 million weights; four of its 32 layers keep its width 1280, head_dim 80 and 257 tokens.
SINGLE = [("ViT-B-32", 12), ("ViT-B-16", 12), ("ViT-L-14", 24), ("ViT-H-14", 4)]

# A CPU without bfloat16 arithmetic emulates it, at a third of the speed of float32: two layers, one of them with every
# token and the last with the class token alone, are every branch there is.
HALF = [("ViT-B-32", 2), ("ViT-B-16", 2), ("ViT-L-14", 2), ("ViT-H-14", 2)]


@pytest.mark.parametrize(("name", "layers"), SINGLE)
def test_float32(name: str, layers: int) -> None:
    visual = named_tower(name, layers=layers)
    x = pixels(visual, 1)
    found = wrap(visual).decompose(x)
    assert found.check() <= SUM_FLOAT32
    with torch.no_grad():
        assert relative_error(found.embedding, visual(x)) <= EMBEDDING_FLOAT32


@pytest.mark.parametrize(("name", "layers"), HALF)
def test_bfloat16(name: str, layers: int) -> None:
    visual = named_tower(name, layers=layers, dtype=torch.bfloat16)
    x = pixels(visual, 1, dtype=torch.bfloat16)
    found = wrap(visual).decompose(x)
    assert found.embedding.dtype == torch.bfloat16
    assert found.codes.dtype == found.mlps.dtype == torch.float32
    assert found.check() <= SUM_BFLOAT16
    with torch.no_grad():
        assert relative_error(found.embedding, visual(x)) <= EMBEDDING_BFLOAT16
