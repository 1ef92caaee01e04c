"""timm's models for images of another size: as timm's own ``set_input_size`` and ``dynamic_img_size`` have them."""

from copy import deepcopy
from typing import Any

import open_clip
import pytest
import torch
from measures import error, relative_error
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm_small import FLAGS, build, build_open_clip, flagged, pixels, rotary, vit
from torch import nn

import clipfast
from clipfast.errors import InputError
from clipfast.towers.timm_sizes import sized

PHOTOS = [Image.effect_noise((90, 60), 80).convert("RGB"), Image.effect_noise((33, 70), 80).convert("RGB")]


def sizes_of(model: clipfast.Model) -> list[tuple[int, int]]:
    """A larger square and a rectangle."""
    (height, width), (high, wide) = model.image_size, model.tower.patch_size
    return [(height + high, width + wide), (2 * high, width + 3 * wide)]


def state_of(module: nn.Module) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.slow
def test_every_flag_at_two_other_sizes(flag: str) -> None:
    module = flagged(flag)
    before, random = state_of(module), torch.get_rng_state()
    model = clipfast.wrap(module)
    for size in sizes_of(model):
        expected = deepcopy(module)
        if hasattr(module, "patch_embed"):
            expected.set_input_size(img_size=size)
        resized, images = model.resized(*size), pixels(size)
        with torch.no_grad():
            own = expected(images)
        result = resized.decompose(images)
        assert result.grid == resized.tower.grid
        assert relative_error(result.embedding, own) <= 1e-5
        assert result.max_error() <= 1e-5
        assert relative_error(resized.encode_image(images, normalize=False), own) <= 1e-6
        assert resized.verify(images).ok
        if getattr(module, "pos_embed", None) is not None and resized.tower.positional_embedding is not None:
            assert error(resized.tower.positional_embedding, expected.pos_embed[0]) <= 1e-6
    after = state_of(module)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_dinov3",
        "vit_base_patch14_reg4_dinov2",
        "eva02_base_patch14_224",
        "vit_pe_core_base_patch16_224",
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_models_of_any_size_run_as_they_are(name: str, dynamic: bool) -> None:
    module = build(name, dynamic_img_size=dynamic)
    model = clipfast.wrap(module)
    for size in sizes_of(model):
        images = pixels(size)
        expected = module if dynamic else sized(module, size)
        with torch.no_grad():
            own = expected(images)
        result = model.resized(*size).decompose(images)
        assert relative_error(result.embedding, own) <= 1e-5
        assert result.max_error() <= 1e-5


@pytest.mark.parametrize(
    "name", ["ViT-B-16-SigLIP", "EVA02-B-16", "PE-Core-B-16", "convnext_base", "MobileCLIP-S1", "MobileCLIP-B"]
)
def test_trunks_of_open_clip(name: str) -> None:
    module = build_open_clip(name)
    model, before = clipfast.wrap(module), state_of(module)
    for size in sizes_of(model):
        resized, images = model.resized(*size), pixels(size)
        expected = deepcopy(module)
        if "patch_embed" in dict(expected.trunk.named_children()):
            expected.trunk.set_input_size(img_size=size)
        with torch.no_grad():
            own = expected(images)
        result = resized.decompose(images)
        assert relative_error(result.embedding, own) <= 1e-5
        assert result.max_error() <= 1e-5
        verification = resized.verify(images)
        assert verification.ok
        assert verification.max_error <= 1e-5
        transform = open_clip.image_transform(size, is_train=False)
        assert torch.equal(resized.preprocess(PHOTOS[0]), transform(PHOTOS[0]))
    assert module.image_size == model.module.image_size
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_of(module).items())


def test_changed_positions_are_noticed() -> None:
    module = vit()
    model = clipfast.wrap(module, image_size=(16, 48))
    images = pixels((16, 48))
    first = model.decompose(images).embedding
    with torch.no_grad():
        module.pos_embed.mul_(30)
    assert relative_error(model.decompose(images).embedding, first) > 1e-3
    assert model.verify(images).ok


def test_a_parametrised_table_is_not_written_to() -> None:
    module = vit().eval()

    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

        def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    nn.utils.parametrize.register_parametrization(module, "pos_embed", Doubled())
    before = state_of(module)
    model, images = clipfast.wrap(module, image_size=(16, 48)), pixels((16, 48))
    assert model.verify(images).ok
    assert model.tower.positional_embedding is not None
    assert model.tower.positional_embedding.shape == (13, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(module).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_rotary_tables_in_other_dtypes(dtype: torch.dtype) -> None:
    module = rotary().to(dtype).eval()
    before = state_of(module)
    model = clipfast.wrap(module, image_size=(16, 48))
    assert model.verify(pixels((16, 48), dtype=dtype)).ok
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(module).items())


@pytest.mark.parametrize("size", [(48, 48), (24, 56)])
def test_images_are_prepared_by_timms_own_transform(size: tuple[int, int]) -> None:
    module = vit().eval()
    module.pretrained_cfg = {"crop_pct": 0.9, "mean": (0.5, 0.4, 0.3), "interpolation": "bicubic"}
    config = {**resolve_model_data_config(module), "input_size": (3, *size)}
    transform = create_transform(**config, is_training=False)
    for model in (clipfast.wrap(module, image_size=size), clipfast.wrap(module).resized(*size)):
        assert torch.equal(model.prepare(PHOTOS), torch.stack([transform(photo) for photo in PHOTOS]))


def test_a_size_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(InputError, match=r"20 × 32 pixels are not whole patches of 8 × 8: try 16 × 32"):
        clipfast.wrap(vit().eval(), image_size=(20, 32))
    with pytest.raises(InputError, match=r"48 × 64 pixels are not whole patches of 32 × 32: try 64 × 64"):
        clipfast.wrap(build_open_clip("convnext_base"), image_size=(48, 64))
