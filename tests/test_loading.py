"""clipfast.load: names, tags, folders and checkpoint files; nothing here needs a network."""

import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import open_clip
import pytest
import torch
from builders import pixels, randomise
from measures import error, relative_error
from PIL import Image
from safetensors.torch import save_file
from tolerances import EMBEDDING_BFLOAT16, EMBEDDING_FLOAT32, FLOAT32

import clipfast
from clipfast import InputError, MissingExtra, ModelError, UnsupportedTower
from clipfast.towers import openclip, openclip_models

SMALL = "ViT-S-32-alt"  # the smallest vision transformer among open_clip's configs
CONFIG = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 24, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def small() -> open_clip.CLIP:
    return randomise(open_clip.create_model(SMALL), seed=3).eval()


@pytest.fixture(scope="module")
def checkpoint(small: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in small.state_dict().items()}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What open_clip saves a model as: its config and its weights."""
    place = tmp_path / "model"
    place.mkdir()
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 4.0]}
    config = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (place / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tiny().state_dict(), place / "open_clip_model.safetensors")
    return place


def tiny() -> open_clip.CLIP:
    model = open_clip.CLIP(CONFIG["embed_dim"], vision_cfg=CONFIG["vision_cfg"], text_cfg=CONFIG["text_cfg"])
    return randomise(model, seed=2).eval()


def refused(match: str, work: Callable[[], object], kind: type[Exception] = ModelError) -> str:
    with pytest.raises(kind, match=match) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------- names


def test_random_weights_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = clipfast.load(SMALL, device="cpu")
    assert [(record.name, record.levelname) for record in caplog.records] == [("clipfast", "WARNING")]
    assert caplog.messages[0].startswith(f"{SMALL} has random weights: give pretrained=")
    assert model.pretrained is False
    assert not model.module.training
    assert model.decompose(pixels(model.module.visual, 1)).max_error() <= EMBEDDING_FLOAT32
    assert model.encode_text(["a forest"]).shape == (1, 256)


@pytest.mark.parametrize("name", ["ViT-B-23", "ViT-S32", "vit-b-32"])
def test_an_unknown_name_suggests_similar_ones(name: str) -> None:
    message = refused(rf"^no model is called '{name}': did you mean ", lambda: clipfast.load(name))
    suggestions = message.split("did you mean ")[1].rstrip("?").split(", ")
    assert set(suggestions) <= {*openclip_models.names(), "scenes"}
    assert any(suggestion.startswith("ViT-") for suggestion in suggestions)


def test_an_unknown_name_without_suggestions() -> None:
    refused(r"^no model is called 'qqqq0000': see `clipfast models`$", lambda: clipfast.load("qqqq0000"))


def test_an_unknown_tag_lists_the_known_ones() -> None:
    refused(
        r"^pretrained='opnai' is neither a file nor a tag of ViT-B-32-quickgelu: its tags are openai, ",
        lambda: clipfast.load("ViT-B-32-quickgelu", "opnai"),
    )
    refused(r"neither a file nor a tag of ViT-S-32-alt: it has no tags$", lambda: clipfast.load(SMALL, "openai"))


@pytest.mark.parametrize(
    ("name", "pretrained"), [("ViT-B-32-quickgelu", "openai"), ("hf-hub:nobody/nothing-of-this-name", None)]
)
def test_weights_that_cannot_be_downloaded(name: str, pretrained: str | None) -> None:
    refused(rf"^cannot download the weights of {name}", lambda: clipfast.load(name, pretrained, device="cpu"))


def test_an_unsupported_model_is_refused() -> None:
    refused(
        "a nonlinear projection after the pooling",
        lambda: clipfast.load("convnext_large_d", device="cpu"),
        UnsupportedTower,
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_cannot_compute(dtype: torch.dtype) -> None:
    refused(
        "is not supported: choose float32, bfloat16, float16 or float64",
        lambda: clipfast.load(SMALL, dtype=dtype),
        InputError,
    )


def test_an_unknown_backend_is_refused(folder: Path) -> None:
    refused("unknown backend 'abacus'", lambda: clipfast.load(str(folder), backend="abacus"), InputError)


# ---------------------------------------------------------------------------------------------------- checkpoints


def assert_is(model: clipfast.Model, small: open_clip.CLIP) -> None:
    images = pixels(small.visual, 1)
    with torch.no_grad():
        assert relative_error(model.decompose(images).embedding, small.visual(images)) <= EMBEDDING_FLOAT32
    assert model.pretrained is True


def test_a_safetensors_checkpoint(small: open_clip.CLIP, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert_is(clipfast.load(SMALL, str(checkpoint), device="cpu"), small)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "wrapping", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {f"module.{k}": v for k, v in s.items()}]
)
def test_a_pickled_state_dict(wrapping: Callable[[dict], dict], small: open_clip.CLIP, tmp_path: Path) -> None:
    """Plain, as a training run saves it, and as a distributed one does."""
    torch.save(wrapping(small.state_dict()), tmp_path / "small.pt")
    assert_is(clipfast.load(SMALL, str(tmp_path / "small.pt"), device="cpu"), small)


def without_one(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "visual.ln_post.bias"}


def with_one_too_many(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {"visual.adapter": torch.ones(2)}


def with_one_narrower(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {"visual.proj": state["visual.proj"][:, 1:].contiguous()}


def of_another_model(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tiny().state_dict()


@pytest.mark.parametrize("change", [without_one, with_one_too_many, with_one_narrower, of_another_model])
def test_weights_that_do_not_fit(change: Callable[[dict], dict], small: open_clip.CLIP, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(change(small.state_dict()), path)
    refused(rf"^the checkpoint {path} does not fit {SMALL}: ", lambda: clipfast.load(SMALL, str(path), device="cpu"))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.slow
def test_damaged_checkpoints(suffix: str, small: open_clip.CLIP, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / f"damaged.{suffix}"
    if suffix == "safetensors":
        whole = checkpoint.read_bytes()
    else:
        torch.save(small.state_dict(), path)
        whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:1000], b"", b"<html>not found</html>" * 20):
        path.write_bytes(content)
        refused(str(path), lambda: clipfast.load(SMALL, str(path), device="cpu"))


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    for name, content in (("empty.pt", {}), ("number.pt", 3), ("list.pt", [torch.ones(2)])):
        torch.save(content, tmp_path / name)
        refused(name, lambda path=tmp_path / name: clipfast.load(SMALL, str(path), device="cpu"))


class Intruder:
    """Unpickled, it writes a file: what a checkpoint from anywhere could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("save", [torch.save, lambda data, path: path.write_bytes(pickle.dumps(data))])
