"""Towers at the sizes they are trained at, with random weights: one image each, in float32.

EVA02-L and SO400M take a minute and 4 GB more and are left out unless ``CLIPFAST_FULL_SIZES=1`` is set::

    CLIPFAST_FULL_SIZES=1 python -m pytest tests/towers/test_full_sizes.py
"""

import gc
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import open_clip
import pytest
import timm
import torch
from measures import relative_error
from timm_small import pixels, randomised
from tolerances import EMBEDDING_FLOAT32, SUM_FLOAT32
from torch import nn

import clipfast

pytestmark = pytest.mark.slow

large = pytest.mark.skipif(
    os.environ.get("CLIPFAST_FULL_SIZES") != "1", reason="a minute and 4 GB: set CLIPFAST_FULL_SIZES=1"
)


class Shape(NamedTuple):
    """What a tower of this size has."""

    layers: int
    width: int
    heads: int
    head_dim: int
    tokens: int


SHAPES = {
    "vit_base_patch16_siglip_224": Shape(12, 768, 12, 64, 196),
    "vit_so400m_patch14_siglip_384": Shape(27, 1152, 16, 72, 729),
    "eva02_large_patch14_224": Shape(24, 1024, 16, 64, 257),
    "vit_base_patch14_reg4_dinov2": Shape(12, 768, 12, 64, 1374),
    "vit_pe_core_base_patch16_224": Shape(12, 768, 12, 64, 197),
}
LARGE = ("vit_so400m_patch14_siglip_384", "eva02_large_patch14_224")


@torch.no_grad()
def test_a_resnet_of_full_size() -> None:
    module: Any = randomised(open_clip.create_model("RN50", pretrained=None, load_weights=False).visual).eval()
    model = clipfast.wrap(module)
    assert (model.tower.width, model.tower.heads, model.tower.tokens) == (2048, 32, 50)
    images = pixels(model.tower.image_size, count=1)
    contributions = model.decompose(images)
    assert relative_error(contributions.embedding, module(images)) <= EMBEDDING_FLOAT32
    assert contributions.max_error() <= SUM_FLOAT32


@pytest.fixture(params=[pytest.param(name, marks=large) if name in LARGE else name for name in SHAPES])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module]]:
    """A name and its model, which is freed before the next is made."""
    module = randomised(timm.create_model(request.param)).eval()
    yield request.param, module
    del module
    gc.collect()


@torch.no_grad()
def test_a_tower_of_full_size(case: tuple[str, Any]) -> None:
    name, module = case
    model = clipfast.wrap(module)
    tower = model.tower
    assert Shape(tower.layers, tower.width, tower.heads, tower.head_dim, tower.tokens) == SHAPES[name]
    images = pixels(tower.image_size, count=1)
    own = module(images)
    depths = ("pool", "all") if name == "vit_base_patch16_siglip_224" else (None,)
    for depth in depths:
        contributions = model.decompose(images, depth=depth)
        assert relative_error(contributions.embedding, own) <= EMBEDDING_FLOAT32
        assert contributions.max_error() <= SUM_FLOAT32
