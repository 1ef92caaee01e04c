"""Adapters of peft are added to the weights, and followed when they change."""

from typing import Any

import pytest
import torch
import transformers
from builders import clip_model, pixels
from computed_weights import assert_agrees, assert_untouched, state_of
from huggingface_models import TEXT, VISION
from measures import relative_error
from tolerances import EMBEDDING_FLOAT32
from torch import nn

from clipfast import UnsupportedTower, wrap

peft = pytest.importorskip("peft")


def lora(**options: Any) -> Any:
    defaults: dict[str, Any] = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    return peft.LoraConfig(**(defaults | options))


def hugging_face_clip() -> nn.Module:
    torch.manual_seed(0)
    settings = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 20}
    return transformers.CLIPModel(transformers.CLIPConfig(**settings)).eval()


HF_TARGETS = ["q_proj", "v_proj", "out_proj", "fc1", "fc2", "visual_projection", "patch_embedding"]


def adapted(targets: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(hugging_face_clip(), lora(target_modules=targets or HF_TARGETS, **options)).eval()


def images_of(height: int = 24) -> torch.Tensor:
    return torch.randn(2, 3, height, height, generator=torch.Generator().manual_seed(3))


def lora_layers(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")]


def test_adapters_are_added_to_the_weights_and_followed() -> None:
    plain = wrap(hugging_face_clip()).decompose(images_of()).embedding
    module = adapted()
    model = wrap(module)
    first = assert_agrees(model, images_of())
    assert relative_error(first, plain) > EMBEDDING_FLOAT32
    layers = lora_layers(module)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.mul_(1.5)
    second = assert_agrees(model, images_of())
    assert relative_error(second, first) > EMBEDDING_FLOAT32
    for layer in layers:
        layer.lora_A["default"].weight.data.add_(0.05)
    third = assert_agrees(model, images_of())
    assert relative_error(third, second) > EMBEDDING_FLOAT32
    with torch.no_grad():
        for layer in layers:
            layer.base_layer.weight.mul_(1.1)
    assert relative_error(assert_agrees(model, images_of()), third) > EMBEDDING_FLOAT32


def test_reading_adapters_changes_nothing() -> None:
    module = adapted()
    with torch.no_grad():
        own = module.base_model.model.get_image_features(pixel_values=images_of()).pooler_output
    before = state_of(module)
    wrap(module).decompose(images_of(), attention=True)
    assert_untouched(before, state_of(module))
    with torch.no_grad():
        assert torch.equal(module.base_model.model.get_image_features(pixel_values=images_of()).pooler_output, own)


def test_adapters_are_switched_scaled_merged_and_disabled() -> None:
    module = adapted()
    module.add_adapter("other", lora(r=2, target_modules=["q_proj", "fc2"]))
    module.eval()
    model, images = wrap(module), images_of()
    first = assert_agrees(model, images)
    module.set_adapter("other")
    other = assert_agrees(model, images)
    module.base_model.set_adapter(["default", "other"])
    both = assert_agrees(model, images)
    for layer in lora_layers(module):
        layer.set_scale("default", 0.3)
    scaled = assert_agrees(model, images)
    with module.disable_adapter():
        off = assert_agrees(model, images)
    assert torch.equal(assert_agrees(model, images), scaled)
    different = [first, other, both, scaled, off]
    for index, embedding in enumerate(different):
        for later in different[index + 1 :]:
            assert relative_error(embedding, later) > EMBEDDING_FLOAT32
    module.merge_adapter()
    assert relative_error(assert_agrees(model, images), scaled) <= EMBEDDING_FLOAT32
    module.unmerge_adapter()
    assert relative_error(assert_agrees(model, images), scaled) <= EMBEDDING_FLOAT32
    merged = module.merge_and_unload()
    assert relative_error(assert_agrees(wrap(merged), images), scaled) <= EMBEDDING_FLOAT32


def test_texts_are_encoded_again_when_adapters_are_disabled() -> None:
    clip = clip_model()
    torch.manual_seed(2)
    module = peft.get_peft_model(clip, lora(target_modules=["c_fc"])).eval()
    model, images = wrap(module), pixels(clip.visual)
    on = model.decompose(images, texts=["a forest"]).maps
    with module.disable_adapter():
        off = model.decompose(images, texts=["a forest"])
        assert torch.equal(off.maps, model.decompose(images, texts=model.encode_text(["a forest"])).maps)
    assert relative_error(off.maps, on) > EMBEDDING_FLOAT32
    assert torch.equal(model.decompose(images, texts=["a forest"]).maps, on)


OPTIONS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True},
    "a bias of its own": {"lora_bias": True, "target_modules": ["fc1", "q_proj"]},
    "saved copies": {"modules_to_save": ["visual_projection", "post_layernorm"], "target_modules": ["fc1"]},
    "a rank per layer": {"rank_pattern": {"fc1": 7}, "alpha_pattern": {"fc1": 1}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_lora(name: str) -> None:
    options = dict(OPTIONS[name])
    module = adapted(options.pop("target_modules", None), **options)
    with torch.no_grad():
        for parameter, value in module.named_parameters():
            if "modules_to_save" in parameter or "lora_B.default.bias" in parameter:
                value.add_(0.2)
    model = wrap(module)
    on = assert_agrees(model, images_of())
    with module.disable_adapter():
        off = assert_agrees(model, images_of())
    assert relative_error(on, off) > EMBEDDING_FLOAT32


def test_adapters_in_half_precision_weights_are_added_in_float32() -> None:
    module = adapted(["fc1", "fc2", "q_proj"]).to(torch.bfloat16)
    for layer in lora_layers(module):
        layer.lora_A.float()
        layer.lora_B.float()
    model = wrap(module)
    layer = module.base_model.model.vision_model.encoder.layers[0].mlp.fc1
    product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = layer.base_layer.weight.double() + layer.scaling["default"] * product
    weight = model.tower.blocks[0].mlp_in_weight
    assert weight.dtype is torch.bfloat16
    assert torch.equal(weight, expected.to(torch.bfloat16))
    assert model.verify(images_of()).ok


def test_the_vision_tower_alone_and_adapters_put_in_place() -> None:
    vision = hugging_face_clip().vision_model
    torch.manual_seed(1)
    module = peft.inject_adapter_in_model(lora(target_modules=["fc1", "v_proj"]), vision).eval()
    first = assert_agrees(wrap(module), images_of())
    module = peft.get_peft_model(hugging_face_clip().vision_model, lora(target_modules=["fc1"])).eval()
    assert relative_error(assert_agrees(wrap(module), images_of()), first) > EMBEDDING_FLOAT32


@pytest.mark.parametrize("inner", ["clip", "visual"])
def test_adapters_of_open_clip(inner: str) -> None:
    clip = clip_model()
    torch.manual_seed(2)
    config = lora(target_modules=["c_fc", "c_proj", "conv1"])
    module = peft.get_peft_model(clip if inner == "clip" else clip.visual, config).eval()
    model = wrap(nn.DataParallel(module))
    first = assert_agrees(model, pixels(clip.visual))
    with torch.no_grad():
        clip.visual.transformer.resblocks[0].mlp.c_fc.lora_B["default"].weight.add_(0.1)
    assert relative_error(assert_agrees(model, pixels(clip.visual)), first) > EMBEDDING_FLOAT32


REFUSED: dict[str, tuple[Any, str]] = {
    "DoRA": (lambda: adapted(["fc1"], use_dora=True), r"layers\.0\.mlp\.fc1: LoRA's variant DoraLinear"),
    "IA3": (
        lambda: peft.get_peft_model(
            hugging_face_clip(), peft.IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"])
        ).eval(),
        r"layers\.0\.mlp\.fc1: ia3\.Linear",
    ),
    "LoHa": (
        lambda: peft.get_peft_model(hugging_face_clip(), peft.LoHaConfig(target_modules=["fc1"])).eval(),
        r"layers\.0\.mlp\.fc1: loha\.Linear",
    ),
    "positions": (lambda: adapted(["position_embedding"]), r"embeddings\.position_embedding: lora\.Embedding"),
    "a whole attention": (
        lambda: peft.get_peft_model(clip_model(), lora(target_modules=["attn"])).eval(),
        r"resblocks\.0\.attn: lora\.MultiheadAttention",
    ),
    "an output projection that is not run": (
        lambda: peft.get_peft_model(clip_model(), lora(target_modules=["out_proj"])).eval(),
        r"nn\.MultiheadAttention does not compute.*resblocks\.0\.attn\.out_proj: Linear",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_sum_with_the_weight_is_refused(name: str) -> None:
    make, match = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(UnsupportedTower, match=match):
        wrap(make())


def test_dropout_of_an_adapter_in_training_mode_is_refused() -> None:
    module = adapted(["fc1"], lora_dropout=0.5)
    model = wrap(module)
    assert_agrees(model, images_of())
    module.train()
    with pytest.raises(UnsupportedTower, match="dropout in training mode"):
        model.decompose(images_of())


def test_a_merged_dora_is_plain_and_a_merged_adapter_that_is_disabled_is_refused() -> None:
    module = adapted(["fc1", "fc2"], use_dora=True)
    module.merge_adapter()
    model = wrap(module)
    assert_agrees(model, images_of())
    module.base_model.disable_adapter_layers()
    with pytest.raises(UnsupportedTower, match="merged and disabled at once"):
        model.decompose(images_of())
