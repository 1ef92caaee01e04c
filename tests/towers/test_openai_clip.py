"""Models of OpenAI's own package, as its code makes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import openai_package
import pytest
import torch
from measures import relative_error
from open_clip import OPENAI_DATASET_MEAN
from PIL import Image
from tolerances import EMBEDDING_FLOAT32, FLOAT64, SUM_FLOAT32
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import clipfast
from clipfast import InputError, UnsupportedTower, wrap
from clipfast.towers import openai_clip, openai_code
from clipfast.towers.openai_clip import REFUSALS

clip = openai_package.package()
KINDS = {"ViT": 3, "ResNet": (1, 2, 1, 1)}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


def own(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        embedding: torch.Tensor = model.encode_image(images)
    return embedding


@pytest.mark.parametrize("alone", [False, True], ids=["clip", "visual"])
def test_a_model_is_taken_as_it_is(kind: Any, alone: bool) -> None:
    module, images = openai_package.build(kind), openai_package.pixels()
    model = wrap(module.visual if alone else module)
    contributions = model.decompose(images)
    assert contributions.max_error() <= SUM_FLOAT32
    assert relative_error(contributions.embedding, own(module, images)) <= EMBEDDING_FLOAT32
    assert torch.equal(model.encode_image(images, normalize=False), own(module, images))
    assert model.verify(images).ok
    shared = {parameter.data_ptr() for parameter in module.parameters()}
    assert {tensor.data_ptr() for tensor in model.tower.tensors()} & shared


def test_double_precision() -> None:
    """Of a ResNet: the package's LayerNorm computes in float32 and takes no other weights."""
    module, images = openai_package.build(KINDS["ResNet"]).double(), openai_package.pixels(dtype=torch.float64)
    contributions = wrap(module.visual).decompose(images)
    assert relative_error(contributions.embedding, module.visual(images).detach()) <= FLOAT64
    assert contributions.max_error() <= FLOAT64


def test_half_precision_as_the_package_has_it_on_a_gpu(kind: Any) -> None:
    """Products in half precision; LayerNorms, batch normalisation, class token and positions in float32."""
    module, images = openai_package.build(kind), openai_package.pixels()
    clip.model.convert_weights(module)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16, torch.float32}
    model = wrap(module)
    assert model.dtype == torch.float16
    contributions = model.decompose(images, texts=["a red star"])
    assert relative_error(contributions.embedding, own(module, images)) <= 2e-2
    assert model.verify(images).ok


def test_text_and_pixels_are_the_packages_own() -> None:
    module = openai_package.build()
    model = wrap(module)
    texts = ["a photo of a cat", "Émile's  naïve\tcafé &amp; 3 dogs!", "a forest 🌲"]
    expected = clip.tokenize(texts, context_length=16)
    assert torch.equal(model.tokenize(texts).long(), expected.long())
    with torch.no_grad():
        features = module.encode_text(expected)
    assert torch.equal(model.encode_text(texts, normalize=False), features)
    photo = Image.effect_noise((90, 70), 80).convert("RGBA")
    assert torch.equal(model.preprocess(photo), clip.clip._transform(openai_package.SIDE)(photo))
    black = model.preprocess(Image.new("RGB", (70, 70)))[:, 0, 0]
    assert (black < 0).all()
    assert len(OPENAI_DATASET_MEAN) == 3
    with pytest.raises(InputError, match="a text has 22 tokens, the model reads 16"):
        model.encode_text(["a " * 20])
    with pytest.raises(InputError, match="no tokenizer"):
        wrap(openai_package.build(vocabulary=90)).encode_text(["a"])
    with pytest.raises(InputError, match="no text encoder"):
        wrap(module.visual).encode_text(["a"])


