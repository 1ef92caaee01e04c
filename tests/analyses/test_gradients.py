"""The differentiable forward: the module's own numbers, and gradients against autograd and finite differences."""

from functools import partial
from typing import Any

import pytest
import torch
from attention_graph import cosine, graph, pooled, read
from builders import directions, named_tower, pixels, vision_tower
from measures import error, relative_error
from open_clip.transformer import QuickGELU
from tolerances import EMBEDDING_BFLOAT16, EMBEDDING_FLOAT32, FLOAT64
from torch import nn

import clipfast
from clipfast.analyses.gradients import attention_gradients, attention_matrices, forward, own_gradients
from clipfast.towers.tower import Tower

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.1},
    "QuickGELU": {"act_layer": QuickGELU},
    "GELU by tanh": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "no ln_pre": {"no_ln_pre": True},
    "mean pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "tall": {"image_size": (24, 16), "patch_size": (8, 4)},
    "a rest of pixels": {"image_size": (27, 30)},
    "one layer": {"layers": 1, "heads": 4},
    "custom blocks": {"block_type": "custom", "output_tokens": True},
}


@pytest.fixture(params=VARIANTS)
def visual(request: pytest.FixtureRequest) -> nn.Module:
    return vision_tower(seed=3, dtype=torch.float64, **VARIANTS[request.param])


def tower_of(visual: nn.Module) -> Tower:
    return clipfast.wrap(visual).tower


def plain_output(visual: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = visual(images)
    return out[0] if isinstance(out, tuple) else out


# ------------------------------------------------------------------------------------------------------- the forward


def test_it_is_the_module(visual: nn.Module) -> None:
    images = pixels(visual, 2, dtype=torch.float64)
    result, expected = forward(tower_of(visual), images), graph(visual, images)
    assert all(tensor.requires_grad for tensor in (*result.attention, *result.hidden, result.embedding))
    assert relative_error(result.embedding.detach(), plain_output(visual, images)) <= FLOAT64
    for mine, theirs in zip(result.attention, expected.attention, strict=True):
        assert error(mine.detach(), theirs.detach()) <= FLOAT64
    for mine, theirs in zip(result.hidden, expected.hidden, strict=True):
        assert relative_error(mine.detach(), theirs.detach()) <= FLOAT64
    for mine, theirs in zip(attention_matrices(tower_of(visual), images), result.attention, strict=True):
        assert torch.equal(mine, theirs)
        assert not mine.requires_grad


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_module_in_float32(name: str) -> None:
    visual = vision_tower(**VARIANTS[name])
    model, images = clipfast.wrap(visual), pixels(visual, 3)
    assert (
        relative_error(forward(model.tower, images).embedding.detach(), model.encode_image(images, normalize=False))
        <= EMBEDDING_FLOAT32
    )


@pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-H-14", "ViT-bigG-14-CLIPA", "ViT-S-16-alt"])
def test_named_towers(name: str) -> None:
    visual = named_tower(name, layers=2, image_size=64 if "32" in name else 56 if "14" in name else 64, embed_dim=32)
    model, images = clipfast.wrap(visual), pixels(visual)
    assert (
        relative_error(forward(model.tower, images).embedding.detach(), model.encode_image(images, normalize=False))
        <= EMBEDDING_FLOAT32
    )


def test_the_bundled_model() -> None:
    model = clipfast.load("scenes", device="cpu")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    contributions = forward(model.tower, images)
    assert (
        relative_error(contributions.embedding.detach(), model.encode_image(images, normalize=False))
        <= EMBEDDING_FLOAT32
    )
    kept = model.decompose(images, attention=True).attention
    for layer, matrix in enumerate(contributions.attention):
        assert error(matrix[:, :, 0].detach(), kept[:, layer]) <= EMBEDDING_FLOAT32


def test_bfloat16() -> None:
    visual = vision_tower().bfloat16()
    model, images = clipfast.wrap(visual), pixels(visual, 2, dtype=torch.bfloat16)
    contributions = forward(model.tower, images)
    assert contributions.attention[0].dtype == torch.float32
    assert (
        relative_error(contributions.embedding.detach(), model.encode_image(images, normalize=False))
        <= EMBEDDING_BFLOAT16
    )
    text = directions(1, 20)[0]
    assert all(bool(gradient.isfinite().all()) for _, _, gradient in attention_gradients(model.tower, images, text))


# --------------------------------------------------------------------------------------------------------- gradients


def test_gradients_are_those_of_autograd(visual: nn.Module) -> None:
    """In one graph of everything, and layer by layer."""
    images = pixels(visual, 3, dtype=torch.float64)
    texts = 7 * directions(3, 20, dtype=torch.float64)
    whole = graph(visual, images)
    expected = torch.autograd.grad(cosine(whole.embedding, texts).sum(), whole.attention)
    trace = forward(tower_of(visual), images)
    once = torch.autograd.grad(cosine(trace.embedding, texts).sum(), trace.attention)
    result = list(attention_gradients(tower_of(visual), images, texts))
    assert [layer for layer, _, _ in result] == list(reversed(range(len(expected))))
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3
    for layer, attention, gradient in result:
        assert error(attention, whole.attention[layer].detach()) <= FLOAT64
        assert error(gradient, expected[layer]) <= FLOAT64
        assert error(once[layer], expected[layer]) <= FLOAT64


@pytest.mark.parametrize("tokens", ["all", "pooled"])
def test_gradients_of_a_layers_own_similarity(visual: nn.Module, tokens: str) -> None:
    images = pixels(visual, 2, dtype=torch.float64)
    text = directions(1, 20, dtype=torch.float64)[0]
    whole = graph(visual, images)
    result = list(own_gradients(tower_of(visual), images, text, tokens=tokens))
    assert [layer for layer, _, _ in result] == list(range(len(whole.attention)))
    for layer, attention, gradient in result:
        out = whole.hidden[layer + 1]
        own = read(visual, out.mean(1) if tokens == "all" else pooled(visual, out))
        (expected,) = torch.autograd.grad(cosine(own, text).sum(), whole.attention[layer], retain_graph=True)
        assert error(attention, whole.attention[layer].detach()) <= FLOAT64
        assert error(gradient, expected) <= FLOAT64


@pytest.mark.parametrize("name", ["plain", "mean pooling"])
def test_finite_differences(name: str) -> None:
    """An attention weight moved by itself, rows no longer summing to 1: a five-point stencil, exact to h⁴."""
    visual, step = vision_tower(seed=3, dtype=torch.float64, **VARIANTS[name]), 1e-3
    images, text = pixels(visual, 1, dtype=torch.float64), directions(1, 20, dtype=torch.float64)[0]
    visual.requires_grad_(False)
    attention = [matrix.detach() for matrix in graph(visual, images).attention]
    for layer, _, gradient in attention_gradients(tower_of(visual), images, text):
        for place in ((0, 0, 0, 4), (0, 1, 0, 0), (0, 1, 5, 2)):
            scores = []
            for times in (-2, -1, 1, 2):
                moved = attention[layer].clone()
                moved[place] += times * step
                scores.append(float(cosine(graph(visual, images, {layer: moved}).embedding, text)))
            slope = (scores[0] - 8 * scores[1] + 8 * scores[2] - scores[3]) / (12 * step)
            assert float(gradient[place]) == pytest.approx(slope, abs=FLOAT64)


def test_one_text_for_all_is_that_text_for_each() -> None:
    visual = vision_tower(dtype=torch.float64)
    images, text = pixels(visual, 2, dtype=torch.float64), directions(1, 20, dtype=torch.float64)[0]
    one, each = (list(attention_gradients(tower_of(visual), images, t)) for t in (text, torch.stack([text, text])))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(one, each, strict=True))


