"""OpenAI's weights by path: state dicts and TorchScript archives, as ``openai:PATH`` and for open_clip's names."""

from pathlib import Path
from typing import Any

import open_clip
import openai_package
import pytest
import torch
from builders import randomise
from measures import relative_error
from open_clip.model import build_model_from_openai_state_dict, convert_weights_to_fp16
from safetensors.torch import save_file
from tolerances import EMBEDDING_FLOAT32
from torch import nn

import clipfast
from clipfast import InputError, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")

SMALL = "ViT-S-32-alt"
TRACING = {"check_trace": False, "strict": False}


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object, **options: object) -> None:
        pytest.fail("torch.jit.load compiles the code of an archive")

    monkeypatch.setattr(torch.jit, "load", load)


def small() -> open_clip.CLIP:
    """open_clip's model of OpenAI's structure with two layers of two heads, random, in half precision where its is."""
    made = open_clip.CLIP(
        20,
        vision_cfg={"image_size": 64, "patch_size": 16, "width": 128, "layers": 2},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
        quick_gelu=True,
    )
    return randomise(made, seed=3).eval()


def archived(clip: nn.Module, path: Path) -> str:
    """A model as OpenAI publishes it: traced, half precision."""
    images, tokens = torch.randn(2, 3, 64, 64), openai_package.tokens()
    traced: Any = torch.jit.trace(clip, (images, tokens), **TRACING)
    convert_weights_to_fp16(clip)
    halves = {name for name, tensor in clip.named_parameters() if tensor.dtype == torch.float16}
    for name, tensor in traced.named_parameters():
        tensor.data = tensor.data.half() if name in halves else tensor.data
    assert halves
    traced.save(str(path))
    return str(path)


def own_embedding(clip: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return clip.visual(images)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("kind", ["archive", "state dict", "safetensors", "sizes", "wrapped"])
def test_a_model_is_built_from_the_weights_alone(kind: str, tmp_path: Path) -> None:
    clip = small()
    path = str(tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt"))
    state = clip.state_dict()
    if kind == "archive":
        archived(clip, tmp_path / "weights.pt")
        clip.float()
    elif kind == "safetensors":
        save_file(state, path)
    elif kind == "sizes":  # as in a state dict that torch.jit.load gave
        torch.save({**state, "input_resolution": torch.tensor(64), "vocab_size": torch.tensor(49408)}, path)
    else:
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": wrapped} if kind == "wrapped" else state, path)
    model = clipfast.load(f"openai:{path}", device="cpu")
    assert (model.name, model.pretrained) == (f"openai:{path}", True)
    assert not model.module.training
    assert {name: tensor.dtype for name, tensor in model.module.named_parameters()} == dict.fromkeys(
        dict(clip.named_parameters()), torch.float32
    )
    images = openai_package.pixels()
    assert torch.equal(model.encode_image(images, normalize=False), own_embedding(clip, images))
    contributions = model.decompose(images, texts=["a red star"])
    assert contributions.max_error() <= EMBEDDING_FLOAT32
    assert relative_error(contributions.embedding, own_embedding(clip, images)) <= EMBEDDING_FLOAT32
    assert torch.equal(model.tokenize(["a red star"]), open_clip.SimpleTokenizer(context_length=16)(["a red star"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    path = archived(small(), tmp_path / "weights.pt")
    model = clipfast.load(f"openai:{path}", device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.module.parameters()} == {dtype}
    assert model.verify(openai_package.pixels()).ok


@pytest.mark.slow
def test_an_archive_as_a_checkpoint_of_an_open_clip_name(tmp_path: Path) -> None:
    """Its weights go into open_clip's model, positions resampled where the sizes differ."""
    clip = randomise(open_clip.create_model(f"{SMALL}"), seed=4).eval()
    traced = torch.jit.trace(clip, (torch.randn(2, 3, 224, 224), torch.ones(2, 77, dtype=torch.long)), **TRACING)
    traced.save(str(tmp_path / "clip.pt"))
    model = clipfast.load(SMALL, str(tmp_path / "clip.pt"), device="cpu")
    assert {name: error(name, tensor, clip) for name, tensor in model.module.state_dict().items()} == dict.fromkeys(
        clip.state_dict(), True
    )


def error(name: str, tensor: torch.Tensor, clip: nn.Module) -> bool:
    return torch.equal(tensor, clip.state_dict()[name])


def test_the_activation_is_what_the_archive_says(tmp_path: Path) -> None:
    plain = open_clip.CLIP(
        20,
        vision_cfg={"image_size": 64, "patch_size": 16, "width": 128, "layers": 2},
        text_cfg={"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    )
    plain = randomise(plain, seed=3).eval()
    assert (
        clipfast.load(f"openai:{archived(small(), tmp_path / 'a.pt')}", device="cpu").tower.activation == "quick_gelu"
    )
    assert clipfast.load(f"openai:{archived(plain, tmp_path / 'b.pt')}", device="cpu").tower.activation == "gelu"


def test_an_archive_of_another_activation_than_the_name_is_warned_about(tmp_path: Path) -> None:
    path = archived(small(), tmp_path / "clip.pt")
    with (
        pytest.warns(UserWarning, match="was trained with QuickGELU, but ViT-B-32 is built with GELU"),
        pytest.raises(ModelError, match="does not fit ViT-B-32"),
    ):
        clipfast.load("ViT-B-32", path, device="cpu")


def refused(match: str, name: str, **options: Any) -> None:
    with pytest.raises((ModelError, InputError), match=match) as caught:
        clipfast.load(name, device="cpu", **options)
    assert "\n" not in str(caught.value)


def test_what_is_no_openai_checkpoint(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.pt"
    refused(rf"^openai:{nowhere}: there is no file {nowhere}$", f"openai:{nowhere}")
    path = tmp_path / "other.pt"
    torch.save({"weight": torch.ones(2)}, path)
    refused(rf"^the checkpoint {path} is none of OpenAI's CLIP: it has no weights text_projection, ", f"openai:{path}")
    refused("brings its own weights: leave pretrained='openai' out", f"openai:{path}", pretrained="openai")
    refused("is not supported: choose float32", f"openai:{path}", dtype=torch.int32)
    state = small().state_dict()
    torch.save({**state, "visual.proj": torch.ones(3, 3)}, path)
    refused(rf"^the checkpoint {path} does not fit OpenAI's CLIP: ", f"openai:{path}")
    torch.save({name: tensor for name, tensor in state.items() if name != "visual.class_embedding"}, path)
    refused(rf"^the checkpoint {path} does not fit OpenAI's CLIP: ", f"openai:{path}")
    torch.save(small(), path)
    refused(rf"^the checkpoint {path} holds more than weights and is not loaded", f"openai:{path}")
    path.write_bytes(b"no weights at all")
    refused(str(path), f"openai:{path}")
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    refused(rf"^the checkpoint {path} is none of OpenAI's CLIP", f"openai:{path}")
    refused(rf"^the checkpoint {path} does not fit {SMALL}: ", SMALL, pretrained=str(path))


def test_the_builder_is_open_clips(tmp_path: Path) -> None:
    """The model is the one that open_clip makes of the same weights."""
    clip = small()
    path = tmp_path / "weights.pt"
    torch.save(clip.state_dict(), path)
    expected = build_model_from_openai_state_dict(clip.state_dict(), cast_dtype=torch.float32).float()
    loaded = clipfast.load(f"openai:{path}", device="cpu").module
    assert repr(loaded) == repr(expected)