def test_a_checkpoint_that_carries_code_is_not_run(save: Callable, small: open_clip.CLIP, tmp_path: Path) -> None:
    proof, path = tmp_path / "it ran", tmp_path / "checkpoint.pt"
    save({"logit_scale": small.logit_scale.detach(), "extra": Intruder(proof)}, path)
    refused(
        rf"^the checkpoint {path} holds more than weights and is not loaded: convert it to safetensors$",
        lambda: clipfast.load(SMALL, str(path), device="cpu"),
    )
    assert not proof.exists()
    torch.load(path, weights_only=False) if save is torch.save else pickle.loads(path.read_bytes())
    assert proof.exists(), "the intruder would not have done anything: this test shows nothing"


def test_a_folder_as_checkpoint_is_refused(tmp_path: Path) -> None:
    refused(rf"^pretrained={tmp_path} is a folder, not a checkpoint file$", lambda: clipfast.load(SMALL, str(tmp_path)))


@pytest.mark.parametrize(
    "wrapper",
    [
        "_orig_mod.{}",
        "module._orig_mod.{}",
        "_orig_mod.module.{}",
        "module.module.{}",
        "visual._orig_mod.",
        "visual.module.",
        "_orig_mod.visual._orig_mod.",
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.slow
def test_weights_saved_from_a_wrapped_model(wrapper: str, suffix: str, small: open_clip.CLIP, tmp_path: Path) -> None:
    """As torch.compile, DataParallel and DistributedDataParallel name them, around the model or its image tower."""

    def renamed(name: str) -> str:
        if "{}" in wrapper:
            return wrapper.format(name)
        outer = wrapper.split("visual.")[0]
        return f"{outer}{name}".replace(f"{outer}visual.", wrapper)

    state = {renamed(name): tensor.contiguous() for name, tensor in small.state_dict().items()}
    path = tmp_path / f"wrapped.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"state_dict": state}, path)
    assert_is(clipfast.load(SMALL, str(path), device="cpu"), small)


@pytest.mark.parametrize("suffix", ["zip", "pt", "safetensors"])
def test_a_zip_archive_is_named(suffix: str, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / f"weights.{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(checkpoint, "weights.safetensors")
    refused(
        rf"^the checkpoint {path} is a zip archive without weights of torch's: unpack it",
        lambda: clipfast.load(SMALL, str(path), device="cpu"),
    )


def test_a_hugging_face_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"vision_model.embeddings.class_embedding": torch.ones(4), "logit_scale": torch.ones(())}, path)
    refused(
        rf"^the checkpoint {path} holds a Hugging Face model's weights: open_clip's own format is needed",
        lambda: clipfast.load(SMALL, str(path), device="cpu"),
    )


# -------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_a_model_folder(prefix: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = clipfast.load(f"{prefix}{folder}", device="cpu")
    assert caplog.messages == []
    assert model.pretrained is True
    expected = tiny()
    images = pixels(expected.visual)
    with torch.no_grad():
        assert relative_error(model.decompose(images).embedding, expected.visual(images)) <= EMBEDDING_FLOAT32
    assert model.encode_text(["a forest"]).shape == (1, 20)
    black = model.preprocess(Image.new("RGB", (24, 24)))
    its_own = torch.tensor([-0.1, -0.1, -0.075])  # (0 − mean) / std of its config
    assert error(black[:, 0, 0], its_own) <= FLOAT32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, folder: Path) -> None:
    model = clipfast.load(str(folder), device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in model.module.parameters()} == {dtype}
    contributions = model.decompose(pixels(model.module.visual))
    expected = clipfast.load(str(folder), device="cpu").decompose(pixels(model.module.visual))
    assert contributions.embedding.dtype == dtype
    assert relative_error(contributions.embedding, expected.embedding) <= EMBEDDING_BFLOAT16


