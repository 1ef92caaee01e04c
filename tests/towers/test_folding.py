"""Weights that parametrisations and hooks compute are read as they are at each call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import pixels, vision_tower
from computed_weights import assert_agrees, assert_untouched, state_of
from measures import relative_error
from tolerances import EMBEDDING_FLOAT32
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from clipfast import UnsupportedTower, wrap

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


class Scaled(nn.Module):
    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = factor
        self.shift = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor + self.shift


def block(visual: Any) -> Any:
    return visual.transformer.resblocks[1]


# ---------------------------------------------------------------------------------------- parametrisations and hooks

PARAMETRISED: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight of an MLP": (
        lambda v: parametrize.register_parametrization(block(v).mlp.c_fc, "weight", Scaled()),
        "transformer.resblocks.1.mlp.c_fc.parametrizations.weight.original",
    ),
    "weight of the patches": (
        lambda v: parametrize.register_parametrization(v.conv1, "weight", Scaled()),
        "conv1.parametrizations.weight.original",
    ),
    "projection of the tower": (
        lambda v: parametrize.register_parametrization(v, "proj", Scaled()),
        "parametrizations.proj.0.shift",
    ),
    "packed attention": (
        lambda v: parametrize.register_parametrization(block(v).attn, "in_proj_weight", Scaled()),
        "transformer.resblocks.1.attn.parametrizations.in_proj_weight.original",
    ),
    "output of the attention": (
        lambda v: parametrize.register_parametrization(block(v).attn.out_proj, "weight", Scaled()),
        "transformer.resblocks.1.attn.out_proj.parametrizations.weight.original",
    ),
    "bias of a norm": (
        lambda v: parametrize.register_parametrization(block(v).ln_1, "bias", Scaled()),
        "transformer.resblocks.1.ln_1.parametrizations.bias.original",
    ),
    "weight norm": (
        lambda v: parametrizations.weight_norm(block(v).mlp.c_fc),
        "transformer.resblocks.1.mlp.c_fc.parametrizations.weight.original0",
    ),
    "spectral norm": (
        lambda v: parametrizations.spectral_norm(block(v).mlp.c_proj).eval(),
        "transformer.resblocks.1.mlp.c_proj.parametrizations.weight.original",
    ),
    "orthogonal": (
        lambda v: parametrizations.orthogonal(block(v).mlp.c_fc),
        "transformer.resblocks.1.mlp.c_fc.parametrizations.weight.original",
    ),
    "old weight norm": (lambda v: weight_norm(block(v).mlp.c_fc), "transformer.resblocks.1.mlp.c_fc.weight_g"),
    "old spectral norm": (
        lambda v: spectral_norm(block(v).mlp.c_proj),
        "transformer.resblocks.1.mlp.c_proj.weight_orig",
    ),
    "pruned weight": (
        lambda v: prune.l1_unstructured(block(v).mlp.c_fc, "weight", 0.5),
        "transformer.resblocks.1.mlp.c_fc.weight_orig",
    ),
    "pruned attention": (
        lambda v: prune.random_unstructured(block(v).attn, "in_proj_weight", 0.5),
        "transformer.resblocks.1.attn.in_proj_weight_orig",
    ),
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_computed_weights_are_followed(name: str) -> None:
    """Before and after wrapping, and when what they are computed from changes in place or through ``.data``."""
    change, parameter = PARAMETRISED[name]
    visual = vision_tower()
    images, wrapped_before = pixels(visual), wrap(visual)
    first = assert_agrees(wrapped_before, images)
    torch.manual_seed(0)
    change(visual)
    model = wrap(visual)
    second = assert_agrees(model, images)
    assert torch.equal(assert_agrees(wrapped_before, images), second)
    if name not in ("weight norm", "old weight norm"):
        assert relative_error(second, first) > EMBEDDING_FLOAT32, "this parametrisation changes nothing"
    with torch.no_grad():
        visual.get_parameter(parameter).mul_(torch.rand_like(visual.get_parameter(parameter)) + 0.5)
    third = assert_agrees(model, images)
    assert relative_error(third, second) > EMBEDDING_FLOAT32
    visual.get_parameter(parameter).data.mul_(torch.rand_like(visual.get_parameter(parameter)) + 0.5)
    assert relative_error(assert_agrees(model, images), third) > EMBEDDING_FLOAT32


@pytest.mark.parametrize("name", PARAMETRISED)
def test_reading_computed_weights_changes_nothing(name: str) -> None:
    visual = vision_tower()
    torch.manual_seed(0)
    PARAMETRISED[name][0](visual)
    images = pixels(visual)
    with torch.no_grad():
        own = visual(images)
    before = state_of(visual)
    model = wrap(visual)
    model.decompose(images)
    assert_untouched(before, state_of(visual))
    model.fingerprint()
    with torch.no_grad():
        assert torch.equal(visual(images), own)


def test_a_setting_of_a_parametrisation_is_followed() -> None:
    visual = vision_tower()
    scaled = Scaled()
    parametrize.register_parametrization(block(visual).mlp.c_fc, "weight", scaled)
    model, images = wrap(visual), pixels(visual)
    first = assert_agrees(model, images)
    scaled.factor = 2.0
    assert relative_error(assert_agrees(model, images), first) > EMBEDDING_FLOAT32


def test_weights_are_followed_after_they_are_folded_in() -> None:
    visual = vision_tower()
    old, new = block(visual).mlp.c_fc, block(visual).mlp.c_proj
    weight_norm(old)
    parametrizations.weight_norm(new)
    model, images = wrap(visual), pixels(visual)
    embedding = assert_agrees(model, images)
    nn.utils.remove_weight_norm(old)
    parametrize.remove_parametrizations(new, "weight")
    assert model.tower.sources == ()
    assert relative_error(assert_agrees(model, images), embedding) <= EMBEDDING_FLOAT32


def test_unchanged_layers_are_shared_with_the_module() -> None:
    visual = vision_tower()
    parametrizations.weight_norm(block(visual).mlp.c_fc)
    tower = wrap(visual).tower
    assert tower.patch_weight is visual.conv1.weight
    assert tower.blocks[1].mlp_out_weight is block(visual).mlp.c_proj.weight
    assert tower.blocks[1].mlp_in_weight is not block(visual).mlp.c_fc.weight
    assert len(tower.sources) == 2


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm])
def test_a_spectral_norm_that_changes_at_every_call_is_refused(norm: Callable[[nn.Module], nn.Module]) -> None:
    visual = vision_tower()
    images = pixels(visual)
    layer = norm(block(visual).mlp.c_fc)
    model = wrap(visual.eval())
    assert_agrees(model, images)
    visual.train()
    with pytest.raises(UnsupportedTower, match=r"in training mode.* \(transformer\.resblocks\.1\.mlp\.c_fc\.weight\)$"):
        model.decompose(images)
    assert layer.training


def test_a_hook_that_the_attention_does_not_run_is_refused() -> None:
    visual = vision_tower()
    weight_norm(block(visual).attn.out_proj)
    with pytest.raises(UnsupportedTower, match=r"nn\.MultiheadAttention does not compute.*1\.attn\.out_proj: a weight"):
        wrap(visual)
