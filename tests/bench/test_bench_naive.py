"""The naive implementation and the checks, on a tiny open_clip tower."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer

import clipfast
from clipfast.bench import naive
from clipfast.bench.checks import against_naive, against_plain, difference, relative
from clipfast.bench.inputs import noise, randomize, unit, unit_texts
from clipfast.bench.measuring import Check, WrongResult, compare, require
from clipfast.bench.outputs import explain, heads_only


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
    randomize(tower)
    return tower


def all_tokens(model: clipfast.Model, images: torch.Tensor) -> tuple[clipfast.Contributions, torch.Tensor]:
    """Contributions and those of all tokens, ``[B, L, N, H, D]``."""
    contributions = model.decompose(images, attention=True, tokens=True)
    return contributions, torch.stack([contributions.tokens(layer) for layer in contributions.layers], 1)


@pytest.fixture(scope="module")
def images(visual: Any) -> torch.Tensor:
    return noise(visual, 3)


@pytest.mark.parametrize("spatial", [True, False])
def test_naive_terms_sum_to_the_modules_embedding(visual: Any, images: torch.Tensor, spatial: bool) -> None:
    result = naive.decompose(visual, images, spatial=spatial)
    with torch.no_grad():
        expected = visual(images)
    assert result.attentions.shape == ((3, 3, 17, 4, 20) if spatial else (3, 3, 4, 20))
    assert result.start_and_mlps.shape == (3, 4, 20)
    assert difference(result.embedding, expected) < 1e-5
    assert difference(result.heads().sum((1, 2)) + result.start_and_mlps.sum(1), unit(expected)) < 1e-6


def test_naive_equals_clipfast(visual: Any, images: torch.Tensor) -> None:
    model = clipfast.wrap(visual)
    contributions, tokens = all_tokens(model, images)
    require(against_naive(contributions, tokens, naive.decompose(visual, images)))
    contributions, heads = heads_only(model, images)
    require(against_naive(contributions, heads, naive.decompose(visual, images, spatial=False)))
    with torch.no_grad():
        require(against_plain(contributions, heads, visual(images)))


def test_maps_equal_the_naive_tokens_times_texts(visual: Any, images: torch.Tensor) -> None:
    texts = unit_texts(20, count=5)
    contributions, _ = explain(clipfast.wrap(visual), images, texts)
    tokens = naive.decompose(visual, images).attentions  # [B, L, N, H, D]
    assert relative(contributions.maps, tokens.sum((1, 3)) @ texts.T) < 1e-5


def test_wrong_decomposition_is_not_timed(visual: Any, images: torch.Tensor) -> None:
    model = clipfast.wrap(visual)
    with torch.no_grad():
        plain = visual(images)
    expected = naive.decompose(visual, images)
    contributions, tokens = all_tokens(model, images)
    timed: list[str] = []

    def assert_rejected(checks: list[Check]) -> None:
        with pytest.raises(WrongResult):
            compare(lambda: timed.append("a"), lambda: timed.append("b"), lambda: checks, count=1)

    heads = contributions.heads()
    assert_rejected(against_plain(contributions, heads + 1e-4, plain))
    assert_rejected(against_plain(replace(contributions, embedding=contributions.embedding.roll(1, 0)), heads, plain))
    assert_rejected(against_plain(replace(contributions, mlps=contributions.mlps * 1.01), heads, plain))
    assert_rejected(against_naive(contributions, tokens.roll(1, 2), expected))  # permuted tokens keep every sum
    assert_rejected(against_naive(contributions, tokens[:, :, 1:], expected))
    assert not timed


def test_inputs_are_reproducible_and_not_trivial() -> None:
    texts = unit_texts(8)
    assert torch.equal(texts, unit_texts(8))
    assert difference(texts.norm(dim=-1), torch.ones(len(texts))) < 1e-6
    visual = torch.nn.LayerNorm(16)
    randomize(visual)
    assert visual.bias.abs().min() > 0
    assert (visual.weight - 1).abs().min() > 0
