"""Model.verify: agrees for every kind of tower, and names the part of the forward that differs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import clip_model, named_tower, pixels, vision_tower
from open_clip.transformer import QuickGELU
from torch import nn

import clipfast
from clipfast import InputError, Verification, wrap
from clipfast.verification import TOLERANCES

TOWERS: dict[str, Callable[[], nn.Module]] = {
    "class token": vision_tower,
    "mean": lambda: vision_tower(pool_type="avg", final_ln_after_pool=True),
    "QuickGELU": lambda: vision_tower(act_layer=QuickGELU),
    "layer scales": lambda: vision_tower(ls_init_value=0.1),
    "no first norm": lambda: vision_tower(no_ln_pre=True),
    "tokens, too": lambda: vision_tower(output_tokens=True),
    "one layer": lambda: vision_tower(layers=1),
    "a named one": lambda: named_tower("ViT-S-32-alt", layers=2, image_size=64),
}


@pytest.mark.parametrize("name", TOWERS)
def test_a_plain_tower_agrees_in_every_part(name: str) -> None:
    visual = TOWERS[name]()
    result = wrap(visual).verify(pixels(visual))
    assert result.ok
    assert result.first is None
    assert len(result.layers) == len(visual.transformer.resblocks)
    assert max(result.max_error, *result.parts.values()) <= 1e-5
    assert str(result).startswith("agrees with the module's own embedding: largest relative error ")
    assert "\n" not in str(result)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_dtype_has_its_tolerance(dtype: torch.dtype) -> None:
    visual = vision_tower(dtype=dtype)
    result = wrap(visual).verify(pixels(visual))
    assert result.ok
    assert result.tolerance == TOLERANCES[dtype]
    assert result.max_error > 0 or dtype == torch.float64


def test_a_whole_model_and_a_compiled_tower_agree() -> None:
    clip = clip_model()
    images = pixels(clip.visual)
    assert wrap(clip).verify(images).ok
    clip.visual.compile(backend="eager")
    wrap(clip).encode_image(images)
    assert wrap(clip).verify(images).ok
    assert wrap(torch.compile(clip, backend="eager")).verify(images).ok


def double(module: nn.Module, inputs: object, output: Any) -> Any:
    return tuple(2 * value for value in output if value is not None) if isinstance(output, tuple) else 2 * output


def double_patches(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    """Leaves the class token alone, so the row that is pooled differs one layer later only."""
    return torch.cat([output[:, :1], 2 * output[:, 1:]], 1)


PLACES: dict[str, tuple[Callable[[Any], nn.Module], Callable[..., Any]]] = {
    "start": (lambda visual: visual.ln_pre, double),
    "layer 0": (lambda visual: visual.transformer.resblocks[0], double_patches),
    "layer 1": (lambda visual: visual.transformer.resblocks[1].mlp, double),
    "layer 2": (lambda visual: visual.transformer.resblocks[2].ls_1, double),
    "projection": (lambda visual: visual, double),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_first_part_that_differs_is_named(place: str) -> None:
    visual = vision_tower()
    where, hook = PLACES[place]
    where(visual).register_forward_hook(hook)
    result = wrap(visual, ignore_hooks=True).verify(pixels(visual))
    assert not result.ok
    assert result.first == place
    assert [name for name, error in result.parts.items() if error > result.tolerance] == [place]
    assert f"first at {place} (" in str(result).replace("at the ", "at ")


def test_a_changed_function_that_no_module_shows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is computed by a function of torch: replacing it leaves every module as it was."""
    visual = vision_tower()
    model = wrap(visual)
    original = torch._native_multi_head_attention

    def louder(*arguments: Any, **options: Any) -> Any:
        out, weights = original(*arguments, **options)
        return 2 * out, weights

    monkeypatch.setattr(torch, "_native_multi_head_attention", louder)
    result = model.verify(pixels(visual))
    assert result.first == "layer 0"
    assert min(result.layers) > result.tolerance
    assert result.start <= result.tolerance
    assert result.projection <= result.tolerance


def test_weights_that_are_not_finite_do_not_agree() -> None:
    visual = vision_tower()
    visual.transformer.resblocks[1].ln_2.bias.data[0] = float("nan")
    result = wrap(visual).verify(pixels(visual))
    assert not result.ok
    assert result.first == "layer 1"


def test_verifying_leaves_no_hooks_and_takes_a_tolerance() -> None:
    visual = vision_tower()
    model = wrap(visual)
    strict = model.verify(pixels(visual), tolerance=0.0)
    assert not strict.ok
    assert "(tolerance 0e+00)" in str(strict)
    assert not any(module._forward_hooks for module in visual.modules())
    assert model.verify(pixels(visual, 1)).ok


def test_an_autocast_around_it_does_not_count() -> None:
    visual = vision_tower()
    with torch.autocast("cpu", torch.bfloat16):
        assert wrap(visual).verify(pixels(visual)).ok


def test_no_images_cannot_be_compared() -> None:
    with pytest.raises(InputError, match=r"^no images were given"):
        wrap(vision_tower()).verify([])


def test_the_bundled_model_agrees() -> None:
    model = clipfast.load("scenes", device="cpu")
    assert isinstance(model.verify(torch.randn(2, 3, *model.tower.image_size)), Verification)
    assert model.verify(torch.randn(2, 3, *model.tower.image_size)).ok
