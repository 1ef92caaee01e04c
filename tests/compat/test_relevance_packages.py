"""Relevance by the names of other packages: against definitions here, and against the packages where installed."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from builders import clip_model, directions, pixels, randomise, vision_tower
from measures import error
from tolerances import FLOAT32, FLOAT64, SUM_FLOAT32
from torch import Tensor, nn

import clipfast
from clipfast.analyses.relevance import legrad
from clipfast.compat.chefer import image_relevance, interpret, text_relevance
from clipfast.compat.grad_cam import ClassifierOutputTarget, GradCAM, reshape_transform
from clipfast.compat.legrad import LePreprocess, LeWrapper
from clipfast.errors import InputError

TEXTS = directions(3, 20, dtype=torch.float64)


@pytest.fixture
def visual() -> Any:
    return vision_tower(seed=5, dtype=torch.float64, image_size=(24, 24))


@pytest.fixture
def clip() -> Any:
    model = clip_model(seed=5).double()
    model.logit_scale.data.fill_(2.5)
    return model


# -------------------------------------------------------------------------------------------------------------- LeGrad


def test_legrad_maps_are_the_rules(visual: Any) -> None:
    images = pixels(visual, 2, dtype=torch.float64)
    maps = LeWrapper(visual).compute_legrad_clip(image=images, text_embedding=TEXTS)
    assert maps.shape == (2, 3, 24, 24)
    assert torch.equal(LeWrapper(visual).compute_legrad_clip(images, TEXTS), maps)  # in either order
    tower = clipfast.wrap(visual).tower
    for text in range(3):
        for image in range(2):
            scores = legrad(tower, images[image : image + 1], TEXTS[text], first_layer=1)
            large = F.interpolate(scores[None], scale_factor=8, mode="bilinear")[0, 0]
            expected = (large - large.min()) / (large.max() - large.min())
            assert error(maps[image, text], expected) <= FLOAT64
    every = LeWrapper(visual, layer_index=0).compute_legrad(TEXTS, images)
    assert error(every, maps) > 1e-3


def test_legrad_maps_of_images_of_another_size() -> None:
    visual: Any = vision_tower(seed=5, dtype=torch.float64)
    model = clipfast.wrap(visual)
    images = torch.randn(1, 3, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = LeWrapper(visual).compute_legrad_clip(TEXTS, images)
    assert maps.shape == (1, 3, 40, 32)
    expected = LeWrapper(model.resized(40, 32)).compute_legrad_clip(TEXTS, images)
    assert torch.equal(maps, expected)


def test_legrad_maps_without_heat_are_zero(visual: Any) -> None:
    images = pixels(visual, 1, dtype=torch.float64)
    maps = LeWrapper(visual).compute_legrad_clip(torch.zeros(1, 20, dtype=torch.float64), images)
    assert torch.equal(maps, torch.zeros(1, 1, 24, 24, dtype=torch.float64))


def test_a_wrapper_has_what_the_model_has(clip: Any) -> None:
    wrapper = LeWrapper(clip)
    tokens = clipfast.wrap(clip).tokenize(["a star"])
    assert torch.equal(wrapper.encode_text(tokens), clip.encode_text(tokens))
    with pytest.raises(AttributeError):
        _ = wrapper.no_such_method
    copied = copy.deepcopy(wrapper)
    assert copied.starting_depth == wrapper.starting_depth == 0


def test_legrad_against_its_package(clip: Any) -> None:
    package = pytest.importorskip("legrad", reason="the package legrad_torch is not installed")
    images = pixels(clip.visual, 1, dtype=torch.float64)
    expected_model = copy.deepcopy(clip)
    for block in expected_model.visual.transformer.resblocks:
        block.attn.batch_first = False  # the package puts tokens first, as open_clip did until 2.23
    expected = package.LeWrapper(expected_model).compute_legrad_clip(image=images, text_embedding=TEXTS).detach()
    maps = LeWrapper(clip).compute_legrad_clip(image=images, text_embedding=TEXTS)
    assert maps.shape == expected.shape == (1, 3, 24, 24)
    assert error(maps, expected) <= SUM_FLOAT32


def test_preprocessing_for_another_size() -> None:
    from PIL import Image
    from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

    steps = [
        Resize(24),
        CenterCrop(24),
        lambda image: image.convert("RGB"),
        ToTensor(),
        Normalize([0.5] * 3, [0.5] * 3),
    ]
    made = LePreprocess(Compose(steps), 40)(Image.new("L", (30, 20), 255))
    assert torch.equal(made, torch.ones(3, 40, 40))
    with pytest.raises(InputError, match="is no composition of torchvision"):
        LePreprocess(clipfast.load("scenes", device="cpu").encode_image, 40)


# -------------------------------------------------------------------------------------------------------------- Chefer


def notebook(relevance: Tensor, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``R ← R + Ā R``."""
    for attention, gradient in steps:
        relevance = relevance + (gradient * attention).clamp(min=0).mean(1) @ relevance
    return relevance


