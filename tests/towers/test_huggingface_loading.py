"""Folders that transformers wrote: weights, tokenizer and image processor are the package's own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import clipfast
from clipfast.errors import InputError, ModelError, UnsupportedTower

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_models import build, pixels  # noqa: E402

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "red", "star", "forest"]


def processor() -> Any:
    sizes = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    return transformers.CLIPImageProcessor(**sizes, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.25])


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing("<bos> $A <eos>", None, [("<bos>", 1), ("<eos>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
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
