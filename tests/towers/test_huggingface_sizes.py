"""Models of transformers for images of another size: their own forward, and their own image processor."""

from pathlib import Path
from typing import Any

import pytest
import torch
from measures import relative_error
from PIL import Image
from torch import Tensor

import clipfast
from clipfast.errors import InputError, UnsupportedTower

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_models import MODELS, build  # noqa: E402

from clipfast.towers.huggingface_processors import Preprocess  # noqa: E402

PHOTOS = [Image.effect_noise((90, 60), 80).convert("RGB"), Image.effect_noise((33, 70), 80).convert("RGB")]


def images(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [(40, 40), (16, 40)])
@pytest.mark.parametrize("name", MODELS)
def test_the_embedding_is_that_of_the_modules_own_forward(name: str, size: tuple[int, int]) -> None:
    module = build(name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    model, pixels = clipfast.wrap(module).resized(*size), images(*size)
    result = model.decompose(pixels)
    assert result.grid == (size[0] // 8, size[1] // 8)
    assert result.max_error() <= 1e-5
    assert relative_error(result.embedding, model.encode_image(pixels, normalize=False)) <= 1e-5
    assert model.verify(pixels).ok
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", ["Dinov2Model", "CLIPModel", "SiglipModel", "ViTModel"])
def test_changed_positions_are_noticed(name: str) -> None:
    module: Any = build(name)
    model, pixels = clipfast.wrap(module, image_size=(16, 40)), images(16, 40)
    first = model.decompose(pixels).embedding
    with torch.no_grad():
        next(
            parameter for path, parameter in module.named_parameters() if "position" in path and "text" not in path
        ).mul_(3)
    assert relative_error(model.decompose(pixels).embedding, first) > 1e-3
    assert model.verify(pixels).ok


def own(processor: Any, photo: Image.Image, **options: Any) -> Tensor:
    pixels: Tensor = processor(images=photo, return_tensors="pt", **options)["pixel_values"][0]
    return pixels


PROCESSORS = {
    "shortest edge": lambda: transformers.CLIPImageProcessor(
        size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_mean=[0.5, 0.4, 0.3]
    ),
    "shortest edge and a smaller crop": lambda: transformers.BitImageProcessor(
        size={"shortest_edge": 30}, crop_size={"height": 24, "width": 24}
    ),
    "squash": lambda: transformers.SiglipImageProcessor(size={"height": 24, "width": 24}),
    "squash and a smaller crop": lambda: transformers.DeiTImageProcessor(
        size={"height": 30, "width": 30}, crop_size={"height": 24, "width": 24}
    ),
}


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (64, 16)])
@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_are_prepared_by_the_models_own_processor(kind: str, size: tuple[int, int], tmp_path: Path) -> None:
    build("Dinov2Model").save_pretrained(tmp_path)  # type: ignore[operator]
    processor = PROCESSORS[kind]()
    processor.save_pretrained(tmp_path)
    height, width = size
    crop = {"crop_size": {"height": height, "width": width}} if "crop" in kind or kind == "shortest edge" else {}
    zoom = 1.25 if "smaller" in kind else 1.0
    loaded = clipfast.load(str(tmp_path), device="cpu", image_size=size)
    wrapped = clipfast.wrap(type(loaded.module).from_pretrained(tmp_path).eval(), image_size=size)
    for photo in PHOTOS:
        if "squash" in kind:
            resized = {"height": round(height * zoom), "width": round(width * zoom)}
        elif height == width:
            resized = {"shortest_edge": round(height * zoom)}
        else:  # as small as covers the crop
            scale = zoom * max(height / photo.height, width / photo.width)
            resized = {"height": round(photo.height * scale), "width": round(photo.width * scale)}
        expected = own(processor, photo, size=resized, **crop)
        assert expected.shape == (3, *size)
        for model in (loaded, wrapped, clipfast.load(str(tmp_path), device="cpu").resized(*size)):
            assert torch.equal(model.preprocess(photo), expected)
    assert loaded.verify(PHOTOS).ok


def test_the_processors_own_size_is_its_own_result(tmp_path: Path) -> None:
    build("Dinov2Model").save_pretrained(tmp_path)  # type: ignore[operator]
    processor = PROCESSORS["shortest edge and a smaller crop"]()
    processor.save_pretrained(tmp_path)
    model = clipfast.load(str(tmp_path), device="cpu", image_size=48).resized(24, 24)
    assert type(model.preprocess) is Preprocess
    assert torch.equal(model.preprocess(PHOTOS[0]), own(processor, PHOTOS[0]))


def test_a_model_built_in_code_has_the_processor_of_its_class() -> None:
    model = clipfast.wrap(build("CLIPModel"), image_size=(16, 40))
    scale = max(16 / 60, 40 / 90)
    size = {"height": round(60 * scale), "width": round(90 * scale)}
    expected = own(transformers.CLIPImageProcessor(), PHOTOS[0], size=size, crop_size={"height": 16, "width": 40})
    assert torch.equal(model.preprocess(PHOTOS[0]), expected)


def test_images_of_naflex_are_grouped_by_their_grids() -> None:
    """The loop of the documentation: each image at its own aspect ratio, as the package's forward takes it."""
    module: Any = build("Siglip2VisionModel")
    model = clipfast.wrap(module)
    preprocess: Any = model.preprocess
    groups: dict[tuple[int, int], list[Image.Image]] = {}
    for photo in PHOTOS:
        groups.setdefault(preprocess.size_of(photo), []).append(photo)
    assert sorted(groups) == [(16, 24), (32, 16)]
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=9)
    for size, photos in groups.items():
        resized = model.resized(*size)
        result = resized.decompose(photos)
        assert result.grid == (size[0] // 8, size[1] // 8)
        with torch.no_grad():
            expected = module(**processor(images=photos, return_tensors="pt")).pooler_output
        assert relative_error(result.embedding, expected) <= 1e-5
        assert result.max_error() <= 1e-5
    with pytest.raises(InputError, match=r"becomes 16 × 24, .*image_size=\(16, 24\)"):
        model.resized(24, 24).prepare(PHOTOS[0])


def test_more_patches_of_naflex_than_its_processor_makes() -> None:
    model = clipfast.wrap(build("Siglip2Model"), image_size=(48, 72))
    pixels = model.prepare(PHOTOS[0])
    assert pixels.shape == (1, 3, 48, 72)
    assert model.verify(pixels).ok


@pytest.mark.parametrize("name", ["CLIPModel", "Dinov2Model", "DINOv3ViTModel", "Siglip2Model"])
def test_a_size_that_does_not_fit_is_one_line(name: str) -> None:
    for size in ((20, 24), (4, 24)):
        with pytest.raises(InputError, match=rf"{size[0]} × 24 pixels are not whole patches of 8 × 8"):
            clipfast.wrap(build(name), image_size=size)


@pytest.mark.parametrize("options", [{}, {"image_size": 32}])
def test_a_class_that_is_not_read_is_refused(options: dict[str, int]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50)).eval()
    with pytest.raises(UnsupportedTower, match=r"cannot decompose BertModel: not one of the classes that are read"):
        clipfast.wrap(module, **options)


def test_a_processor_that_cannot_be_given_a_size(tmp_path: Path) -> None:
    build("ViTModel").save_pretrained(tmp_path)  # type: ignore[operator]
    transformers.ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ViTImageProcessor gives no images of 40 × 40 pixels"):
        clipfast.load(str(tmp_path), device="cpu", image_size=40)
