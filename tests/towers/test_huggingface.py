"""Models of Hugging Face's transformers: every term against what their own layers compute, and refusals."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from measures import error, relative_error
from torch import Tensor, nn

import clipfast
from clipfast.analyses.relevance import gradcam, legrad
from clipfast.errors import UnsupportedTower

pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_models import MODELS, build, pixels

every_model = pytest.mark.parametrize("name", MODELS)


def vision(model: nn.Module) -> Any:
    while hasattr(model, "vision_model"):
        model = model.vision_model
    return model


def layers(model: nn.Module) -> list[Any]:
    tower = vision(model)
    encoder = next((getattr(tower, name) for name in ("encoder", "model") if hasattr(tower, name)), tower)
    return list(encoder.layers if hasattr(encoder, "layers") else encoder.layer)


def own_embedding(model: Any, images: Tensor) -> Tensor:
    """Whatever a user of transformers takes as the embedding."""
    inputs = patches_of(images) if "Siglip2" in type(model).__name__ else {"pixel_values": images}
    result = model.get_image_features(**inputs) if hasattr(model, "get_image_features") else model(**inputs)
    if "IJepa" in type(model).__name__ or not getattr(vision(model), "use_head", True):
        return result.last_hidden_state.mean(1)  # there is no pooled output
    if type(model).__name__ in ("ViTModel", "DeiTModel", "ViTMSNModel", "Dinov2Model", "Dinov2WithRegistersModel"):
        return result.last_hidden_state[:, 0]  # ViT's pooled output has a tanh
    return result.image_embeds if hasattr(result, "image_embeds") else result.pooler_output


def patches_of(images: Tensor) -> dict[str, Tensor]:
    """Images of 24 × 24 pixels as SigLIP 2's own input."""
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(images), 9, -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(len(images), 9, dtype=torch.int32),
        "spatial_shapes": torch.full((len(images), 2), 3),
    }


@torch.no_grad()
def brute_force(model: Any, images: Tensor) -> dict[str, Tensor]:
    """The embedding ``[B, D]`` and its terms: start ``[B, D]``, heads ``[B, L, H, D]``, MLPs ``[B, L, D]``, rest.

    From forward hooks alone: what goes into every output projection, what comes out of every MLP, and the stream before
    the first layer, of all tokens. Each token's final LayerNorm is frozen at its own statistics, centred term by term;
    a pool's attention is frozen, too.
    """
    records: dict[str, Tensor] = {}

    def record(key: str, argument: int | None) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            value = output if argument is None else inputs[argument]
            records[key] = value[0] if isinstance(value, tuple) else value

        return hook

    tower, blocks = vision(model), layers(model)
    attentions = [block.self_attn if hasattr(block, "self_attn") else block.attention for block in blocks]
    outs = [attention.out_proj if hasattr(attention, "out_proj") else attention.o_proj for attention in attentions]
    norm = next(getattr(tower, name) for name in ("post_layernorm", "layernorm", "norm") if hasattr(tower, name))
    start = tower.pre_layrnorm if hasattr(tower, "pre_layrnorm") else tower.embeddings
    hooked = [(start, "start", None), (blocks[-1], "final", None)]
    for index, (block, out) in enumerate(zip(blocks, outs, strict=True)):
        hooked += [(out, f"heads {index}", 0), (block.mlp, f"mlp {index}", None)]
    head = getattr(tower, "head", None)
    if head is not None:
        hooked += [(head.attention, "pool", 1), (head.mlp, "rest", None)]
    handles = [module.register_forward_hook(record(key, argument)) for module, key, argument in hooked]
    embedding = own_embedding(model, images)
    for handle in handles:
        handle.remove()

    final = records["final"]  # [B, N, W]
    std = (final.var(-1, correction=0) + norm.eps).sqrt()
    matrix = model.visual_projection.weight.T if hasattr(model, "visual_projection") else torch.eye(32).to(final)
    terms, tokens = 2 * len(blocks) + 1, final.shape[1]
    weights = final.new_zeros(len(images), 1, tokens)  # of the tokens, for each head of the pool
    if head is not None:
        in_weights, in_biases = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
        query = (head.probe @ in_weights[0].T + in_biases[0]).view(2, -1)
        key = (records["pool"] @ in_weights[1].T + in_biases[1]).unflatten(-1, (2, -1))
        weights = (torch.einsum("ge,bnge->bgn", query, key) / 4).softmax(-1)
    elif "IJepa" in type(model).__name__ or not getattr(tower, "use_head", True):
        weights += 1 / tokens
    else:
        weights[:, :, 0] = 1

    def readout(term: Tensor, count: float) -> Tensor:
        """A term of the stream ``[B, ..., N, W]`` that is ``count`` of the equal parts of all constants."""
        share = count / terms
        scale = std.view(len(std), *[1] * (term.ndim - 3), tokens, 1)
        normed = (term - term.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias * share
        rows = torch.einsum("bgn,b...nw->b...gw", weights, normed)
        if head is None:
            return rows[..., 0, :] @ matrix
        values = torch.einsum("...gw,gew->...ge", rows, in_weights[2].unflatten(0, (2, -1))).flatten(-2)
        out = head.attention.out_proj
        return (values + in_biases[2] * share) @ out.weight.T + out.bias * share

    heads, mlps = [], []
    for index, (block, out) in enumerate(zip(blocks, outs, strict=True)):
        first, second = (getattr(getattr(block, f"layer_scale{i}", None), "lambda1", 1.0) for i in (1, 2))
        z = records[f"heads {index}"].unflatten(-1, (2, -1))  # [B, N, H, E]
        weight = out.weight.unflatten(1, (2, -1))  # [W, H, E]
        added = torch.einsum("bnhe,whe->bhnw", z, weight) + (0 if out.bias is None else out.bias / 2)
        heads.append(readout(added * first, 1 / 2))
        mlps.append(readout(records[f"mlp {index}"] * second, 1))
    rest = records["rest"][:, 0] if head is not None else torch.zeros_like(embedding)
    return {
        "embedding": embedding,
        "start": readout(records["start"], 1),
        "heads": torch.stack(heads, 1),
        "mlps": torch.stack(mlps, 1),
        "rest": rest,
    }


@every_model
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
def test_every_term_is_that_of_the_modules_own_layers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, images = build(name, dtype), pixels(dtype=dtype)
    expected = brute_force(model, images)
    contributions = clipfast.wrap(model).decompose(images, centring="termwise", depth="all")
    norm = expected["embedding"].norm(dim=-1, keepdim=True)
    assert relative_error(contributions.embedding, expected["embedding"]) <= tolerance
    assert error(contributions.start, expected["start"] / norm) <= tolerance
    assert error(contributions.heads(), expected["heads"] / norm[..., None, None]) <= tolerance
    assert error(contributions.mlps, expected["mlps"] / norm[..., None]) <= tolerance
    assert error(contributions.rest, expected["rest"] / norm) <= tolerance
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
    for depth in {wrapped.depth, "all"}:
        wrapped.decompose(images, texts=torch.eye(wrapped.tower.embed_dim), depth=depth).heads()
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
    assert clipfast.wrap(model).tower.projection is not None


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
