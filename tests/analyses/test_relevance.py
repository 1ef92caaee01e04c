"""The methods a decomposition is compared with: by hand, and against their definitions with everything materialised."""

from typing import Any

import pytest
import torch
from attention_graph import Graph, cosine, graph, pooled, read
from builders import directions, pixels, vision_tower
from measures import error
from tolerances import FLOAT64
from torch import Tensor, nn

import clipfast
from clipfast.analyses import gradients
from clipfast.analyses.relevance import METHODS, accumulated, chefer, gradcam, legrad, rolled_out, rollout
from clipfast.errors import InputError
from clipfast.towers.tower import Tower

IMAGES = 3
TEXTS = 5 * directions(IMAGES, 20, dtype=torch.float64)
SHAPES: dict[str, dict[str, Any]] = {
    "class token": {"image_size": (24, 16)},
    "mean pooling": {"image_size": (24, 16), "pool_type": "avg", "final_ln_after_pool": True},
}


@pytest.fixture(params=SHAPES)
def visual(request: pytest.FixtureRequest) -> nn.Module:
    return vision_tower(seed=5, dtype=torch.float64, **SHAPES[request.param])


def tower_of(visual: nn.Module) -> Tower:
    return clipfast.wrap(visual).tower


# ----------------------------------------------------------------------------------------- two layers, three tokens

FIRST = torch.tensor([[[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]], [[0.5, 0, 0.5], [0, 1, 0], [0, 0, 1]]])[None]
SECOND = torch.tensor([[0, 1.0, 0], [0.5, 0.5, 0], [0, 0, 1]]).expand(1, 2, 3, 3)
"""Attention of two heads, rows are queries, the class token is the first."""


def test_rollout_by_hand() -> None:
    """Â_1 = [¾ ⅛ ⅛; 0 1 0; 0 0 1] and Â_2 = [½ ½ 0; ¼ ¾ 0; 0 0 1]."""
    expected = torch.tensor([[0.375, 0.5625, 0.0625], [0.1875, 0.78125, 0.03125], [0, 0, 1]])
    assert torch.equal(rolled_out([FIRST, SECOND])[0], expected)
    assert torch.equal(rolled_out(iter([FIRST]))[0, 0], torch.tensor([0.75, 0.125, 0.125]))


def test_chefer_by_hand() -> None:
    """Ā_1 = [½ 1 1; 0 1 0; 0 0 3], of two heads, and Ā_2 = [0 2 0; 1 0 0; 0 0 1]; negative products count for nothing.

    R = I + Ā_1 = [1½ 1 1; 0 2 0; 0 0 4], then R + Ā_2 R = [1½ 5 1; 1½ 3 1; 0 0 8].
    """
    first = torch.tensor([[[2.0, 4, 9], [1, -1, 0], [0, 0, -3]], [[-2, 5, 4], [0, 2, 0], [0, 0, 6]]])[None]
    second = torch.tensor([[7.0, 2, -1], [2, -4, 0], [1, 1, 1]]).expand(1, 2, 3, 3)
    steps = [(SECOND, second), (FIRST, first)]
    expected = torch.tensor([[1.5, 5, 1], [1.5, 3, 1], [0, 0, 8]])
    for token in range(3):
        assert torch.equal(accumulated(torch.eye(3)[token], steps)[0], expected[token])
    assert torch.equal(accumulated(torch.tensor([0, 0.5, 0.5]), steps)[0], torch.tensor([0.75, 1.5, 4.5]))


def test_rollout_of_attention_that_is_the_same_everywhere() -> None:
    """Â = [⅔ ⅙ ⅙; …] twice: ¼ of each of two patches arrives."""
    visual = vision_tower(dtype=torch.float64, image_size=(8, 16), layers=2)
    with torch.no_grad():
        for block in visual.transformer.resblocks:
            block.attn.in_proj_weight[:64] = 0  # queries and keys
            block.attn.in_proj_bias[:64] = 0
    result = rollout(tower_of(visual), pixels(visual, 1, dtype=torch.float64))
    assert error(result, torch.full((1, 1, 2), 0.25)) <= FLOAT64


# -------------------------------------------------------------------------------------- definitions, everything kept


