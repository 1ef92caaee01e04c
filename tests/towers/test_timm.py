"""timm's models: the decomposition against their own forward, what they leave untouched, refusals, loading."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from builders import ROOT
from measures import error, relative_error
from open_clip.timm_model import TimmModel
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import vision_transformer as vits
from timm_small import FLAGS, build_open_clip, eva, flagged, pixels, randomised, rotary, vit
from tolerances import EMBEDDING_BFLOAT16, EMBEDDING_FLOAT32, SUM_BFLOAT16, SUM_FLOAT32
from torch import nn

import clipfast
from clipfast.errors import InputError, ModelError, UnsupportedTower
from clipfast.towers import timm_towers
from clipfast.towers.patches import CHANGED

every_flag = pytest.mark.parametrize("flag", FLAGS)


@every_flag
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_every_flag_decomposes(flag: str, dtype: torch.dtype, tolerance: float) -> None:
    module = flagged(flag, dtype)
    model = clipfast.wrap(module)
    images = pixels(model.tower.image_size, dtype=dtype)
    with torch.no_grad():
        own = module(images)
    has_depths = model.tower.blocks and model.tower.pooling != "cls"
    for depth in ("pool", "all") if has_depths else (None,):
        contributions = model.decompose(images, depth=depth, attention=True)
        assert relative_error(contributions.embedding, own) <= tolerance
        assert contributions.max_error() <= tolerance
    result = model.verify(images)
    assert result.ok
    assert result.max_error <= tolerance


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16", "PE-Core-B-16", "convnext_base", "MobileCLIP-S1"])
def test_trunks_of_open_clip_decompose(name: str) -> None:
    module = build_open_clip(name)
    model = clipfast.wrap(module)
    images = pixels(model.tower.image_size)
    contributions = model.decompose(images)
    with torch.no_grad():
        assert relative_error(contributions.embedding, module(images)) <= EMBEDDING_FLOAT32
    assert contributions.max_error() <= SUM_FLOAT32
    assert model.verify(images).ok


@pytest.mark.parametrize("flag", ["class token", "attention pool", "several in parallel", "rotary, mixed, any size"])
def test_half_precision(flag: str) -> None:
    module = flagged(flag, torch.bfloat16)
    model = clipfast.wrap(module)
    images = pixels(model.tower.image_size, dtype=torch.bfloat16)
    contributions = model.decompose(images)
    assert relative_error(contributions.embedding, flagged(flag)(images.float()).detach()) <= EMBEDDING_BFLOAT16
    assert contributions.max_error() <= SUM_BFLOAT16


@pytest.mark.slow
@every_flag
def test_a_model_is_left_as_it_is(flag: str) -> None:
    module = flagged(flag)
    images = pixels(clipfast.wrap(flagged(flag)).tower.image_size)
    with torch.no_grad():
        own = module(images)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    attributes = {path: set(vars(part)) for path, part in module.named_modules()}
    modes = [part.training for part in module.modules()]
    random = torch.get_rng_state()
    model = clipfast.wrap(module)
    model.decompose(images).heads()
    assert model.verify(images).ok
    assert torch.equal(random, torch.get_rng_state())
    assert {path: set(vars(part)) for path, part in module.named_modules()} == attributes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    with torch.no_grad():
        assert torch.equal(module(images), own)


@every_flag
def test_every_weight_is_watched(flag: str) -> None:
    """Some are shared, of others the tower's tensors are views, or computed: those stand in ``sources``."""
    module = flagged(flag)
    watched = set(map(id, clipfast.wrap(module).tower.tensors()))
    weights = [
        *module.named_parameters(),
        *((n, each) for n, each in module.named_buffers() if each.dtype.is_floating_point),
    ]
    assert [name for name, tensor in weights if id(tensor) not in watched] == []


