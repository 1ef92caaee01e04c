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


NAMES = ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14")


@pytest.mark.parametrize("name", [*NAMES[:3], pytest.param(NAMES[3], marks=pytest.mark.slow)])
@pytest.mark.slow
def test_float32(name: str) -> None:
    visual = named_tower(name)
    x = pixels(visual, 1)
    contributions = wrap(visual).decompose(x)
    assert contributions.max_error() <= SUM_FLOAT32
    with torch.no_grad():
        assert relative_error(contributions.embedding, visual(x)) <= EMBEDDING_FLOAT32


@pytest.mark.parametrize("name", [*NAMES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[2:])])
def test_bfloat16(name: str) -> None:
    visual = named_tower(name, dtype=torch.bfloat16)
    contributions = wrap(visual).decompose(pixels(visual, 1, dtype=torch.bfloat16))
    assert contributions.embedding.dtype == torch.bfloat16
    assert contributions.codes.dtype == contributions.mlps.dtype == torch.float32
    assert contributions.max_error() <= SUM_BFLOAT16


# Two forwards that round at different places drift apart with depth: two layers, one of them with every token and the
# last with the class token alone, are every branch there is.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_bfloat16_gives_the_models_own_embedding(name: str) -> None:
    visual = named_tower(name, layers=2, dtype=torch.bfloat16)
    x = pixels(visual, 1, dtype=torch.bfloat16)
    contributions = wrap(visual).decompose(x)
    with torch.no_grad():
        assert relative_error(contributions.embedding, visual(x)) <= EMBEDDING_BFLOAT16
