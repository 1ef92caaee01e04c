"""Images of another size than a tower's positions are for: as the package itself resamples them, module untouched."""

from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from builders import clip_model, directions, vision_tower
from measures import error, relative_error
from open_clip.model import resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

import clipfast
from clipfast.errors import InputError
from clipfast.towers.openclip_sizes import sized
from clipfast.towers.sizes import resampled

SIZES = [(40, 40), (16, 40), (48, 16), (16, 16)]
"""Of a tower for 24 × 24 pixels with patches of 8."""
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "sin-cos": {"pos_embed_type": "sin_cos_2d"},
    "no ln_pre": {"no_ln_pre": True},
    "norm, then mean": {"pool_type": "avg"},
    "attentional pool": {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2},
    "norms inside": {"block_type": "custom", "qk_norm": True, "scale_attn_inner": True, "scale_fc": True},
}


def images(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5)).to(dtype)


def built_for(size: tuple[int, int], visual: VisionTransformer, **kind: Any) -> VisionTransformer:
    """A tower that open_clip built for a size and gave the weights of another as it loads a checkpoint."""
    if size[0] != size[1]:
        kind = {name: value for name, value in kind.items() if name != "pos_embed_type"}  # which builds squares alone
    other = vision_tower(1, image_size=size, **kind)
    state = {f"visual.{name}": tensor for name, tensor in visual.state_dict().items()}
    resize_pos_embed(state, SimpleNamespace(visual=other))
    other.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in state.items()})
    return other


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_of_open_clip_is_the_one_that_it_builds_for_the_size(kind: str, size: tuple[int, int]) -> None:
    visual = vision_tower(0, **KINDS[kind])
    expected = built_for(size, visual, **KINDS[kind])
    model, pixels = clipfast.wrap(visual).resized(*size), images(*size)
    with torch.no_grad():
        own = expected(pixels)
    assert model.image_size == size
    assert model.tower.grid == (size[0] // 8, size[1] // 8)
    assert error(model.tower.positional_embedding, expected.positional_embedding) <= 1e-6
    result = model.decompose(pixels, texts=directions(3, 20), attention=True)
    assert relative_error(result.embedding, own) <= 1e-5
    assert result.max_error() <= 1e-5
    assert relative_error(model.encode_image(pixels, normalize=False), own) <= 1e-6
    assert result.patch_maps().shape == (2, *model.tower.grid, 3)
    assert result.attention.shape == (2, model.layers, model.heads, model.tower.tokens)
    verification = model.verify(pixels)
    assert verification.ok
    assert verification.max_error <= 1e-5


@pytest.mark.parametrize("size", [(8, 72), (72, 8)])
def test_a_grid_of_as_many_patches_is_another_grid(size: tuple[int, int]) -> None:
    """open_clip compares numbers of patches, and would take the rows of a square as they are."""
    visual = vision_tower(0)
    table = clipfast.wrap(visual, image_size=size).tower.positional_embedding
    assert table is not None
    assert error(table, visual.positional_embedding) > 0.1
    patches = visual.positional_embedding[1:].detach().double().T.unflatten(1, (3, 3))[None].contiguous()
    expected = nn.functional.interpolate(patches, size=(size[0] // 8, size[1] // 8), mode="bicubic", antialias=True)
    assert error(table[1:], expected[0].flatten(1).T) <= 1e-6
    assert torch.equal(table[0], visual.positional_embedding[0])


def test_the_size_of_the_tower_itself_shares_its_positions() -> None:
    visual = vision_tower(0)
    model = clipfast.wrap(visual, image_size=24)
    assert model.tower.positional_embedding is visual.positional_embedding
    assert sized(visual, (24, 24)) is visual
    assert clipfast.wrap(visual, image_size=(16, 32)).resized(24, 24).tower.sources == ()


def test_a_rectangular_tower_is_resampled_from_its_own_grid() -> None:
    """Of such a checkpoint open_clip itself would take the square root of the number of patches."""
    visual = vision_tower(0, image_size=(16, 32))
    table = clipfast.wrap(visual, image_size=(24, 48)).tower.positional_embedding
    assert table is not None
    assert torch.equal(table, resampled(visual.positional_embedding.detach(), (2, 4), (3, 6)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    visual = vision_tower(0, dtype)
    model, pixels = clipfast.wrap(visual, image_size=(16, 40)), images(16, 40, dtype)
    assert model.verify(pixels).ok
    precise = resampled(visual.positional_embedding.double(), (3, 3), (2, 5))
    assert model.tower.positional_embedding is not None
    assert model.tower.positional_embedding.dtype is dtype
    assert relative_error(model.tower.positional_embedding, precise) <= (1e-14 if dtype is torch.float64 else 4e-3)


def test_the_module_is_untouched_and_shared() -> None:
    module = clip_model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pixels = images(24, 24)
    with torch.no_grad():
        own = module.encode_image(pixels)
    attributes = {path: set(vars(part)) for path, part in module.named_modules()}
    random = torch.get_rng_state()
    model = clipfast.wrap(module).resized(16, 40)
    model.decompose(images(16, 40))
    model.verify(images(16, 40))
    model.encode_image(images(16, 40))
    assert torch.equal(torch.get_rng_state(), random)
    assert {path: set(vars(part)) for path, part in module.named_modules()} == attributes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert module.visual.image_size == (24, 24)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        assert torch.equal(module.encode_image(pixels), own)
    shared = {id(parameter) for parameter in module.parameters()}
    others = [tensor for tensor in model.tower.tensors() if id(tensor) not in shared]
    assert [tuple(tensor.shape) for tensor in others] == [(11, 32)]


def test_changed_positions_are_noticed() -> None:
    module = clip_model()
    model, pixels = clipfast.wrap(module, image_size=(16, 40)), images(16, 40)
    first = model.decompose(pixels).embedding
    with torch.no_grad():
        module.visual.positional_embedding.mul_(2)
    changed = model.decompose(pixels).embedding
    assert relative_error(changed, first) > 1e-2
    assert model.verify(pixels).ok
    module.visual.positional_embedding = nn.Parameter(module.visual.positional_embedding.detach() / 2)
    assert error(model.decompose(pixels).embedding, first) == 0
    module.visual.positional_embedding.data.mul_(2)
    assert error(model.decompose(pixels).embedding, changed) == 0


def test_wrapped_and_parametrised_towers() -> None:
    module = clip_model()
    expected = clipfast.wrap(module, image_size=(16, 40)).decompose(images(16, 40)).embedding
    parallel = clipfast.wrap(nn.DataParallel(module), image_size=(16, 40))
    assert torch.equal(parallel.decompose(images(16, 40)).embedding, expected)
    assert relative_error(parallel.encode_image(images(16, 40), normalize=False), expected) <= 1e-5

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(module.visual, "positional_embedding", Doubled())
    model = clipfast.wrap(module, image_size=(16, 40))
    assert relative_error(model.decompose(images(16, 40)).embedding, expected) > 1e-2
    assert model.verify(images(16, 40)).ok
    with torch.no_grad():
        module.visual.parametrizations.positional_embedding.original.div_(2)
    assert error(model.decompose(images(16, 40)).embedding, expected) == 0


def test_a_resized_model_keeps_the_projection() -> None:
    probe = torch.randn(20, 5, generator=torch.Generator().manual_seed(7))
    module, pixels = clip_model(), images(16, 40)
    plain = clipfast.wrap(module, image_size=(16, 40)).decompose(pixels).embedding
    result = clipfast.wrap(module, projection=probe).resized(16, 40).decompose(pixels)
    assert relative_error(result.embedding, plain @ probe) <= 1e-5


def test_a_resized_model_keeps_the_settings_of_its_model() -> None:
    model = clipfast.wrap(clip_model(), backend="eager", ignore_hooks=True)
    model.resized(40, 40)
    resized = model.resized(40, 40).resized(16, 40)
    assert resized.image_size == (16, 40)
    assert resized.module is model.module
    assert (resized.backend, resized.name, resized.pretrained) == ("eager", model.name, model.pretrained)
    assert torch.equal(resized.encode_text(["a star"]), model.encode_text(["a star"]))
    model.module.visual.register_forward_hook(lambda *_: None)
    assert resized.verify(images(16, 40)).ok


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((20, 24), r"images of 20 × 24 pixels are not whole patches of 8 × 8: try 16 × 24"),
        ((24, 3), r"images of 24 × 3 pixels are not whole patches of 8 × 8: try 24 × 8"),
        (0, r"image_size is 0: give height and width in pixels"),
        ((0, 24), r"image_size is \(0, 24\): give height and width"),
        ((24, -8), r"image_size is \(24, -8\): give"),
        ((24.0, 24), r"image_size is \(24\.0, 24\): give"),
        ((24, 24, 3), r"image_size is \(24, 24, 3\): give"),
        (True, r"image_size is True: give"),
        ("24", r"image_size is '24': give"),
    ],
)
def test_a_size_that_does_not_fit_is_one_line(size: Any, message: str) -> None:
    visual = vision_tower(0)
    with pytest.raises(InputError, match=message) as caught:
        clipfast.wrap(visual, image_size=size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [(0, 64), (60, 64)])
def test_so_it_is_where_a_model_is_loaded(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=r"give height and width|not whole patches of 8 × 8"):
        clipfast.load("scenes", device="cpu", image_size=size)


def test_positions_of_a_resnet_are_not_resampled() -> None:
    visual = ModifiedResNet(layers=(1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8).eval()
    with pytest.raises(InputError, match=r"96 × 64 pixels: open_clip resamples no positions .* are for 64 × 64$"):
        sized(visual, (96, 64))
    assert sized(visual, (64, 64)) is visual


PHOTOS = [Image.effect_noise((90, 60), 80).convert("RGB"), Image.effect_noise((33, 70), 80).convert("RGB")]


@pytest.mark.parametrize("size", [(96, 96), (32, 64), (64, 24)])
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
def test_images_are_prepared_by_open_clips_own_transform(mode: str, size: tuple[int, int]) -> None:
    module = clip_model()
    settings: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.2, 0.3), "interpolation": "bilinear"}
    module.visual.preprocess_cfg = {"size": 24, **settings, "resize_mode": mode, "fill_color": 7}
    expected = open_clip.image_transform(size, is_train=False, resize_mode=mode, fill_color=7, **settings)
    for model in (clipfast.wrap(module, image_size=size), clipfast.wrap(module).resized(*size)):
        assert torch.equal(model.prepare(PHOTOS), torch.stack([expected(photo) for photo in PHOTOS]))
    del module.visual.preprocess_cfg
    expected = open_clip.image_transform(size, is_train=False)
    assert torch.equal(clipfast.wrap(module, image_size=size).preprocess(PHOTOS[0]), expected(PHOTOS[0]))


def test_the_bundled_model_at_another_size() -> None:
    model = clipfast.load("scenes", device="cpu", image_size=(48, 80))
    assert model.image_size == (48, 80)
    assert model.prepare(PHOTOS).shape == (2, 3, 48, 80)
    assert model.verify(PHOTOS).ok
    assert torch.equal(model.prepare(PHOTOS), clipfast.load("scenes", device="cpu").resized(48, 80).prepare(PHOTOS))