@pytest.mark.slow
@every_flag
def test_changed_weights_are_seen(flag: str) -> None:
    module = flagged(flag, torch.float64)
    model = clipfast.wrap(module)
    images = pixels(model.tower.image_size, dtype=torch.float64)
    for change in ("in place", "replaced"):
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point() and tensor.ndim:
                    factor = 1.1 if change == "in place" else 0.9
                    if change == "in place":
                        tensor.mul_(factor)
                    else:
                        tensor.data = tensor.data * factor
            own = module(images)
        assert relative_error(model.decompose(images).embedding, own) <= 1e-10


def test_a_model_can_change_its_dtype() -> None:
    module = flagged("Eva, registers")
    model = clipfast.wrap(module)
    images = pixels(model.tower.image_size)
    model.decompose(images)
    module.double()
    assert relative_error(model.decompose(images).embedding, module(images.double()).detach()) <= 1e-11


@pytest.mark.parametrize("flag", ["class token", "packed SwiGLU", "several in parallel", "rotary", "FastViT"])
def test_computed_weights_are_read(flag: str) -> None:
    module = flagged(flag, torch.float64)
    for layer in [layer for layer in module.modules() if isinstance(layer, nn.Linear)]:
        nn.utils.parametrizations.weight_norm(layer)
    model = clipfast.wrap(module)
    images = pixels(model.tower.image_size, dtype=torch.float64)
    for factor in (1.0, 1.5):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("original0"):
                    parameter.mul_(factor)
            own = module(images)
        assert relative_error(model.decompose(images).embedding, own) <= 1e-11
    assert model.verify(images).ok


def test_whatever_is_wrapped_around_a_model_is_looked_through() -> None:
    module = flagged("class token")
    images = pixels((32, 32))
    plain = clipfast.wrap(module).decompose(images).embedding
    assert torch.equal(clipfast.wrap(nn.DataParallel(module)).decompose(images).embedding, plain)


# ------------------------------------------------------------------------------------------------------- refusals