# ------------------------------------------------------------------------------------------------- what surrounds it


def test_weights_take_no_gradient() -> None:
    visual = vision_tower()
    images, text = pixels(visual), directions(1, 20)[0]
    assert all(parameter.requires_grad for parameter in visual.parameters())
    trace = forward(tower_of(visual), images)
    reached = torch.autograd.grad(trace.embedding.sum(), list(visual.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in reached)
    list(attention_gradients(tower_of(visual), images, text))
    list(own_gradients(tower_of(visual), images, text))
    assert all(parameter.grad is None for parameter in visual.parameters())


@pytest.mark.parametrize(
    "surrounding",
    [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
@pytest.mark.parametrize("walk", [attention_gradients, own_gradients])
def test_what_surrounds_the_call_changes_nothing(walk: Any, surrounding: Any) -> None:
    visual = vision_tower()
    images, text = pixels(visual), directions(1, 20)[0]
    expected = list(walk(tower_of(visual), images, text))
    with surrounding():
        outside = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        made_here = images.clone(), text.clone()
        for (layer, attention, gradient), (_, same, right) in zip(
            walk(tower_of(visual), *made_here), expected, strict=True
        ):
            now = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            assert now == outside, f"layer {layer} left a mode behind"
            assert torch.equal(attention, same)
            assert torch.equal(gradient, right)
        embedding = forward(tower_of(visual), made_here[0]).embedding
        assert embedding.requires_grad
    assert torch.equal(embedding, forward(tower_of(visual), images).embedding)


def test_a_tower_made_in_inference_mode() -> None:
    with torch.inference_mode():
        visual = vision_tower()
        result = list(attention_gradients(tower_of(visual), pixels(visual), directions(1, 20)[0]))
    usual = vision_tower()
    expected = list(attention_gradients(tower_of(usual), pixels(usual), directions(1, 20)[0]))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(result, expected, strict=True))


def test_no_images() -> None:
    visual = vision_tower()
    none = pixels(visual, 0)
    assert forward(tower_of(visual), none).embedding.shape == (0, 20)
    shapes = [gradient.shape for _, _, gradient in attention_gradients(tower_of(visual), none, directions(1, 20)[0])]
    assert shapes == [(0, 2, 10, 10)] * 3


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(20), r"float32 \[2, 3, 8, 8\], expected floating point \[images, 3, 24"),
        (torch.zeros(2, 3, 24, 24).byte(), torch.zeros(20), r"images is uint8 \[2, 3, 24, 24\]"),
        (
            torch.zeros(2, 3, 24, 24),
            torch.zeros(7),
            r"shape \[7\]: expected one text \[20\] or one per image \[2, 20\]",
        ),
        (torch.zeros(2, 3, 24, 24), torch.zeros(3, 20), r"shape \[3, 20\]: expected one text"),
    ],
)
def test_what_does_not_fit(images: torch.Tensor, text: torch.Tensor, message: str) -> None:
    """Said at the call, not when the first layer is asked for."""
    for walk in (attention_gradients, own_gradients):
        with pytest.raises(clipfast.InputError, match=message):
            walk(tower_of(vision_tower()), images, text)


def test_no_such_pooling() -> None:
    with pytest.raises(clipfast.InputError, match="tokens is 'some': choose 'all' or 'pooled'"):
        own_gradients(tower_of(vision_tower()), torch.zeros(1, 3, 24, 24), torch.zeros(20), tokens="some")