def test_nothing_of_the_module_changes(kind: Any) -> None:
    module, images = openai_package.build(kind), openai_package.pixels()
    before, embedding = {name: tensor.clone() for name, tensor in module.state_dict().items()}, own(module, images)
    attributes = [set(vars(part)) for part in module.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = wrap(module)
    model.decompose(images)
    model.verify(images)
    assert torch.equal(torch.get_rng_state(), state)
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [set(vars(part)) for part in module.modules()] == attributes
    assert not any(part.training or part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(own(module, images), embedding)


def test_changed_weights_are_followed(kind: Any) -> None:
    module, images = openai_package.build(kind), openai_package.pixels()
    model = wrap(module)
    model.decompose(images)
    with torch.no_grad():
        for name, parameter in module.visual.named_parameters():
            if parameter.ndim > 1 and "conv" not in name:
                parameter.mul_(1.1)
    assert relative_error(model.decompose(images).embedding, own(module, images)) <= EMBEDDING_FLOAT32


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
def test_its_archive_gives_the_same_model(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as the package publishes its models, and read without the package and without running the archive."""
    module, images = openai_package.build(kind), openai_package.pixels()
    openai_package.traced(module).save(str(tmp_path / "model.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *arguments, **options: pytest.fail("compiles the code of an archive"))
    model = clipfast.load(f"openai:{tmp_path}/model.pt", device="cpu")
    assert type(model.module).__module__ == "open_clip.model"
    assert relative_error(model.encode_image(images, normalize=False), own(module, images)) <= EMBEDDING_FLOAT32
    assert relative_error(model.decompose(images).embedding, own(module, images)) <= EMBEDDING_FLOAT32
    texts = ["a red star", "a forest"]
    assert relative_error(model.encode_text(texts), wrap(module).encode_text(texts)) <= EMBEDDING_FLOAT32


def test_images_of_another_size() -> None:
    module = openai_package.build()
    model = wrap(module, image_size=(48, 80))
    images = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(4))
    contributions = model.decompose(images)
    assert contributions.grid == (3, 5)
    assert contributions.max_error() <= SUM_FLOAT32
    assert model.verify(images).ok
    larger = open_clip.model.build_model_from_openai_state_dict(
        {**module.state_dict(), "visual.positional_embedding": torch.randn(37, 128)}, cast_dtype=torch.float32
    ).float()
    state = module.state_dict()
    open_clip.model.resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(5))
    embedding = wrap(module, image_size=96).decompose(images).embedding
    assert relative_error(embedding, larger.visual(images).detach()) <= EMBEDDING_FLOAT32
    photo = Image.effect_noise((90, 70), 80)
    assert model.preprocess(photo).shape == (3, 48, 80)
    assert torch.equal(wrap(module, image_size=96).preprocess(photo), clip.clip._transform(96)(photo))
    with pytest.raises(InputError, match="not whole patches of 16 × 16: try 48 × 80"):
        wrap(module, image_size=(50, 80))
    with pytest.raises(InputError, match="the positions of a ResNet's attention pool are not resampled"):
        wrap(openai_package.build(KINDS["ResNet"]), image_size=96)


# ------------------------------------------------------------------------------------------------------- refusals


class Own(clip.model.VisionTransformer):  # type: ignore[misc, name-defined]
    """Somebody's subclass, whose forward may do anything."""


def mask(visual: Any) -> None:
    visual.transformer.resblocks[1].attn_mask = torch.zeros(17, 17)


def double(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


CHANGES: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "mask": ("ViT", mask, "transformer.resblocks.1"),
    "class": ("ViT", lambda visual: setattr(visual, "__class__", Own), "Own"),
    "activation": ("ViT", lambda visual: setattr(visual.transformer.resblocks[0].mlp, "gelu", nn.ReLU()), "replaced"),
    "norm": ("ViT", lambda visual: setattr(visual, "ln_post", nn.RMSNorm(128)), "ln_post: RMSNorm"),
    "strides": ("ViT", lambda visual: setattr(visual.conv1, "stride", (4, 4)), "conv1: does not embed patches"),
    "hook": ("ViT", lambda visual: visual.ln_post.register_forward_hook(double), "ln_post: double"),
    "pool's hook": ("ResNet", lambda visual: visual.attnpool.register_forward_hook(double), "attnpool: double"),
    "pool's weights": ("ResNet", lambda visual: weight_norm(visual.attnpool.v_proj), "attnpool.v_proj: Linear"),
    "pool": ("ResNet", lambda visual: setattr(visual, "attnpool", nn.Flatten()), "attnpool: Flatten"),
    "pool's layer": ("ResNet", lambda visual: setattr(visual.attnpool, "c_proj", nn.Identity()), "c_proj: Identity"),
    "own hook": ("ResNet", lambda visual: visual.register_forward_hook(double), "ModifiedResNet: double"),
    "training": ("ResNet", lambda visual: visual.train(), "batch normalisation"),
    "forward": ("ResNet", lambda visual: setattr(visual, "forward", double), "(forward)"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_changed_model_is_refused(change: str) -> None:
    kind, work, match = CHANGES[change]
    module = openai_package.build(KINDS[kind])
    if change == "activation":
        for block in module.visual.transformer.resblocks:
            block.mlp.gelu = nn.ReLU()
        match = "mlp.gelu: ReLU in place of QuickGELU"
    else:
        work(module.visual)
    with pytest.raises(UnsupportedTower) as caught:
        wrap(module.visual)
    assert match in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any(reason.startswith(tuple(REFUSALS.values())) for reason in caught.value.reasons)


def test_a_model_that_encodes_images_its_own_way_is_refused() -> None:
    module = openai_package.build()
    module.encode_image = lambda images: images
    with pytest.raises(UnsupportedTower, match=r"CLIP\.encode_image"):
        wrap(module)


def test_the_trunk_of_a_resnet_runs_as_it_is() -> None:
    """Hooks and other layers in it are part of what is decomposed."""
    module, images = openai_package.build(KINDS["ResNet"]), openai_package.pixels()
    before = own(module, images)
    module.visual.layer2.register_forward_hook(double)
    module.visual.layer3[0].conv1 = parametrizations.weight_norm(module.visual.layer3[0].conv1)
    assert relative_error(own(module, images), before) > EMBEDDING_FLOAT32
    model = wrap(module)
    assert relative_error(model.decompose(images).embedding, own(module, images)) <= EMBEDDING_FLOAT32


def test_computed_weights_are_read(kind: Any) -> None:
    """As they are at each call: pruned, and parametrised in the attention pool that reads its layers' weights."""
    module, images = openai_package.build(kind), openai_package.pixels()
    visual = module.visual
    before = own(module, images)
    if kind == 3:
        layer = visual.transformer.resblocks[0].mlp.c_fc
        prune.l1_unstructured(layer, "weight", 0.5)
        changing = layer.weight_orig
    else:
        layer = parametrizations.weight_norm(visual.attnpool.v_proj)
        changing = layer.parametrizations.weight.original0
    model = wrap(module)
    for factor in (1.0, 1.5):
        with torch.no_grad():
            changing.mul_(factor)
        assert relative_error(model.decompose(images).embedding, own(module, images)) <= EMBEDDING_FLOAT32
    assert relative_error(own(module, images), before) > EMBEDDING_FLOAT32


def test_layers_that_compute_nothing_may_be_missing() -> None:
    module, images = openai_package.build(), openai_package.pixels()
    module.visual.proj = None
    contributions = wrap(module.visual).decompose(images)
    assert contributions.embedding.shape == (2, 128)
    assert relative_error(contributions.embedding, module.visual(images).detach()) <= EMBEDDING_FLOAT32


# --------------------------------------------------------------------------------------------------- copies of the code


def test_the_packages_code_is_known(kind: Any, recwarn: pytest.WarningsRecorder) -> None:
    assert openai_code.changed_methods(openai_package.build(kind).visual, openai_clip.MODULE) == []
    wrap(openai_package.build(kind))
    assert [str(warning.message) for warning in recwarn if "published" in str(warning.message)] == []


def test_a_copy_that_computes_something_else_is_warned_about() -> None:
    """As projects do that keep a changed ``clip/model.py`` of their own."""
    visual = openai_package.build().visual
    kind = type(visual.transformer.resblocks[0])

    class ResidualAttentionBlock(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 2 * self.attention(self.ln_1(x))

        def attention(self, x: torch.Tensor):  # type: ignore[no-untyped-def] # a comment, and other white space
            self.attn_mask = self.attn_mask.to(dtype=x.dtype, device=x.device) if self.attn_mask is not None else None
            return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    ResidualAttentionBlock.__module__ = openai_clip.MODULE
    visual.transformer.resblocks[1].__class__ = ResidualAttentionBlock
    assert openai_code.changed_methods(visual, openai_clip.MODULE) == ["ResidualAttentionBlock.forward"]