def test_a_folder_that_holds_no_model(tmp_path: Path, folder: Path) -> None:
    refused(r"^the folder .* holds no open_clip_config.json$", lambda: clipfast.load(str(tmp_path / "model" / "..")))
    refused(r"^the folder .* holds no open_clip_config.json$", lambda: clipfast.load(f"local-dir:{tmp_path}/nowhere"))
    refused("brings its own weights: leave pretrained='openai' out", lambda: clipfast.load(str(folder), "openai"))
    (folder / "open_clip_model.safetensors").write_bytes(b"no weights at all")
    refused(str(folder), lambda: clipfast.load(str(folder), device="cpu"))
    (folder / "open_clip_config.json").write_text("{not json")
    refused(str(folder), lambda: clipfast.load(str(folder), device="cpu"))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    refused(str(folder), lambda: clipfast.load(str(folder), device="cpu"))


def test_a_hugging_face_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"]}))
    hint = r"it is a Hugging Face model \(model_type clip\): load the folder by itself"
    refused(rf"is a folder, not a checkpoint file: {hint}", lambda: clipfast.load(SMALL, str(tmp_path)))


def test_a_folder_whose_weights_do_not_fit_names_them(folder: Path) -> None:
    path = folder / "open_clip_model.safetensors"
    save_file({**tiny().state_dict(), "visual.proj": torch.ones(3, 3)}, path)
    refused(rf"^the checkpoint {path} does not fit local-dir:{folder}: ", lambda: clipfast.load(str(folder)))


def test_a_folder_saved_from_a_compiled_model(folder: Path) -> None:
    state = {f"_orig_mod.{name}": tensor for name, tensor in tiny().state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    images = pixels(tiny().visual)
    with torch.no_grad():
        expected = tiny().visual(images)
    model = clipfast.load(str(folder), device="cpu")
    assert relative_error(model.decompose(images).embedding, expected) <= EMBEDDING_FLOAT32


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"model_cfg": 3}', '{"model_cfg": {"vision_cfg": {}}}', "[" * 100_000]
)
def test_a_folder_whose_config_is_something_else(content: str, folder: Path) -> None:
    (folder / "open_clip_config.json").write_text(content)
    refused(rf"^cannot read {folder}/open_clip_config.json: ", lambda: clipfast.load(str(folder)))


# ------------------------------------------------------------------------------------------- before any download