def of_pooled(visual: Any, matrix: Tensor) -> Tensor:
    """What the pooled token reads from the patches, ``[..., N, N] → [..., N − 1]``."""
    rows = matrix[..., 1:, 1:]
    return rows.mean(-2) if visual.pool_type == "avg" else matrix[..., 0, 1:]


def define_attention(visual: Any, whole: Graph, texts: Tensor) -> Tensor:
    return of_pooled(visual, whole.attention[-1]).mean(1)


def define_rollout(visual: Any, whole: Graph, texts: Tensor) -> Tensor:
    product = torch.eye(whole.attention[0].shape[-1], dtype=torch.float64)
    for attention in whole.attention:
        mixed = 0.5 * attention.mean(1) + 0.5 * torch.eye(attention.shape[-1])
        product = (mixed / mixed.sum(-1, keepdim=True)) @ product
    return of_pooled(visual, product)


def define_gradcam(visual: Any, whole: Graph, texts: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(cosine(whole.embedding, texts).sum(), whole.attention[-1])
    out = torch.zeros(IMAGES, whole.attention[-1].shape[-1] - 1, dtype=torch.float64)
    heads = gradient.shape[1]
    for head in range(heads):
        rows, slopes = (of_pooled(visual, matrix[:, head]) for matrix in (whole.attention[-1], gradient))
        out += slopes.mean(1, keepdim=True) * rows.detach() / heads
    return out.clamp_min(0)


def define_chefer(visual: Any, whole: Graph, texts: Tensor) -> Tensor:
    gradients = torch.autograd.grad(cosine(whole.embedding, texts).sum(), whole.attention)
    relevance = torch.eye(whole.attention[0].shape[-1], dtype=torch.float64).expand(IMAGES, -1, -1)
    for attention, gradient in zip(whole.attention, gradients, strict=True):
        relevance = relevance + (gradient * attention.detach()).clamp_min(0).mean(1) @ relevance
    return of_pooled(visual, relevance)


def define_legrad(visual: Any, whole: Graph, texts: Tensor, average: bool = True) -> Tensor:
    out = torch.zeros(IMAGES, whole.attention[0].shape[-1], dtype=torch.float64)
    for attention, hidden in zip(whole.attention, whole.hidden[1:], strict=True):
        own = read(visual, hidden.mean(1) if average else pooled(visual, hidden))
        (gradient,) = torch.autograd.grad(cosine(own, texts).sum(), attention, retain_graph=True)
        out += gradient.clamp_min(0).sum((1, 2)) / (gradient.shape[1] * gradient.shape[2])
    return out[:, 1:]


DEFINITIONS = {
    "attention": define_attention,
    "rollout": define_rollout,
    "gradcam": define_gradcam,
    "chefer": define_chefer,
    "legrad": define_legrad,
}


def test_every_method_has_a_definition() -> None:
    assert set(METHODS) == set(DEFINITIONS)


@pytest.mark.parametrize("name", METHODS)
def test_the_definition(visual: nn.Module, name: str) -> None:
    images = pixels(visual, IMAGES, dtype=torch.float64)
    expected = DEFINITIONS[name](visual, graph(visual, images), TEXTS).detach()
    result = METHODS[name](tower_of(visual), images, TEXTS)
    assert not result.requires_grad
    assert float(expected.max() - expected.min()) > 1e-3
    assert error(result, expected.unflatten(1, (3, 2))) <= FLOAT64


def test_legrad_with_the_towers_own_pooling(visual: nn.Module) -> None:
    images = pixels(visual, IMAGES, dtype=torch.float64)
    expected = define_legrad(visual, graph(visual, images), TEXTS, average=False)
    assert error(legrad(tower_of(visual), images, TEXTS, tokens="pooled"), expected.unflatten(1, (3, 2))) <= FLOAT64


# -------------------------------------------------------------------------------------------------- what they share


@pytest.mark.parametrize("name", METHODS)
def test_an_image_does_not_depend_on_the_others(name: str) -> None:
    visual = vision_tower(seed=5, dtype=torch.float64)
    images = pixels(visual, IMAGES, dtype=torch.float64)
    together = METHODS[name](tower_of(visual), images, TEXTS)
    for image in range(IMAGES):
        alone = METHODS[name](tower_of(visual), images[image : image + 1], TEXTS[image])
        assert error(together[image : image + 1], alone) <= FLOAT64


@pytest.mark.parametrize("name", METHODS)
def test_which_methods_look_at_the_text(name: str) -> None:
    visual = vision_tower(seed=5, dtype=torch.float64)
    images = pixels(visual, 1, dtype=torch.float64)
    one, other = (METHODS[name](tower_of(visual), images, text) for text in (TEXTS[0], -TEXTS[0]))
    assert torch.equal(one, other) == (name in ("attention", "rollout"))


def test_the_length_of_a_text_counts_for_chefer_alone() -> None:
    visual = vision_tower(seed=5, dtype=torch.float64)
    images = pixels(visual, 1, dtype=torch.float64)
    for method in (gradcam, legrad):
        short, long = (method(tower_of(visual), images, TEXTS[0] * times) for times in (1, 10))
        assert error(10 * short, long) <= FLOAT64
    short, long = (chefer(tower_of(visual), images, TEXTS[0] * times) for times in (1, 10))
    assert error(10 * short, long) > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_the_bundled_model(name: str) -> None:
    model = clipfast.load("scenes", device="cpu")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    result = METHODS[name](model.tower, images, model.encode_text(["a red star"])[0])
    assert result.shape == (2, 8, 8)
    assert result.dtype == torch.float32
    assert bool(result.isfinite().all())
    assert bool((result >= 0).all())


# -------------------------------------------------------------------------------------------- several texts per image


@pytest.mark.parametrize("name", METHODS)
def test_several_texts_are_each_text(visual: nn.Module, name: str) -> None:
    images, tower = pixels(visual, IMAGES, dtype=torch.float64), tower_of(visual)
    each = 3 * directions(IMAGES * 4, 20, seed=2, dtype=torch.float64).view(IMAGES, 4, 20)
    result = METHODS[name](tower, images, each)
    assert result.shape == (IMAGES, 4, 3, 2)
    for text in range(4):
        assert error(result[:, text], METHODS[name](tower, images, each[:, text])) <= FLOAT64
    shared = METHODS[name](tower, images, each[:1])
    assert error(shared[:, 2], METHODS[name](tower, images, each[0, 2])) <= FLOAT64


@pytest.mark.parametrize("name", ["chefer", "legrad"])
def test_the_first_layer_that_counts(visual: nn.Module, name: str) -> None:
    images, tower = pixels(visual, IMAGES, dtype=torch.float64), tower_of(visual)
    whole = graph(visual, images)
    short = type(whole)(whole.attention[-1:], whole.hidden[-2:], whole.embedding)
    expected = DEFINITIONS[name](visual, short, TEXTS).detach().unflatten(1, (3, 2))
    method: Any = METHODS[name]
    assert error(method(tower, images, TEXTS, first_layer=-1), expected) <= FLOAT64
    assert error(method(tower, images, TEXTS, first_layer=0), method(tower, images, TEXTS)) == 0
    with pytest.raises(InputError, match="layer 3 does not exist"):
        method(tower, images, TEXTS, first_layer=3)


def test_the_forward_is_shared_by_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    visual = vision_tower(seed=5, dtype=torch.float64)
    tower, images, count = tower_of(visual), pixels(visual, 1, dtype=torch.float64), 0
    run_block = gradients.run_block

    def counted(*arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        return run_block(*arguments)

    monkeypatch.setattr(gradients, "run_block", counted)
    for name, blocks in {"gradcam": 4, "chefer": 6, "legrad": 3}.items():
        for texts in (1, 5):
            count = 0
            METHODS[name](tower, images, TEXTS[None, :1].expand(1, texts, -1))
            assert count == blocks, (name, texts)


@pytest.mark.parametrize("name", METHODS)
def test_texts_that_do_not_fit(name: str) -> None:
    visual = vision_tower(seed=5, dtype=torch.float64)
    images = pixels(visual, IMAGES, dtype=torch.float64)
    for texts in (TEXTS[None, :, :3], TEXTS[None, :0], TEXTS.expand(2, -1, -1)):
        with pytest.raises(InputError, match=r"expected \[3, texts, 20\] or \[1, texts, 20\]"):
            METHODS[name](tower_of(visual), images, texts)
