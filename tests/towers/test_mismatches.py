"""Parts that do not belong together are named in one line, and what belongs together is not."""

import json
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from builders import clip_model, pixels, vision_tower
from huggingface_models import MODELS, TEXT, VISION
from safetensors.torch import save_file
from torch import nn

import clipfast
from clipfast import InputError, wrap
from clipfast.mismatches import mismatches
from clipfast.summary import Normalisation
from clipfast.towers import openclip_models
from clipfast.towers.tokenizers import facts_of

TINY = "tiny-of-a-test"


def said(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in record if warning.category is UserWarning]


def clip_with(vocabulary: int, context: int = 77) -> nn.Module:
    text = {"context_length": context, "vocab_size": vocabulary, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    return open_clip.CLIP(20, vision_cfg=vision, text_cfg=text).eval()


# ------------------------------------------------------------------------------------------------------ no alarms


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_are_silent(name: str, recwarn: pytest.WarningsRecorder) -> None:
    model = wrap(MODELS[name]().eval())
    assert model.mismatches() == []
    assert said(recwarn.list) == []


def test_models_of_open_clip_are_silent(recwarn: pytest.WarningsRecorder) -> None:
    for module in (clip_model(), clip_model().visual, vision_tower()):
        assert wrap(module).mismatches() == []
    clipfast.load("scenes", device="cpu")
    clipfast.load("ViT-S-32-alt", device="cpu")
    assert said(recwarn.list) == []


@pytest.mark.parametrize("rows", [49408, 49408 + 128, 49400])
def test_rows_that_are_rounded_up_are_no_mismatch(rows: int, recwarn: pytest.WarningsRecorder) -> None:
    wrap(clip_with(rows), tokenize=open_clip.SimpleTokenizer())
    assert said(recwarn.list) == []


def test_a_function_that_says_nothing_of_itself_is_not_judged(recwarn: pytest.WarningsRecorder) -> None:
    wrap(clip_with(100), tokenize=lambda texts: torch.zeros(len(texts), 5, dtype=torch.long))
    assert said(recwarn.list) == []


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP", "ViT-L-14-quickgelu", "MobileCLIP-S1"])
def test_every_tag_is_prepared_as_it_says(name: str) -> None:
    """open_clip's own preprocessing for a tag is the one that the list of tags has: there is nothing to say."""
    for tag in openclip_models.tags(name):
        trained = openclip_models.trained_on(name, tag)
        assert trained is not None
        config = open_clip.transform.PreprocessCfg(size=24, mean=trained["mean"], std=trained["std"])
        transform = open_clip.transform.image_transform_v2(config, is_train=False)
        visual = vision_tower()
        expected = Normalisation(tuple(trained["mean"]), tuple(trained["std"]))
        found = mismatches(visual, wrap(visual).tower, name=name, preprocess=transform, tokenize=None, trained=expected)
        assert found == []


# ----------------------------------------------------------------------------------------------------------- alarms


@pytest.mark.parametrize(("rows", "context"), [(100, 77), (256000, 77), (32000, 77)])
def test_another_vocabulary(rows: int, context: int) -> None:
    module = clip_with(rows, context)
    with pytest.warns(UserWarning, match=rf"^SimpleTokenizer knows 49408 tokens, and the text encoder of .* {rows}:"):
        wrap(module, tokenize=open_clip.SimpleTokenizer())


def test_another_length_of_texts() -> None:
    with pytest.warns(UserWarning, match=r"^SimpleTokenizer gives 32 tokens per text, and .* reads 77: pass tokenize"):
        wrap(clip_with(49408), tokenize=open_clip.SimpleTokenizer(context_length=32))


def test_the_warning_is_of_the_line_that_wraps() -> None:
    with pytest.warns(UserWarning, match="knows 49408 tokens") as caught:
        wrap(clip_with(100), tokenize=open_clip.SimpleTokenizer())
    assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]
    assert "\n" not in str(caught[0].message)


def hugging_face(source: str, **vision: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CLIPConfig(vision_config=VISION | vision, text_config=TEXT, projection_dim=20)
    module: Any = transformers.CLIPModel(config).eval()
    module.name_or_path = source
    return module


OPENAI_SIZES = {"hidden_size": 128, "num_attention_heads": 2}


def test_weights_of_openai_with_another_activation_or_head_dim() -> None:
    source = "openai/clip-vit-base-patch32"
    assert wrap(hugging_face(source, hidden_act="quick_gelu", **OPENAI_SIZES)).mismatches() == []
    assert wrap(hugging_face("someone/clip", hidden_act="gelu")).mismatches() == []
    with pytest.warns(UserWarning, match=rf"^{source} was trained with QuickGELU, and its config says gelu$"):
        wrap(hugging_face(source, hidden_act="gelu", **OPENAI_SIZES))
    with pytest.warns(UserWarning, match=rf"^{source} was trained with heads of 64, and its config says 32$"):
        wrap(hugging_face(source, hidden_act="quick_gelu", hidden_size=128, num_attention_heads=4))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A name of open_clip's with two tags, and the path of a checkpoint for it."""
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {**open_clip.factory._MODEL_CONFIGS, TINY: config})
    path = tmp_path / "own.safetensors"
    save_file(clip_with(49408).state_dict(), path)
    assert json.dumps(config)
    return path


def tag(mean: float, std: float = 0.5) -> dict[str, Any]:
    return {"url": "", "hf_hub": "", "mean": (mean,) * 3, "std": (std,) * 3}


def test_a_checkpoint_whose_name_is_always_trained_on_other_values(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    registry = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(registry, TINY, {"a": tag(0.5), "b": tag(0.5)})
    clipfast.load(TINY, str(tiny), device="cpu")
    (line,) = said(recwarn.list)
    trained = "was trained on images of mean 0.5/0.5/0.5 and standard deviation 0.5/0.5/0.5"
    assert line.startswith(f"{TINY} {trained}, and its preprocessing gives mean 0.481/0.458/0.408")


def test_a_checkpoint_whose_images_are_not_known(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    registry = open_clip.pretrained._PRETRAINED
    default = {"url": "", "hf_hub": ""}  # as CLIP's own
    for tags in ({}, {"a": tag(0.5), "b": tag(0.4)}, {"a": default}, {"a": default, "b": tag(0.5)}):
        monkeypatch.setitem(registry, TINY, tags)
        clipfast.load(TINY, str(tiny), device="cpu")
    clipfast.load(TINY, device="cpu")
    assert said(recwarn.list) == []


def test_heads_that_do_not_divide_are_refused() -> None:
    visual = vision_tower()
    model, images = wrap(visual), pixels(visual)
    for block in visual.transformer.resblocks:
        block.attn.num_heads = 5
    with pytest.raises(InputError, match=r"^5 heads do not divide the 32 numbers of VisionTransformer's attention"):
        model.decompose(images)


# -------------------------------------------------------------------------------------------------- tokenizers' facts


def test_what_tokenizers_say() -> None:
    assert facts_of(None) is None
    own = facts_of(open_clip.SimpleTokenizer(context_length=20))
    assert own == ("SimpleTokenizer", 49408, 20)
    wrapped = facts_of(wrap(clip_model())._tokenize)
    assert wrapped == ("SimpleTokenizer", 49408, 16)

    def plain(texts: list[str]) -> torch.Tensor:
        return torch.zeros(len(texts), 5)

    facts = facts_of(plain)
    assert facts is not None
    assert (facts.vocabulary, facts.context) == (None, None)
    assert facts.kind.endswith("plain")
