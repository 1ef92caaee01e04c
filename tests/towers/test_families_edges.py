"""Models of :mod:`families` used at the edges: no images, no layers, half precision, inference mode, odd settings."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import clip, dinov2_with_registers, dinov3, eva_post_norm, ijepa, siglip, timm_gap, timm_map
from hooked import Hooked
from timm_families import deit_distilled, norm_mean_norm, parallel_scaling, pe_core
from tolerances import EMBEDDING_FLOAT32, FLOAT64, SUM_BFLOAT16
from torch import Tensor, nn

import clipfast
from clipfast import Model, UnsupportedTower
from clipfast.basis import Depth

Family = Callable[[], Hooked]
POOLED = [ijepa, siglip, timm_gap, timm_map, deit_distilled, norm_mean_norm, pe_core]


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def away(have: Tensor, expected: Tensor) -> float:
    return float((have.double() - expected).abs().max())


@pytest.mark.parametrize("family", POOLED)
def test_a_pooling_whose_heads_are_not_kept(family: Family) -> None:
    """All of it is then one term."""
    model = clipfast.wrap(family().module)
    expected = model.decompose(images(), depth="pool")
    have = model.decompose(images(), depth="pool", layers=[])
    stacked, names = have.stack()
    assert names == ("start", "pool.mlp", "rest")
    assert stacked.shape[1] == len(names)
    assert away(have.rest, expected.heads().sum((1, 2))) <= FLOAT64
    assert have.max_error() <= FLOAT64


@pytest.mark.parametrize("depth", ["all", "pool"])
@pytest.mark.parametrize("family", POOLED)
def test_no_images(family: Family, depth: Depth) -> None:
    model = clipfast.wrap(family().module)
    texts = torch.randn(4, model.tower.embed_dim, dtype=torch.float64)
    have = model.decompose(images(0), depth=depth, texts=texts, attention=True)
    assert len(have) == 0
    assert have.stack()[0].shape == (0, len(have.terms), model.tower.embed_dim)


@pytest.mark.parametrize("family", POOLED)
def test_half_precision(family: Family) -> None:
    module = family().module
    expected = clipfast.wrap(module).decompose(images()).stack()[0]
    model = clipfast.wrap(module.bfloat16())
    assert model.dtype == torch.bfloat16
    assert away(model.decompose(images()).stack()[0], expected) <= SUM_BFLOAT16


@pytest.mark.parametrize("family", [dinov2_with_registers, eva_post_norm, timm_gap])
def test_heads_are_read_after_inference_mode(family: Family) -> None:
    """A basis that was made in inference mode is completed outside of it."""
    module: Any = family().module
    expected = clipfast.wrap(module).decompose(images()).heads()
    with torch.inference_mode():
        have = clipfast.wrap(module).decompose(images())
    assert away(have.heads(), expected) == 0


def test_models_are_wrapped_in_half_precision_alone() -> None:
    """Weights of two dtypes are still refused."""
    module = deit_distilled().module.bfloat16()
    module.head.float()
    with pytest.raises(clipfast.InputError, match="are in bfloat16 and float32"):
        Model(module, preprocess=lambda image: torch.empty(0), tokenize=None)


def _attention(module: Any, name: str, value: object) -> None:
    first = next(part for part in module.modules() if hasattr(part, "is_causal") and hasattr(part, "head_dim"))
    setattr(first, name, value)


def _replace(module: Any, ending: str) -> None:
    path = next(path for path, _ in module.named_modules() if path.endswith(ending))
    module.set_submodule(path, nn.Identity())


def _other_approximation(module: Any) -> None:
    next(part for part in module.modules() if type(part).__name__ == "GELUTanh").act = torch.nn.functional.gelu


CHANGES: list[tuple[Family, Callable[[Any], None], str]] = [
    *((family, lambda module: _attention(module, "is_causal", True), "causal attention") for family in (clip, dinov3)),
    (siglip, lambda module: _attention(module, "head_dim", 8), "2 heads, but head_dim 8"),
    (siglip, _other_approximation, "an activation other than GELU"),
    *((clip, lambda module, n=name: _replace(module, n), "norm: Identity") for name in ("layer_norm1", "layer_norm2")),
    (clip, lambda module: _replace(module, "pre_layrnorm"), "norm before the layers: Identity"),
    (ijepa, lambda module: _replace(module, "layernorm"), "final norm: Identity"),
    (ijepa, lambda module: _replace(module, "o_proj"), "out: Identity"),
    (siglip, lambda module: _replace(module, "head.layernorm"), "head.layernorm: Identity"),
    (siglip, lambda module: _replace(module, "head.mlp"), "head.mlp: Identity"),
    (timm_gap, lambda module: setattr(module, "num_prefix_tokens", 0), "num_prefix_tokens: 0, where there are 2"),
    (timm_gap, lambda module: _replace(module, "blocks"), "blocks: Identity"),
    (parallel_scaling, lambda module: _replace(module, "blocks.0.in_norm"), "no norm before attention and MLP"),
]


@pytest.mark.parametrize(("family", "change", "reason"), CHANGES)
def test_changes_that_are_refused(family: Family, change: Callable[[Any], None], reason: str) -> None:
    """Before a model is wrapped, and after."""
    module = family().module
    model = clipfast.wrap(module)
    model.decompose(images())
    change(module)
    with pytest.raises(UnsupportedTower, match=reason):
        model.decompose(images())
    with pytest.raises(UnsupportedTower, match=reason):
        clipfast.wrap(module)


@pytest.mark.parametrize("family", [clip, dinov3, ijepa, siglip, timm_map])
def test_copies_of_results(family: Family) -> None:
    contributions = clipfast.wrap(family().module).decompose(images())
    assert torch.equal(copy.deepcopy(contributions).heads(), contributions.heads())


@pytest.mark.parametrize("family", [clip, dinov2_with_registers, dinov3, ijepa, siglip, timm_map, pe_core])
def test_parameters_that_are_given_other_memory(family: Family) -> None:
    """As ``module.half()`` and ``module.cuda()`` do it: the parameters are the same objects."""
    module: Any = family().module
    model = clipfast.wrap(module)
    before = model.encode_image(images(), normalize=False)
    model.decompose(images())
    for parameter in module.parameters():
        parameter.data = parameter.data * 1.25 + 0.125
    expected = model.encode_image(images(), normalize=False)
    assert away(expected, before) > 1e-3
    assert away(model.decompose(images()).embedding, expected) <= FLOAT64
    module.float()
    expected = model.encode_image(images().float(), normalize=False)
    have = model.decompose(images().float()).embedding
    assert have.dtype == torch.float32
    assert away(have, expected.double()) <= EMBEDDING_FLOAT32 * float(expected.abs().max())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("family", [clip, siglip, timm_map, pe_core])
def test_copies_of_models(family: Family, duplicate: Callable[[Model], Model]) -> None:
    """They have weights of their own, and notice when those change."""
    model = clipfast.wrap(family().module)
    expected = model.decompose(images()).embedding
    other = duplicate(model)
    assert other.fingerprint() == model.fingerprint()
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.mul_(1.25).add_(0.125)
    own = other.encode_image(images(), normalize=False)
    assert away(own, expected) > 1e-3
    assert away(other.decompose(images()).embedding, own) <= FLOAT64
    assert away(model.decompose(images()).embedding, expected) == 0


@pytest.mark.parametrize("family", [dinov2_with_registers, parallel_scaling, siglip, deit_distilled])
@pytest.mark.slow
def test_compiled_code_after_a_change_in_place(family: Family) -> None:
    """Optimizers change weights in place; compiled code then looks at the tensors it was compiled for."""
    module: Any = family().module
    model = clipfast.wrap(module)
    torch._dynamo.reset()
    compiled = torch.compile(model.decompose, fullgraph=True, backend="aot_eager")
    compiled(images())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.1)
    expected = model.encode_image(images(), normalize=False)
    assert model.tower.image_size == (24, 24)  # looked up outside of compiled code, it is read again where it must be
    assert away(compiled(images()).embedding, expected) <= FLOAT64
