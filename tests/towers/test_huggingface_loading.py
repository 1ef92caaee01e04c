"""Folders that transformers wrote: weights, tokenizer and image processor are the package's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import clipfast
from clipfast.errors import InputError, ModelError, UnsupportedTower

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_models import MODELS, build, pixels  # noqa: E402

from clipfast.towers.huggingface_models import create  # noqa: E402
from clipfast.towers.huggingface_processors import PatchPreprocess  # noqa: E402

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "red", "star", "forest"]


def processor() -> Any:
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return transformers.CLIPImageProcessor(**sizes, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25])


def tokenizer(**options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, [("<bos>", 1), ("<eos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", **options
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("CLIPModel").save_pretrained(tmp_path)  # type: ignore[operator]
    processor().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def own_embedding(model: Any, images: Tensor) -> Tensor:
    with torch.no_grad():
        embedding: Tensor = model.get_image_features(pixel_values=images).pooler_output
    return embedding


def test_a_folder_is_loaded_with_all_that_belongs_to_it(folder: Path) -> None:
    model = clipfast.load(str(folder), device="cpu")
    expected = build("CLIPModel")
    assert model.pretrained is True
    assert torch.equal(model.encode_image(pixels(), normalize=False), own_embedding(expected, pixels()))
    assert model.verify(pixels()).ok
    photo = Image.effect_noise((60, 40), 80).convert("RGB")
    assert torch.equal(model.preprocess(photo), processor()(images=photo, return_tensors="pt")["pixel_values"][0])
    texts = ["a red star", "forest"]
    tokens = model.tokenize(texts)
    assert tokens.tolist() == [[1, 4, 5, 6, 2], [1, 7, 2, 0, 0]]
    maps = model.decompose([photo], texts=texts)
    assert maps.maps.shape == (1, 10, 2)
    alone = torch.cat([model.encode_text([text]) for text in texts])  # padding changes nothing
    torch.testing.assert_close(model.encode_text(texts), alone, rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="a text has 22 tokens, the model reads 16: shorten 'a a a"):
        model.encode_text(["a " * 20])


PHOTOS = [Image.effect_noise(size, 80).convert("RGB") for size in ((60, 40), (30, 50), (24, 24))]


def siglip_folder(folder: Path) -> Any:
    """SigLIP with a tokenizer that gives no mask, as its own."""
    model: Any = build("SiglipModel")
    model.save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    tokenizer(model_input_names=["input_ids"]).save_pretrained(folder)
    return model


def test_texts_of_siglip_are_padded_to_the_length_that_it_reads(tmp_path: Path) -> None:
    own = siglip_folder(tmp_path)
    model = clipfast.load(str(tmp_path), device="cpu")
    texts = ["a red star", "forest"]
    inputs = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        texts, padding="max_length", max_length=16, return_tensors="pt"
    )
    assert list(inputs) == ["input_ids"]
    assert torch.equal(model.tokenize(texts), inputs["input_ids"])
    with torch.no_grad():
        expected = own.get_text_features(**inputs).pooler_output
    assert torch.equal(model.encode_text(texts, normalize=False), expected)
    with pytest.raises(InputError, match="a text has 22 tokens, the model reads 16: shorten 'a a a"):
        model.encode_text(["a " * 20])


PROCESSORS: dict[str, Callable[[], Any]] = {
    "SiglipVisionModel": lambda: transformers.SiglipImageProcessor(size={"height": 24, "width": 24}, resample=2),
    "Dinov2Model": lambda: transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size=24),
    "DINOv3ViTModel": lambda: transformers.DINOv3ViTImageProcessor(size={"height": 24, "width": 24}),
    "ViTModel": lambda: transformers.ViTImageProcessor(size={"height": 24, "width": 24}),
    "IJepaModel": lambda: transformers.ViTImageProcessor(size={"height": 24, "width": 24}, image_std=[0.3, 0.4, 0.5]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_images_are_prepared_as_the_processor_in_the_folder_does(name: str, tmp_path: Path) -> None:
    own = PROCESSORS[name]()
    build(name).save_pretrained(tmp_path)  # type: ignore[operator]
    own.save_pretrained(tmp_path)
    module = type(build(name)).from_pretrained(tmp_path)  # type: ignore[attr-defined]
    for model in (clipfast.load(str(tmp_path), device="cpu"), clipfast.wrap(module.eval())):
        for photo in PHOTOS:
            expected = own(images=photo, return_tensors="pt")["pixel_values"]
            assert torch.equal(model.prepare(photo), expected)


def test_a_wrapped_model_brings_what_stands_where_it_was_loaded_from(tmp_path: Path) -> None:
    siglip_folder(tmp_path)
    module = transformers.SiglipModel.from_pretrained(tmp_path).eval()
    texts = ["a red star", "forest"]
    expected = clipfast.load(str(tmp_path), device="cpu").encode_text(texts)
    assert torch.equal(clipfast.wrap(module).encode_text(texts), expected)
    with pytest.raises(InputError, match="tokenize"):
        clipfast.wrap(build("SiglipModel")).encode_text(texts)


@pytest.mark.parametrize("name", ["Dinov2Model", "DINOv3ViTModel", "SiglipModel", "ViTModel"])
def test_positions_are_resampled_for_the_size_that_the_processor_gives(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DINOv2's models are made for 518 × 518 pixels, and their processors give 224 × 224."""
    own: Any = build(name)
    own.save_pretrained(tmp_path)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    processor.save_pretrained(tmp_path)
    model = clipfast.load(str(tmp_path), device="cpu")
    assert model.tower.image_size == (16, 16)
    small = model.prepare(PHOTOS)
    assert torch.equal(small, processor(images=PHOTOS, return_tensors="pt")["pixel_values"])
    result = model.verify(small)
    assert result.ok
    assert result.max_error <= 1e-5
    assert model.decompose(small).max_error() <= 1e-5
    with pytest.raises(InputError, match=r"expected \[images, 3, 16, 16\]"):
        model.decompose(pixels())
    wrapped = clipfast.wrap(type(own).from_pretrained(tmp_path).eval())
    assert "gives 16 × 16 pixels, and the model is for 24 × 24" in caplog.text
    assert wrapped.prepare(PHOTOS[2]).shape == (1, 3, 24, 24)
    processor.crop_size = {"height": 24, "width": 24}
    processor.save_pretrained(tmp_path)
    assert create(str(tmp_path), torch.device("cpu"), torch.float32).image_size is None