@pytest.mark.parametrize(
    ("name", "tag", "key"),
    [
        ("convnext_large_d", "laion2b_s26b_b102k_augreg", "mlp_head"),
    ],
)
def test_a_refused_tower_is_refused_before_its_weights_are_downloaded(
    name: str, tag: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*arguments: object, **options: object) -> str:
        pytest.fail("weights were asked for")

    monkeypatch.setattr("open_clip.factory.download_pretrained", download)
    refused(re.escape(openclip.REFUSALS[key]), lambda: clipfast.load(name, tag, device="cpu"), UnsupportedTower)


def test_a_folder_with_a_refused_tower_is_refused_before_its_weights_are_read(folder: Path) -> None:
    vision = {**CONFIG["vision_cfg"], "pool_type": "none"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**CONFIG, "vision_cfg": vision}}))
    (folder / "open_clip_model.safetensors").write_bytes(b"damaged")
    refused("no pooling", lambda: clipfast.load(str(folder)), UnsupportedTower)


# ------------------------------------------------------------------------------------------------------- what is said


def test_loading_says_which_device_it_took(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="clipfast"):
        clipfast.load(str(folder), device="cpu", dtype=torch.float64)
    assert caplog.messages == [f"{folder} is loaded on cpu in float64"]


def test_a_model_shows_what_it_is(folder: Path) -> None:
    loaded = clipfast.load(str(folder), device="cpu")
    size = "2 layers of 2 heads, 32 → 20"
    assert repr(loaded).startswith(f"Model({folder}, cpu, float32, {size}, backend auto (")
    assert "eager)" in repr(loaded)
    wrapped = clipfast.wrap(loaded.module.double(), backend="eager")
    assert repr(wrapped) == f"Model(VisionTransformer, cpu, float64, {size}, backend eager)"


# ----------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize(
    ("name", "pretrained", "advice"),
    [
        (
            "ViT-B-32",
            "openai",
            "openai was trained with QuickGELU, but ViT-B-32 is built with GELU: use ViT-B-32-quickgelu",
        ),
        ("ViT-B-32", "weights/openai_b32.pt", "use ViT-B-32-quickgelu"),
        ("ViT-L-14", "my-QuickGELU-run.safetensors", "use ViT-L-14-quickgelu"),
        ("ViT-B-32-quickgelu", "openai", None),
        ("ViT-B-32", "laion2b_s34b_b79k", None),
        ("ViT-B-32", "weights/finetuned.pt", None),
        ("ViT-B-32", None, None),
    ],
)
def test_activation_mismatch(name: str, pretrained: str | None, advice: str | None) -> None:
    warning = openclip_models.activation_mismatch(name, pretrained)
    assert (warning is None) == (advice is None)
    assert advice is None or warning.endswith(advice)


def test_advice_names_another_model_that_exists() -> None:
    """Over every name and tag there is: the model to use instead is built with the right activation."""
    for name in openclip_models.names():
        for tag in openclip_models.tags(name):
            warning = openclip_models.activation_mismatch(name, tag)
            advice = re.search(r"use (\S+)$", warning or "")
            if advice is None:
                continue
            other = advice[1]
            assert other in openclip_models.names(), f"{name}, {tag}: {warning}"
            assert other != name, f"{name}, {tag}: {warning}"
            assert openclip_models.activation_mismatch(other, tag) is None


def test_an_activation_mismatch_is_warned_about(checkpoint: Path, tmp_path: Path) -> None:
    named = tmp_path / "openai.safetensors"
    named.symlink_to(checkpoint)
    with pytest.warns(UserWarning, match="was trained with QuickGELU, but ViT-S-32-alt is built with GELU") as caught:
        clipfast.load(SMALL, str(named), device="cpu")
    assert caught[0].filename == __file__  # it points at the caller's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clipfast.load(SMALL, str(checkpoint), device="cpu")


@pytest.mark.skipif(find_spec("transformers") is not None, reason="transformers is installed: nothing is missing")
def test_a_missing_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"roberta-ViT-B-32 needs the package transformers: .*clipfast\[hf\]"):
        clipfast.load("roberta-ViT-B-32", device="cpu")


def test_an_image_as_checkpoint_is_refused(tmp_path: Path) -> None:
    picture = tmp_path / "weights.jpg"
    Image.new("RGB", (8, 8)).save(picture)
    with pytest.raises(ModelError, match=r"weights\.jpg: neither safetensors nor a file that torch wrote$"):
        clipfast.load(SMALL, str(picture), device="cpu")