def text_graph(clip: Any, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
    """open_clip's text encoder written out, with its attention weights in the graph."""
    x = clip.token_embedding(tokens) + clip.positional_embedding[: tokens.shape[1]]
    kept = []
    for block in clip.transformer.resblocks:
        attn = block.attn
        qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias).unflatten(-1, (3, attn.num_heads, -1))
        query, key, value = qkv.unbind(2)
        logits = torch.einsum("bqhe,bkhe->bhqk", query, key) / query.shape[-1] ** 0.5
        logits = logits + torch.full(logits.shape[-2:], float("-inf")).triu(1)
        weights = logits.softmax(-1)
        kept.append(weights)
        mixed = torch.einsum("bhqk,bkhe->bqhe", weights, value).flatten(2)
        x = x + attn.out_proj(mixed)
        x = x + block.mlp(block.ln_2(x))
    ends = clip.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(-1)]
    return kept, ends @ clip.text_projection


@pytest.mark.parametrize("layers", [1, 2])
def test_relevance_is_the_notebooks(clip: Any, layers: int) -> None:
    from attention_graph import graph

    model = clipfast.wrap(clip)
    texts = ["a red star", "a forest", "two dogs and a cat"]
    tokens, images = model.tokenize(texts), pixels(clip.visual, 1, dtype=torch.float64)
    whole, (text_attention, features) = graph(clip.visual, images.expand(3, -1, -1, -1)), text_graph(clip, tokens)
    assert error(features, clip.encode_text(tokens)) <= FLOAT64
    cosines = (F.normalize(whole.embedding, dim=1) * F.normalize(features, dim=1)).sum(1)
    logit = (cosines * clip.logit_scale.exp()).sum()
    expected = []
    for attention, count in ((whole.attention[-layers:], 10), (text_attention[-layers:], 16)):
        slopes = torch.autograd.grad(logit, attention, retain_graph=True)
        steps = [(a.detach(), g) for a, g in zip(attention, slopes, strict=True)]
        expected.append(notebook(torch.eye(count, dtype=torch.float64).expand(3, -1, -1), steps))
    text_layers = len(text_attention)
    of_text, of_image = interpret(images, tokens, clip, "cpu", -layers, -min(layers, text_layers))
    assert of_image.shape == (3, 9)
    assert float(of_image.max()) > 1e-6
    assert error(of_image, expected[0][:, 0, 1:]) <= FLOAT64
    assert error(of_text, expected[1]) <= FLOAT64
    again = interpret(image=images, texts=texts, model=model, start_layer=-layers)
    assert error(again[1], of_image) <= FLOAT64


