"""The calls of every output and baseline."""

from functools import partial
from typing import Any

import pytest
import torch
from builders import vision_tower

from clipfast.bench import naive
from clipfast.bench.inputs import module
from clipfast.bench.outputs import COMPILED, NAIVE_HEADS, NAIVE_TOKENS, Case, build, call, each_token, naive_refusals
from clipfast.errors import InputError, NotKept

ARGUMENTS: dict[str, Any] = {
    "model": "scenes",
    "batch": 2,
    "dtype": "fp32",
    "backend": "auto",
    "texts": 3,
    "threads": 1,
}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.of(module("scenes"), 2, texts=3)


def test_outputs_keep_only_what_they_name(case: Case) -> None:
    results: dict[str, Any] = {name: call(case, name)() for name in ("heads", "attention", "maps")}
    for contributions, heads in results.values():
        assert torch.equal(heads, contributions.heads())
    assert results["maps"][0].maps.shape[::2] == (2, 3)
    assert results["maps"][0].attention.shape == results["attention"][0].attention.shape
    for name, attribute in (("heads", "attention"), ("heads", "maps"), ("attention", "maps")):
        with pytest.raises(NotKept):
            getattr(results[name][0], attribute)


def test_each_token_visits_every_layer(case: Case) -> None:
    shapes: dict[int, tuple[int, ...]] = {}
    each_token(case.model, case.images, lambda layer, tokens: shapes.update({layer: tuple(tokens.shape)}))
    tower = case.model.tower
    shape = (2, tower.tokens, tower.heads, tower.embed_dim)
    assert shapes == dict.fromkeys(range(tower.layers), shape)


def test_build_reproduces_weights_images_and_texts(case: Case) -> None:
    for name in ("plain", "maps"):
        expected: Any = call(case, name)()
        built: Any = build(name, **ARGUMENTS)()
        parts = [(expected, built)] if name == "plain" else [(expected[0].maps, built[0].maps), (expected[1], built[1])]
        for a, b in parts:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrapped", [lambda out: out, lambda out: (out, None)], ids=["embedding", "with_tokens"])
def test_compiled_call_returns_the_embedding(case: Case, wrapped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda visual, dynamic: lambda images: wrapped(visual(images)))
    assert torch.equal(call(case, COMPILED)(), call(case, "plain")())  # type: ignore[arg-type]


def test_naive_calls_with_and_without_tokens(case: Case) -> None:
    for name, axes in ((NAIVE_HEADS, 4), (NAIVE_TOKENS, 5)):
        result = call(case, name)()
        assert isinstance(result, naive.Result)
        assert result.attentions.ndim == axes


def test_naive_calls_reject_a_model_that_pools_patches() -> None:
    pooling = Case.of(vision_tower(pool_type="avg", final_ln_after_pool=True), 1)
    (reason,) = naive_refusals(pooling)
    for name in (NAIVE_HEADS, NAIVE_TOKENS):
        with pytest.raises(InputError, match=reason):
            call(pooling, name)
    assert naive_refusals(Case.of(vision_tower(), 1)) == []


def test_random_weights_are_seeded_and_bundled_ones_unchanged() -> None:
    small = partial(module, "ViT-S-32-alt")
    a, b, other = (model.visual.state_dict() for model in (small(), small(), small(seed=1)))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["proj"], other["proj"])
    assert a["ln_post.bias"].abs().min() > 0
    bundled = [module("scenes", seed=seed).visual.state_dict() for seed in (0, 1)]
    assert all(torch.equal(bundled[0][key], bundled[1][key]) for key in bundled[0])
