"""``torch.compile(fullgraph=True)`` over ``Model.decompose``: one graph, the same numbers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import pixels, vision_tower
from measures import error
from tolerances import FLOAT32
from torch import nn

import clipfast
from clipfast import Contributions, Model

IMAGES = 3
TEXTS = 5
REQUESTS: dict[str, dict[str, Any]] = {
    "heads": {},
    "attention": {"attention": True},
    "maps": {"texts": True, "attention": True},
    "maps per head": {"texts": True, "maps": "per_head"},
    "tokens": {"tokens": True},
    "class token": {"class_token": True},
    "layers": {"layers": (-1, 0), "centring": "termwise"},
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def module() -> nn.Module:
    return vision_tower()


def tensors(result: Contributions) -> dict[str, torch.Tensor]:
    return result._tensors() | {"heads": result.heads(), "total": result.total()}


def same(have: Contributions, expected: Contributions) -> None:
    have_by_name, want_by_name = tensors(have), tensors(expected)
    assert have_by_name.keys() == want_by_name.keys()
    for name, tensor in want_by_name.items():
        assert error(have_by_name[name], tensor) <= FLOAT32, name
    assert have.layers == expected.layers
    assert have.max_error() <= FLOAT32


def arguments(request: dict[str, Any], model: Model) -> dict[str, Any]:
    features = torch.randn(TEXTS, model.tower.embed_dim, generator=torch.Generator().manual_seed(0))
    return request | ({"texts": features / features.norm(dim=1, keepdim=True)} if "texts" in request else {})


@pytest.mark.parametrize("what", REQUESTS)
@pytest.mark.slow
def test_one_graph_gives_the_same(module: nn.Module, what: str) -> None:
    model = clipfast.wrap(module)
    images, given = pixels(module, IMAGES), arguments(REQUESTS[what], model)
    compiled = torch.compile(model.decompose, fullgraph=True, backend="aot_eager")
    same(compiled(images, **given), model.decompose(images, **given))


def test_average_pooling_compiles() -> None:
    module = vision_tower(pool_type="avg", final_ln_after_pool=True)
    model = clipfast.wrap(module)
    images = pixels(module, IMAGES)
    compiled = torch.compile(model.decompose, fullgraph=True, backend="aot_eager")
    same(compiled(images, attention=True), model.decompose(images, attention=True))


@pytest.mark.slow
def test_other_batch_sizes_do_not_break_the_graph(module: nn.Module) -> None:
    model = clipfast.wrap(module)
    compiled = torch.compile(model.decompose, fullgraph=True, backend="aot_eager")
    for count in (2, 3, 5, 1):
        images = pixels(module, count)
        same(compiled(images, attention=True), model.decompose(images, attention=True))


@pytest.mark.slow
def test_weights_that_change_are_seen(module: nn.Module) -> None:
    model = clipfast.wrap(module)
    images = pixels(module, IMAGES)
    compiled = torch.compile(model.decompose, fullgraph=True, backend="aot_eager")
    before = compiled(images).heads()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
    after = compiled(images)
    assert error(after.heads(), before) > 100 * FLOAT32
    same(after, model.decompose(images))


@pytest.mark.slow
def test_the_default_compiler_gives_the_same(module: nn.Module) -> None:
    model = clipfast.wrap(module)
    images, given = pixels(module, IMAGES), arguments(REQUESTS["maps"], model)
    same(torch.compile(model.decompose, fullgraph=True)(images, **given), model.decompose(images, **given))


def test_strings_are_refused_with_the_way_out(module: nn.Module) -> None:
    model = clipfast.wrap(module)
    compiled = torch.compile(model.decompose, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"compiled code reads no strings: pass texts=model\.encode_text\(texts\)"):
        compiled(pixels(module, 1), texts=["a cat"])
