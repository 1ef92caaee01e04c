"""Text maps with captum's conventions: complete, and each patch with its own share."""

from typing import Any

import pytest
import timm
import torch
from builders import directions, pixels, randomise, vision_tower
from hooks import TIMM
from measures import error
from tolerances import FLOAT64, SUM_FLOAT32
from torch import Tensor, nn

import clipfast
from clipfast.compat.captum import TextMaps
from clipfast.errors import InputError

TEXTS = directions(3, 20, dtype=torch.float64)


def siglip() -> nn.Module:
    model = timm.models.vision_transformer.VisionTransformer(
        **TIMM, num_classes=20, global_pool="map", class_token=False
    )
    return randomise(model, 3).double().eval()


TOWERS: dict[str, Any] = {
    "class token": lambda: vision_tower(seed=2, dtype=torch.float64, image_size=(24, 16)),
    "mean": lambda: vision_tower(seed=2, dtype=torch.float64, pool_type="avg", final_ln_after_pool=True),
    "attention pool": siglip,
}


def batch(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Images, and their cosines with the texts by the module itself."""
    images = torch.randn(
        2, 3, *clipfast.wrap(module).image_size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        embedding = module(images)
    return images, embedding @ TEXTS.T / embedding.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", TOWERS)
def test_attributions_add_up_to_the_cosine(name: str) -> None:
    module = TOWERS[name]()
    images, cosines = batch(module)
    maps = TextMaps(module, TEXTS)
    for target, expected in ((1, cosines[:, 1]), ([2, 0], torch.stack([cosines[0, 2], cosines[1, 0]]))):
        pixelwise, delta = maps.attribute(images, target, return_convergence_delta=True)
        assert pixelwise.shape == images.shape
        assert error(pixelwise.sum((1, 2, 3)), expected) <= FLOAT64
        assert float(delta.abs().max()) <= FLOAT64
        patches = maps.attribute(images, target=target, shape="patches")
        assert error(patches.sum((1, 2, 3)), expected) <= FLOAT64
        assert error(pixelwise[:, 2, ::8, ::8] * 3 * 64, patches[:, 0]) <= FLOAT64
    float32 = TextMaps(module.float(), TEXTS.float()).attribute(images.float(), 1)
    assert error(float32.sum((1, 2, 3)), cosines[:, 1]) <= SUM_FLOAT32


def test_what_no_patch_has_is_left_out_or_spread() -> None:
    module = TOWERS["class token"]()
    images, cosines = batch(module)
    own = clipfast.wrap(module).decompose(images, texts=TEXTS).patch_maps()
    left, delta = TextMaps(module, TEXTS).attribute(
        images, 1, shape="patches", remainder="leave", return_convergence_delta=True
    )
    assert error(left[:, 0], own[..., 1]) <= FLOAT64
    assert error(delta, own[..., 1].sum((1, 2)) - cosines[:, 1]) <= FLOAT64
    assert float(delta.abs().min()) > 1e-3
    spread = TextMaps(module, TEXTS).attribute(images, 1, shape="patches")
    assert error(spread - left, (-delta / 6)[:, None, None, None].expand_as(left)) <= FLOAT64


def test_targets_may_be_features() -> None:
    module = TOWERS["class token"]()
    images, _ = batch(module)
    maps, features = TextMaps(module, TEXTS), TextMaps(module)
    assert error(features.attribute(images, TEXTS[2]), maps.attribute(images, 2)) <= FLOAT64
    each = features.attribute(images, TEXTS[[0, 2]])
    assert error(each, maps.attribute(images, torch.tensor([0, 2]))) <= FLOAT64
    assert error(TextMaps(module, TEXTS[1:2]).attribute(images), maps.attribute(images, 1)) <= FLOAT64
    assert maps.attribute(images[:0], 0).shape == (0, 3, 24, 16)


def test_the_bundled_model_and_interpolation() -> None:
    model = clipfast.load("scenes", device="cpu")
    images = pixels(model.module.visual)
    maps = TextMaps(model, ["a red star", "a forest"])
    patches = maps.attribute(images, target=0, shape="patches")
    assert patches.shape == (2, 1, 8, 8)
    large = TextMaps.interpolate(patches, 64)
    assert torch.equal(large[:, :, ::8, ::8], patches)
    assert TextMaps.interpolate(patches, (32, 16), "bilinear").shape == (2, 1, 32, 16)


def test_interpolation_is_captums() -> None:
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    patches = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    for size, mode in ((24, "nearest"), ((30, 21), "bilinear")):
        expected = captum.LayerAttribution.interpolate(patches, size, mode)
        assert torch.equal(TextMaps.interpolate(patches, size, mode), expected)


def test_what_does_not_fit() -> None:
    module = TOWERS["class token"]()
    images, _ = batch(module)
    maps = TextMaps(module, TEXTS)
    calls: list[tuple[Any, str]] = [
        (lambda: maps.attribute(images), "target is None, and there are 3 texts"),
        (lambda: maps.attribute(images, 3), "target 3 does not exist: texts are 0 to 2"),
        (lambda: maps.attribute(images, [0, -1]), "target -1 does not exist"),
        (lambda: maps.attribute(images, [0, 1, 2]), "expected a text's index or 2 of them"),
        (lambda: maps.attribute(images, TEXTS), r"expected a feature \[20\] or \[2, 20\]"),
        (lambda: maps.attribute(images, 0, shape="grid"), "shape is 'grid': choose 'input' or 'patches'"),
        (lambda: maps.attribute(images, 0, remainder="drop"), "remainder is 'drop'"),
        (lambda: maps.attribute(["a.jpg"], 0), "give a preprocessed tensor"),
        (lambda: TextMaps(module).attribute(images, 0), "there are no texts"),
        (lambda: TextMaps(module, TEXTS[:, :2]), "texts has shape"),
        (lambda: TextMaps(module, ["a star"]), "no text encoder"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)