def test_images_of_naflex_keep_their_aspect_ratio(tmp_path: Path) -> None:
    """Patches are the processor's own to the bit, without its padding; an image of another shape says what to do."""
    build("Siglip2VisionModel").save_pretrained(tmp_path)  # type: ignore[operator]
    own = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=9)
    own.save_pretrained(tmp_path)
    preprocess: Any = create(str(tmp_path), torch.device("cpu"), torch.float32).preprocess
    assert torch.equal(preprocess(PHOTOS[2]), PatchPreprocess(own)(PHOTOS[2]))
    with pytest.raises(InputError, match=r"40 × 60 pixels becomes 16 × 24.* reads 24 × 24: .* image_size=\(16, 24\)$"):
        preprocess(PHOTOS[0])
    for photo, size in zip(PHOTOS, [(16, 24), (32, 16), (24, 24)], strict=True):
        assert preprocess.size_of(photo) == size
        pixels = PatchPreprocess(own)(photo)
        assert pixels.shape == (3, *size)
        out = own(images=photo, return_tensors="pt")
        rows, columns = out["spatial_shapes"][0].tolist()
        for index, patch in enumerate(out["pixel_values"][0][: rows * columns]):
            top, left = 8 * (index // columns), 8 * (index % columns)
            assert torch.equal(pixels[:, top : top + 8, left : left + 8], patch.view(8, 8, 3).permute(2, 0, 1))
    transformers.Siglip2ImageProcessor(patch_size=16).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="the image processor makes patches of 16 pixels"):
        create(str(tmp_path), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_a_processor_has_one_of_its_size(name: str) -> None:
    model = clipfast.wrap(build(name))
    assert model.prepare(Image.new("RGB", (24, 24))).shape == (1, 3, 24, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(folder: Path, dtype: torch.dtype) -> None:
    model = clipfast.load(str(folder), device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.module.parameters()} == {dtype}
    assert model.verify(pixels()).ok


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "Dinov2Model", "ViTModel"])
def test_vision_models_alone(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)  # type: ignore[operator]
    model = clipfast.load(str(tmp_path), device="cpu")
    assert type(model.module).__name__ == name
    assert model.verify(pixels()).ok
    assert model.prepare(Image.new("RGB", (50, 30))).shape == (1, 3, 24, 24)
    with pytest.raises(InputError, match="no text encoder"):
        model.encode_text(["a red star"])


def test_a_folder_named_like_the_bundled_model_does_not_stand_in_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("CLIPModel").save_pretrained(tmp_path / "scenes")  # type: ignore[operator]
    monkeypatch.chdir(tmp_path)
    assert type(clipfast.load("scenes", device="cpu").module).__name__ == "CLIP"


def test_what_cannot_be_loaded_is_one_line(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ModelError, match="brings its own weights: leave pretrained='openai' out"):
        clipfast.load(str(folder), "openai")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=f"^cannot read the model in {folder}: ") as caught:
        clipfast.load(str(folder), device="cpu")
    assert "\n" not in str(caught.value)
    other = tmp_path_factory.mktemp("bert")
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UnsupportedTower, match=r"not one of the classes that are read .* but BertModel"):
        clipfast.load(str(other), device="cpu")
    (other / "config.json").write_text(json.dumps({"model_type": "unheard of"}))
    with pytest.raises(ModelError, match=f"^cannot read the model in {other}: "):
        clipfast.load(str(other), device="cpu")
    with pytest.raises(ModelError, match=r"^cannot load nobody/nothing from the Hugging Face hub: "):
        clipfast.load("hf:nobody/nothing", device="cpu")
