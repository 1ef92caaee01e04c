"""The naive implementation and the checks, on a tiny tower of open_clip's own class."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer

import clipfast
from benchmarks import cases, naive
from benchmarks.measuring import WrongResult, compare, require


@pytest.fixture(scope="module", params=[None, 0.3], ids=["plain", "layer_scale"])
def visual(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    tower = VisionTransformer(
        image_size=32,
        patch_size=8,
        width=48,
        layers=3,
        heads=4,
        mlp_ratio=2.0,
        output_dim=20,
        ls_init_value=request.param,
    ).eval()
    cases.randomize(tower)
    return tower


@pytest.fixture(scope="module")
def images(visual: Any) -> torch.Tensor:
    return cases.noise(visual, 3)


@pytest.mark.parametrize("spatial", [True, False])
def test_the_naive_terms_add_up_to_the_modules_embedding(visual: Any, images: torch.Tensor, spatial: bool) -> None:
    result = naive.decompose(visual, images, spatial=spatial)
    with torch.no_grad():
        wanted = visual(images)
    assert result.attentions.shape == ((3, 3, 17, 4, 20) if spatial else (3, 3, 4, 20))
    assert result.mlps.shape == (3, 4, 20)
    assert cases.difference(result.embedding, wanted) < 1e-5
    assert cases.difference(result.heads().sum((1, 2)) + result.mlps.sum(1), cases.unit(wanted)) < 1e-6


def test_naive_equals_clipfast(visual: Any, images: torch.Tensor) -> None:
    model = clipfast.wrap(visual)
    found, tokens = cases.all_tokens(model, images)
    require(cases.against_naive(found, tokens, naive.decompose(visual, images)))
    found, heads = cases.heads_only(model, images)
    require(cases.against_naive(found, heads, naive.decompose(visual, images, spatial=False)))
    with torch.no_grad():
        require(cases.against_plain(found, heads, visual(images)))


def test_maps_are_the_naive_tokens_towards_texts(visual: Any, images: torch.Tensor) -> None:
    texts = cases.unit_texts(20, count=5)
    found, _ = cases.explain(clipfast.wrap(visual), images, texts)
    tokens = naive.decompose(visual, images).attentions  # [B, L, N, H, D]
    assert cases.relative(found.maps, tokens.sum((1, 3)) @ texts.T) < 1e-5


def test_the_gate_blocks_a_wrong_decomposition(visual: Any, images: torch.Tensor) -> None:
    model = clipfast.wrap(visual)
    with torch.no_grad():
        plain = visual(images)
    wanted = naive.decompose(visual, images)
    found, tokens = cases.all_tokens(model, images)
    timed: list[str] = []

    def blocked(checks: list[cases.Check]) -> None:
        with pytest.raises(WrongResult):
            compare(lambda: timed.append("a"), lambda: timed.append("b"), lambda: checks, count=1)

    heads = found.heads()
    blocked(cases.against_plain(found, heads + 1e-4, plain))
    blocked(cases.against_plain(replace(found, embedding=found.embedding.roll(1, 0)), heads, plain))
    blocked(cases.against_plain(replace(found, mlps=found.mlps * 1.01), heads, plain))
    blocked(cases.against_naive(found, tokens.roll(1, 2), wanted))  # tokens in the wrong places: every sum is right
    blocked(cases.against_naive(found, tokens[:, :, 1:], wanted))
    assert not timed


def test_cases_are_reproducible_and_not_trivial() -> None:
    texts = cases.unit_texts(8)
    assert torch.equal(texts, cases.unit_texts(8))
    assert cases.difference(texts.norm(dim=-1), torch.ones(len(texts))) < 1e-6
    visual = torch.nn.LayerNorm(16)
    cases.randomize(visual)
    assert visual.bias.abs().min() > 0
    assert (visual.weight - 1).abs().min() > 0
