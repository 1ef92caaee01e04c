"""Models of Hugging Face's transformers: every term against what their own layers compute, and refusals."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from measures import error
from torch import Tensor, nn
from torch.nn.utils import parametrize

import clipfast
from clipfast.analyses.relevance import gradcam, legrad
from clipfast.errors import UnsupportedTower

pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_models import MODELS, build, pixels

OTHER = ("Siglip", "IJepa", "DINOv3", "Dinov2Model, SwiGLU", "Dinov2WithRegistersModel, SwiGLU", "DeiT")
every_model = pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(OTHER)])


def vision(model: nn.Module) -> Any:
    while hasattr(model, "vision_model"):
        model = model.vision_model
    return model


def layers(model: nn.Module) -> list[Any]:
    encoder = vision(model).encoder if hasattr(vision(model), "encoder") else vision(model)
    return list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)


@torch.no_grad()
def brute_force(model: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The embedding ``[B, D]`` and its terms: start ``[B, D]``, heads ``[B, L, H, D]``, MLPs ``[B, L, D]``.

    From forward hooks alone: what goes into every output projection, what comes out of every MLP, and the stream before
    the first layer. The final LayerNorm is frozen at the class token's own statistics, centred term by term.
    """
    records: dict[str, Tensor] = {}

    def record(key: str, of_input: bool) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            value = inputs[0] if of_input else output
            value = value[0] if isinstance(value, tuple) else value
            records[key] = value[:, 0] if value.ndim == 3 else value

        return hook

    tower, blocks = vision(model), layers(model)
    attentions = [block.self_attn if hasattr(block, "self_attn") else block.attention for block in blocks]
    outs = [attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj for attention in attentions]
    norm = tower.post_layernorm if hasattr(tower, "post_layernorm") else tower.layernorm
    handles = []
    for index, (block, out) in enumerate(zip(blocks, outs, strict=True)):
        handles.append(out.register_forward_hook(record(f"heads {index}", True)))
        handles.append(block.mlp.register_forward_hook(record(f"mlp {index}", False)))
    start = tower.pre_layrnorm if hasattr(tower, "pre_layrnorm") else tower.embeddings
    handles.append(start.register_forward_hook(record("start", False)))
    handles.append(norm.register_forward_hook(record("final", True)))
    if hasattr(model, "get_image_features"):
        embedding = model.get_image_features(pixel_values=images).pooler_output
    else:
        result = model(pixel_values=images)
        embedding = result.image_embeds if hasattr(result, "image_embeds") else result.last_hidden_state[:, 0]
        if type(model).__name__.endswith("VisionModel"):
            embedding = result.pooler_output
    for handle in handles:
        handle.remove()

    final = records["final"]
    std = (final.var(-1, correction=0) + norm.eps).sqrt()
    matrix = model.visual_projection.weight.T if hasattr(model, "visual_projection") else torch.eye(32).to(final)
    terms = 2 * len(blocks) + 1

    def readout(term: Tensor, count: float) -> Tensor:
        """A term of the stream ``[B, ..., W]`` that is ``count`` of the equal parts of β."""
        scale = std.view(-1, *[1] * (term.ndim - 1))
        return ((term - term.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias * count / terms) @ matrix

    heads, mlps = [], []
    for index, (block, out) in enumerate(zip(blocks, outs, strict=True)):
        first, second = (getattr(getattr(block, f"layer_scale{i}", None), "lambda1", 1.0) for i in (1, 2))
        z = records[f"heads {index}"].unflatten(-1, (2, -1))  # [B, H, E]
        weight = out.weight.unflatten(1, (2, -1))  # [W, H, E]
        added = torch.einsum("bhe,whe->bhw", z, weight) + out.bias / 2
        heads.append(readout(added * first, 1 / 2))
        mlps.append(readout(records[f"mlp {index}"] * second, 1))
    return embedding, readout(records["start"], 1), torch.stack(heads, 1), torch.stack(mlps, 1)


@every_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_every_term_is_that_of_the_modules_own_layers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, images = build(name, dtype), pixels(dtype=dtype)
    embedding, start, heads, mlps = brute_force(model, images)
    contributions = clipfast.wrap(model).decompose(images, centring="termwise")
    norm = embedding.norm(dim=-1, keepdim=True)
    assert error(contributions.embedding / norm, embedding / norm) <= tolerance
    assert error(contributions.start, start / norm) <= tolerance
    assert error(contributions.heads(), heads / norm[..., None, None]) <= tolerance
    assert error(contributions.mlps, mlps / norm[..., None]) <= tolerance
    assert contributions.max_error() <= tolerance


@every_model
def test_the_embedding_is_the_modules_own(name: str) -> None:
    model = clipfast.wrap(build(name))
    result = model.verify(pixels())
    assert result.ok
    assert result.max_error <= 1e-5
    assert all(part <= 1e-5 for part in result.parts.values())


@every_model
def test_a_model_is_left_as_it_is(name: str) -> None:
    model, images = build(name), pixels()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {path: set(vars(part)) for path, part in model.named_modules()}
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    modes = [part.training for part in model.modules()]
    random = torch.get_rng_state()
    wrapped = clipfast.wrap(model)
    wrapped.decompose(images, texts=torch.eye(wrapped.tower.embed_dim)).heads()
    assert torch.equal(random, torch.get_rng_state())
    assert {path: set(vars(part)) for path, part in model.named_modules()} == attributes
    assert [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()] == hooks
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_changed_weights_are_seen() -> None:
    model, images = build("CLIPModel"), pixels()
    wrapped = clipfast.wrap(model)
    old = wrapped.decompose(images)
    old.heads()
    with torch.no_grad():
        layers(model)[1].self_attn.v_proj.weight.mul_(2)
        model.visual_projection.weight.data.mul_(3)  # type: ignore[union-attr, operator]
    new = wrapped.decompose(images)
    assert wrapped.verify(images).ok
    assert error(new.embedding, old.embedding) > 0.5
    assert new.max_error() <= 2e-5
    model.visual_projection = nn.Linear(32, 20, bias=False)
    assert wrapped.verify(images).ok


def test_text_features_are_the_modules_own() -> None:
    tokens = torch.tensor([[1, 7, 8, 2, 0, 0], [1, 9, 2, 0, 0, 0]])
    for name in ("CLIPModel", "MetaClip2Model"):
        model: Any = build(name)
        expected = model.get_text_features(input_ids=tokens).pooler_output
        assert torch.equal(clipfast.wrap(model).encode_text(tokens, normalize=False), expected)
    for name in ("ChineseCLIPModel", "AltCLIPModel"):
        model = build(name)
        padding = model.config.text_config.pad_token_id
        padded = torch.where(tokens == 0, padding, tokens)
        expected = model.get_text_features(input_ids=padded, attention_mask=(padded != padding).long()).pooler_output
        assert torch.equal(clipfast.wrap(model).encode_text(padded, normalize=False), expected)


def test_hooks_of_output_attentions_are_read_only() -> None:
    model: Any = build("CLIPModel")
    model.vision_model(pixel_values=pixels(), output_attentions=True, output_hidden_states=True)
    assert any(part._forward_hooks for part in model.modules())
    assert clipfast.wrap(model).verify(pixels()).ok


def test_registers_are_no_patches(tmp_path: Path) -> None:
    """Ten tokens and four registers: maps of patches leave them out, and the sum over all tokens is the score."""
    model = clipfast.wrap(build("Dinov2WithRegistersModel", torch.float64))
    texts = torch.eye(32, dtype=torch.float64)[:3]
    contributions = model.decompose(pixels(dtype=torch.float64), texts=texts, attention=True, tokens=True)
    assert (model.tower.tokens, contributions.token_count) == (14, 14)
    assert contributions.attention.shape == (3, 3, 2, 14)
    assert contributions.patch_maps().shape == (3, 3, 3, 3)
    assert torch.equal(contributions.patch_maps().flatten(1, 2), contributions.maps[:, 5:])
    scores = contributions.heads() @ texts.T
    assert error(contributions.maps.sum(1), scores.sum((1, 2))) <= 1e-12
    assert error(contributions.text_maps(texts), contributions.maps) <= 1e-12
    contributions.save(tmp_path / "c.safetensors")
    loaded = clipfast.Contributions.load(tmp_path / "c.safetensors")
    assert torch.equal(loaded.patch_maps(), contributions.patch_maps())
    assert loaded.token_count == 14
    assert gradcam(model.tower, pixels(dtype=torch.float64), texts[0]).shape == (3, 3, 3)
    assert legrad(model.tower, pixels(dtype=torch.float64), texts[0]).shape == (3, 3, 3)


# ------------------------------------------------------------------------------------------------------- refusals


def refusal(model: nn.Module) -> str:
    with pytest.raises(UnsupportedTower) as caught:
        clipfast.wrap(model)
    return str(caught.value)


def test_what_changes_activations_is_refused() -> None:
    model: Any = build("CLIPModel")
    handle = layers(model)[0].mlp.register_forward_hook(lambda *_: None)
    assert "a forward hook" in refusal(model)
    handle.remove()
    layers(model)[1].self_attn.forward = lambda *arguments, **options: None
    assert "a replaced method" in refusal(model)
    del layers(model)[1].self_attn.forward
    layers(model)[1].mlp.fc1 = nn.Sequential(layers(model)[1].mlp.fc1)
    assert "a layer that is not the one its class comes with" in refusal(model)
    layers(model)[1].mlp.fc1 = layers(model)[1].mlp.fc1[0]
    parametrize.register_parametrization(model.visual_projection, "weight", nn.Identity())
    assert "a parametrised weight" in refusal(model)


def test_a_method_replaced_on_the_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("CLIPModel")
    kind = type(layers(model)[0].self_attn)
    own = kind.forward

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        return own(self, *arguments, **options)

    forward.__wrapped__ = own  # type: ignore[attr-defined]
    monkeypatch.setattr(kind, "forward", forward)
    assert "a replaced method" in refusal(model)


def test_other_activations_and_classes_are_refused() -> None:
    import transformers

    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    assert "an activation other" in refusal(
        transformers.ViTModel(transformers.ViTConfig(**settings, hidden_act="relu"))
    )
    training = transformers.ViTModel(transformers.ViTConfig(**settings, hidden_dropout_prob=0.1)).train()
    assert "dropout in training mode" in refusal(training)
    other = transformers.BeitModel(transformers.BeitConfig(**settings))
    assert "not one of the classes that are read" in refusal(other)


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