def huggingface(attention: str) -> Any:
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.CLIPConfig(
        text_config={**small, "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 12}
        | {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 99},
        vision_config={**small, "num_hidden_layers": 3, "image_size": 24, "patch_size": 8},
        projection_dim=20,
        attn_implementation=attention,
    )
    return randomise(transformers.CLIPModel(config), 3).eval()


def test_relevance_of_a_model_of_transformers() -> None:
    """Against the attention weights that its eager attention gives."""
    tokens = torch.tensor([[0, 5, 6, 7, 99, 99], [0, 9, 8, 99, 99, 99]])
    image = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    of_text, of_image = interpret(image, tokens, huggingface("sdpa"), start_layer=-2, start_layer_text=-2)
    repeated = image.repeat(2, 1, 1, 1)
    out = huggingface("eager")(input_ids=tokens, pixel_values=repeated, output_attentions=True)
    logit, expected = out.logits_per_image.diagonal().sum(), []
    for part in (out.text_model_output, out.vision_model_output):
        attention = part.attentions[-2:]
        slopes = torch.autograd.grad(logit, attention, retain_graph=True)
        steps = [(a.detach(), g) for a, g in zip(attention, slopes, strict=True)]
        expected.append(notebook(torch.eye(attention[0].shape[-1]).expand(2, -1, -1), steps))
    assert error(of_text, expected[0]) <= FLOAT32
    assert error(of_image, expected[1][:, 0, 1:]) <= FLOAT32
    assert float(of_image.max()) > 0.1


def test_relevance_of_frozen_encoders_and_of_several_images(clip: Any) -> None:
    model = clipfast.wrap(clip)
    tokens, images = model.tokenize(["a red star", "a forest"]), pixels(clip.visual, 3, dtype=torch.float64)
    one = [interpret(images[i : i + 1], tokens, model) for i in range(3)]
    clip.requires_grad_(False)
    with torch.inference_mode():
        other = [interpret(images[i : i + 1], tokens, model) for i in range(3)]
    for (text, image), (frozen_text, frozen_image) in zip(one, other, strict=True):
        assert error(text, frozen_text) <= FLOAT64
        assert error(image, frozen_image) <= FLOAT64
    batch = image_relevance(model, images, model.encode_text(tokens))
    assert error(batch, torch.stack([image for _, image in one])) <= FLOAT64


def test_relevance_that_does_not_fit(clip: Any, visual: Any) -> None:
    model = clipfast.wrap(clip)
    images, tokens = pixels(clip.visual, 2, dtype=torch.float64), model.tokenize(["a star"])
    calls: list[tuple[Any, str]] = [
        (lambda: interpret(images, tokens, model), "image is 2 images: give one"),
        (lambda: interpret(images[:1], tokens.double(), model), "neither strings nor tokens"),
        (lambda: interpret(images[:1], tokens, visual), "no text encoder"),
        (lambda: interpret(images[:1], tokens, model, start_layer=2), "layer 2 does not exist"),
        (lambda: interpret(images[:1], tokens, model, start_layer_text=1), "layer 1 does not exist"),
        (lambda: image_relevance(model, images, TEXTS[0]), "text_features has shape"),
        (lambda: text_relevance(visual, tokens, TEXTS[0]), "no text encoder"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message):
            call()


# ------------------------------------------------------------------------------------------------------------ Grad-CAM


class Classifier(nn.Module):
    """Cosines of a tower's embeddings with texts."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.visual(images), dim=1) @ TEXTS.T


def define_cam(visual: Any, images: Tensor, layers: list[int], category: int) -> Tensor:
    """From hooks on the module itself."""
    kept: dict[int, Tensor] = {}
    handles = [
        visual.transformer.resblocks[layer].ln_1.register_forward_hook(
            lambda _module, _args, out, layer=layer: kept.update({layer: out})
        )
        for layer in layers
    ]
    score = Classifier(visual)(images)[:, category].sum()
    for handle in handles:
        handle.remove()
    slopes = torch.autograd.grad(score, [kept[layer] for layer in layers])
    cams = []
    for layer, slope in zip(layers, slopes, strict=True):
        weight = slope[:, 1:].mean(1, keepdim=True)
        cam = (weight * kept[layer].detach()[:, 1:]).sum(2).relu().unflatten(1, (3, 3))
        cam = cam - cam.amin((1, 2), keepdim=True)
        cam = cam / (1e-7 + cam.amax((1, 2), keepdim=True))
        cams.append(F.interpolate(cam[:, None], size=(24, 24), mode="bilinear")[:, 0])
    cam = torch.stack(cams).mean(0)
    cam = cam - cam.amin((1, 2), keepdim=True)
    return cam / (1e-7 + cam.amax((1, 2), keepdim=True))


@pytest.mark.parametrize("layers", [[-1], [1], [0, 1, 2]])
def test_grad_cam_is_its_definition(visual: Any, layers: list[int]) -> None:
    images = pixels(visual, 2, dtype=torch.float64)
    cam = GradCAM(visual, layers, texts=TEXTS)
    heat = cam(input_tensor=images, targets=[ClassifierOutputTarget(1), 1])
    assert heat.shape == (2, 24, 24)
    assert heat.dtype == np.float32
    expected = define_cam(visual, images, [layer % 3 for layer in layers], 1)
    assert float(expected.max()) > 0.9
    assert error(torch.from_numpy(heat), expected) <= SUM_FLOAT32
    assert error(cam.outputs, Classifier(visual)(images)) <= FLOAT64
    modules = [visual.transformer.resblocks[layer].ln_1 for layer in layers]
    with GradCAM(visual, modules, texts=TEXTS) as other:
        assert np.array_equal(other(images, [1, 1]), heat)
    best = Classifier(visual)(images).argmax(1).tolist()
    assert np.array_equal(cam(images), cam(images, best))


def test_grad_cam_against_its_package(visual: Any) -> None:
    package = pytest.importorskip("pytorch_grad_cam", reason="the package grad-cam is not installed")
    images = pixels(visual, 2, dtype=torch.float64)
    for layers in ([-1], [0, 2]):
        modules = [visual.transformer.resblocks[layer].ln_1 for layer in layers]
        with package.GradCAM(Classifier(visual), modules, reshape_transform=reshape_transform(visual)) as cam:
            targets = [package.utils.model_targets.ClassifierOutputTarget(category) for category in (2, 0)]
            expected = cam(input_tensor=images, targets=targets)
        heat = GradCAM(visual, layers, texts=TEXTS)(input_tensor=images, targets=targets)
        assert heat.shape == expected.shape
        assert heat.dtype == expected.dtype
        assert float(np.abs(heat - expected).max()) <= SUM_FLOAT32


def test_reshaping_leaves_out_what_is_no_patch() -> None:
    tower = vision_tower(image_size=(24, 16))
    tokens = torch.arange(7.0)[None, :, None].expand(2, 7, 5)
    maps = reshape_transform(tower)(tokens)
    assert maps.shape == (2, 5, 3, 2)
    assert torch.equal(maps[1, 4], torch.arange(1.0, 7).view(3, 2))
    with pytest.raises(InputError, match=r"expected \[images, 7, width\]"):
        reshape_transform(tower)(tokens[:, 1:])


def test_grad_cam_that_does_not_fit(visual: Any) -> None:
    images = pixels(visual, 2, dtype=torch.float64)
    cam = GradCAM(visual, texts=TEXTS)
    assert cam(images[:0], []).shape == (0, 24, 24)
    calls: list[tuple[Any, str]] = [
        (lambda: GradCAM(visual, [3], texts=TEXTS), "layer 3 does not exist"),
        (lambda: GradCAM(visual, [], texts=TEXTS), "target_layers is empty"),
        (lambda: GradCAM(visual, [visual.ln_post], texts=TEXTS), "LayerNorm is not the first norm of a block"),
        (lambda: GradCAM(visual, texts=TEXTS[0]), "texts has shape"),
        (lambda: cam(images, [0]), "1 targets for 2 images"),
        (lambda: cam(images, [0, 3]), "target 3 does not exist: texts are 0 to 2"),
        (lambda: cam(images, [lambda row: torch.ones(())] * 2), "do not depend on the outputs"),
        (lambda: cam(images, [0, 0], aug_smooth=True), "smoothing is not supported"),
        (lambda: cam(images[:, :, :8]), "images"),
        (lambda: cam([1, 2]), "images is a list: give a preprocessed tensor"),
        (lambda: LeWrapper(visual, 3), "layer_index 3 does not exist"),
        (lambda: LeWrapper(visual).compute_legrad_clip(TEXTS), "needs image"),
        (lambda: LeWrapper(visual).compute_legrad_clip(TEXTS[:, :3], images), "texts has shape"),
        (lambda: LeWrapper(visual).compute_legrad_clip(TEXTS, images[0]), "images"),
    ]
    for call, message in calls:
        with pytest.raises(InputError, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_whatever_surrounds_the_call(clip: Any, around: Any) -> None:
    model, images = clipfast.wrap(clip), pixels(clip.visual, 2, dtype=torch.float64)
    usual = GradCAM(model, texts=TEXTS)(images)
    maps = LeWrapper(model).compute_legrad_clip(TEXTS, images)
    with around(), torch.autocast("cpu", dtype=torch.bfloat16):
        texts = TEXTS * 1  # made under inference mode, too
        assert np.array_equal(GradCAM(model, texts=texts)(images * 1), usual)
        assert torch.equal(LeWrapper(model).compute_legrad_clip(texts, images * 1), maps)


def test_no_gradient_is_left_behind(clip: Any) -> None:
    model = clipfast.wrap(clip)
    images = pixels(clip.visual, 1, dtype=torch.float64)
    interpret(images, ["a star"], model)
    GradCAM(model, texts=["a star"])(images)
    LeWrapper(model).compute_legrad_clip(["a star"], images)
    assert all(parameter.grad is None for parameter in clip.parameters())