class Own(vits.VisionTransformer):
    """Somebody's subclass, whose pooling may be anything."""

    def pool(self, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        return x[:, 1]


class Subclass(vits.VisionTransformer):
    """Somebody's subclass, whose forward is the same."""


def changed(change: Callable[[Any], object], model: Any = None) -> nn.Module:
    """A model in eval mode after ``change(model)``."""
    model = (vit() if model is None else model).eval()
    change(model)
    return model


def gate(model: Any) -> None:
    model.blocks[1].attn.gate = nn.Linear(32, 32)


def place_queries(model: Any) -> None:
    settings = {"pos_embed": "abs", "feat_size": 16, "norm_layer": timm.layers.LayerNorm}
    model.attn_pool = timm.layers.AttentionPoolLatent(32, num_heads=4, **settings)


def trunk(**settings: Any) -> nn.Module:
    """open_clip's wrapper around a small trunk."""
    return TimmModel("test_vit", embed_dim=16, image_size=160, **settings)


def own_pooling() -> nn.Module:
    model: Any = trunk(proj="")
    model.head = nn.Sequential(timm.layers.RotAttentionPool2d(64, out_features=16))
    return model


MODULES: dict[str, Callable[[], nn.Module]] = {
    "timm_class": lambda: Own(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2),
    "no_pool": lambda: vit(global_pool=""),
    "max_pool": lambda: vit(global_pool="avgmax"),
    "mlp_head": lambda: trunk(proj="mlp"),
    "head_pool": own_pooling,
    "differential": lambda: vit(attn_layer="diff"),
    "gate": lambda: changed(gate),
    "branches": lambda: vit(block_fn=vits.ParallelThingsBlock, qk_norm=True),
    "pool_positions": lambda: changed(place_queries, vit(global_pool="map", class_token=False)),
    "timm_activation": lambda: vit(act_layer=nn.ReLU),
    "channels": lambda: vit(in_chans=4),
    "grid": lambda: vit(img_size=36, dynamic_img_size=True, dynamic_img_pad=True),
    "batch_norm": lambda: timm.create_model("fastvit_mci0", layers=(1,) * 4, embed_dims=(16, 32, 32, 64)).train(),
    "training": lambda: vit(drop_path_rate=0.1).train(),
    "replaced": lambda: changed(lambda model: setattr(model.blocks[0], "norm1", nn.BatchNorm1d(32))),
    "hook": lambda: changed(lambda model: model.blocks[0].register_forward_hook(lambda *_: None)),
    "forward": lambda: changed(lambda model: setattr(model.blocks[0].mlp, "forward", lambda x: x)),
}


def test_every_refusal_has_a_module() -> None:
    assert set(MODULES) >= set(timm_towers.REFUSALS) - set(CHANGED)
    assert set(MODULES) <= set(timm_towers.REFUSALS)


@pytest.mark.parametrize("key", MODULES)
def test_each_reason_is_reached_alone(key: str) -> None:
    module = MODULES[key]()
    if key not in ("training", "batch_norm"):
        module.eval()
    with pytest.raises(UnsupportedTower) as caught:
        clipfast.wrap(module)
    assert [reason.split(" (")[0] for reason in caught.value.reasons] == [timm_towers.REFUSALS[key].split(" (")[0]]
    assert "\n" not in str(caught.value)


def test_all_reasons_stand_in_one_message() -> None:
    model = changed(gate, vit(act_layer=nn.ReLU, global_pool="max"))
    keys = {key for key, _ in timm_towers.refusals(model)}
    assert keys == {"gate", "timm_activation", "max_pool"}


def test_random_positions_of_training_are_refused() -> None:
    model = rotary(rope_type="dinov3", rope_shift_coords=0.1)
    assert [key for key, _ in timm_towers.refusals(model.train())] == ["training"]
    assert timm_towers.refusals(model.eval()) == []


@pytest.mark.parametrize(("mode", "expected"), [(True, ["training"]), (False, [])])
def test_dropout_that_is_no_layer_is_seen(mode: bool, expected: list[str]) -> None:
    model = timm.create_model("test_resnet", norm_layer=timm.layers.GroupNorm1, drop_rate=0.1).train(mode)
    assert [key for key, _ in timm_towers.refusals(model)] == expected


def test_a_size_that_a_network_does_not_divide_is_refused_until_another_is_given() -> None:
    model = timm.create_model("efficientnet_b1").eval()
    assert [key for key, _ in timm_towers.refusals(model)] == ["grid"]
    assert clipfast.wrap(model, image_size=64).verify(pixels((64, 64))).ok


def test_dropout_in_eval_mode_decomposes() -> None:
    rates = {f"{name}_rate": 0.5 for name in ("drop", "pos_drop", "patch_drop", "proj_drop", "attn_drop", "drop_path")}
    for make in (vit, eva):
        model = randomised(make(**rates)).eval()
        images = pixels((32, 32))
        with torch.no_grad():
            own = model(images)
        assert relative_error(clipfast.wrap(model).decompose(images).embedding, own) <= EMBEDDING_FLOAT32


def test_a_subclass_with_the_same_forward_is_read() -> None:
    model = randomised(Subclass(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)).eval()
    assert clipfast.wrap(model).verify(pixels((32, 32))).ok


def test_a_classifier_and_a_projection_are_one_map() -> None:
    model: Any = trunk(proj="linear")
    model.trunk.reset_classifier(64)
    model = randomised(model).double().eval()
    images = pixels((160, 160), dtype=torch.float64)
    wrapped = clipfast.wrap(model)
    for _ in range(2):
        with torch.no_grad():
            assert relative_error(wrapped.decompose(images).embedding, model(images)) <= 1e-11
            model.trunk.head.bias.mul_(3)


def test_an_evaluated_trunk_alone_is_read_where_its_head_is_refused() -> None:
    model: Any = trunk(proj="mlp").eval()
    assert clipfast.wrap(model.trunk).verify(pixels((160, 160))).ok


def test_the_documentation_lists_every_reason_with_advice() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", page, re.MULTILINE))
    assert [sentence for sentence in timm_towers.REFUSALS.values() if not rows.get(sentence)] == []


# -------------------------------------------------------------------------------------------------------- loading

NAME = "timm:test_vit"


def picture() -> Image.Image:
    levels = torch.randint(0, 256, (90, 120, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(levels.numpy())


def test_a_name_gives_random_weights_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "clipfast"):
        model = clipfast.load(NAME, device="cpu")
    assert "random weights" in caplog.text
    assert model.pretrained is False
    assert model.verify(picture()).ok


def test_images_are_prepared_as_timm_does() -> None:
    for name in ("test_vit", "test_vit4", "vit_tiny_patch16_224"):
        module = timm.create_model(name).eval()
        transform = create_transform(**resolve_model_data_config(module), is_training=False)
        expected = transform(picture())
        assert torch.equal(clipfast.wrap(module).prepare(picture())[0], expected)
    assert torch.equal(clipfast.load("timm:vit_tiny_patch16_224", device="cpu").prepare(picture())[0], expected)


def test_images_are_prepared_for_the_size_that_a_model_was_made_for() -> None:
    module = timm.create_model("vit_tiny_patch16_224", img_size=(64, 96), depth=1).eval()
    assert clipfast.wrap(module).prepare(picture()).shape == (1, 3, 64, 96)


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_checkpoint_is_loaded(kind: str, tmp_path: Path) -> None:
    module = randomised(timm.create_model("test_vit")).eval()
    path = tmp_path / f"weights.{kind}"
    if kind == "pt":
        torch.save({"state_dict": module.state_dict()}, path)
    else:
        save_file(module.state_dict(), path)
    model = clipfast.load(NAME, str(path), device="cpu", dtype=torch.float64)
    assert model.pretrained is True
    images = pixels((160, 160), dtype=torch.float64)
    assert error(model.decompose(images).embedding, module.double()(images).detach()) <= 1e-9


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit2").state_dict(), tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    cases: list[tuple[str, str | None, type[Exception], str]] = [
        ("timm:vit_base_patch61_224", None, ModelError, "did you mean vit_base_patch16_224"),
        (NAME, "no_such_tag", ModelError, "neither a file nor a tag of timm's test_vit: its tags are r160_in1k"),
        ("timm:test_vit.r160_in1k", "other", ModelError, "leave pretrained='other' out"),
        (NAME, str(tmp_path / "other.pt"), ModelError, "cannot load timm:test_vit with"),
        (NAME, str(tmp_path / "broken.pt"), ModelError, "cannot load timm:test_vit with"),
        ("timm:hf-hub:timm/test_vit", "tag", ModelError, "brings its own weights"),
        ("timm:mobilenetv3_small_050", None, UnsupportedTower, "not one of timm's classes that are read"),
    ]
    for name, pretrained, kind, message in cases:
        with pytest.raises(kind) as caught:
            clipfast.load(name, pretrained, device="cpu")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):  # no network: the weights of a tag that there is
        clipfast.load("timm:test_vit.r160_in1k", device="cpu")
    with pytest.raises(InputError):
        clipfast.load(NAME, dtype=torch.int64, device="cpu")


def test_there_are_no_texts() -> None:
    model = clipfast.load(NAME, device="cpu")
    for texts in (["a text"], torch.zeros(1, 3, dtype=torch.int64)):
        with pytest.raises(InputError, match="no text encoder"):
            model.encode_text(texts)


@pytest.mark.slow
def test_open_clip_loads_a_model_with_a_trunk_of_timm() -> None:
    module, _, _ = open_clip.create_model_and_transforms("ViT-B-32-SigLIP2-256", pretrained=None, load_weights=False)
    assert clipfast.wrap(module.visual).tower.pool is not None
