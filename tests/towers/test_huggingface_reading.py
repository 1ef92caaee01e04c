"""Towers of Hugging Face's transformers: their fields give the module's own embedding, at any image size."""

import logging
from typing import Any

import pytest
import torch
from measures import relative_error
from torch import nn

import clipfast
from clipfast.errors import InputError, UnsupportedTower

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from huggingface_configs import CONFIGS, GRID, small  # noqa: E402
from huggingface_models import MODELS, build, randomised  # noqa: E402
from plain_forward import embedding  # noqa: E402

from clipfast.towers.huggingface import encode_image, read, vision_transformer  # noqa: E402

SIZES = [(24, 24), (40, 16), (16, 40), (16, 16), (40, 40), (8, 8)]
"""The first is the models' own."""


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_the_fields_give_the_modules_own_embedding(name: str, size: tuple[int, int]) -> None:
    model = build(name, torch.float64)
    tower = read(model, image_size=size)
    assert tower.grid == (size[0] // 8, size[1] // 8)
    with torch.no_grad():
        own = encode_image(model, images(*size))
    # SigLIP 2 interpolates positions in float32, and rounds otherwise for two images than for one.
    tolerance = 1e-7 if name.startswith("Siglip2") and size != SIZES[0] else 1e-12
    assert relative_error(embedding(tower, images(*size)), own) <= tolerance


@pytest.mark.parametrize("name", CONFIGS)
def test_the_flags_of_public_models(name: str) -> None:
    _, (width, _, heads, _, patch_size), flags = CONFIGS[name]
    model, size = small(name)
    model = randomised(model).double().eval()
    tower = read(model)
    assert (tower.grid, tower.patch_size) == ((GRID, GRID), (patch_size, patch_size))
    assert tower.head_dim == width // heads
    assert {norm.eps for block in tower.blocks for norm in (block.ln_1, block.ln_2)} == {flags["layer_norm_eps"]}
    with torch.no_grad():
        own = encode_image(model, images(size, size))
    assert relative_error(embedding(tower, images(size, size)), own) <= 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_public_models_decompose(name: str) -> None:
    module, size = small(name)
    module = randomised(module).eval()
    model, pixels = clipfast.wrap(module), images(size, size).float()
    contributions = model.decompose(pixels)
    with torch.no_grad():
        own = encode_image(module, pixels)
    assert relative_error(contributions.embedding, own) <= 1e-5
    assert contributions.max_error() <= 1e-5
    assert model.verify(pixels).ok


def test_every_class_has_a_model() -> None:
    """Classes of older versions of transformers, and parts of a model that stands in the list, are left out."""
    from clipfast.towers.huggingface_layouts import CLASSES

    named = {name.partition(",")[0] for name in MODELS}
    assert {name for name in CLASSES if not name.endswith("VisionTransformer")} == named


def padded(model: nn.Module, pixels: list[torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Images of any sizes as SigLIP 2's own input, padded with large numbers, which the mask hides."""
    rows, masks, shapes = [], [], []
    for image in pixels:
        high, wide = (side // 8 for side in image.shape[1:])
        patches = image.reshape(3, high, 8, wide, 8).permute(1, 3, 2, 4, 0).reshape(high * wide, -1)
        filler = torch.full((length - len(patches), patches.shape[1]), 1e3, dtype=patches.dtype)
        rows.append(torch.cat([patches, filler]))
        masks.append((torch.arange(length) < len(patches)).int())
        shapes.append((high, wide))
    return {
        "pixel_values": torch.stack(rows),
        "pixel_attention_mask": torch.stack(masks),
        "spatial_shapes": torch.tensor(shapes),
    }


@pytest.mark.parametrize("name", ["Siglip2Model", "Siglip2VisionModel"])
def test_padding_of_naflex_influences_nothing(name: str) -> None:
    """The module's own forward over images of three grids in one padded batch, and one tower for each grid."""
    model: Any = build(name, torch.float64)
    sizes = [(24, 24), (40, 16), (8, 32)]
    pixels = [images(*size)[0] for size in sizes]
    for length in (10, 16):
        with torch.no_grad():
            out = getattr(model, "get_image_features", model)(**padded(model, pixels, length))
        for size, image, own in zip(sizes, pixels, out.pooler_output, strict=True):
            assert (
                relative_error(embedding(read(model, image_size=size), image[None])[0], own) <= 1e-7
            )  # positions in float32
    with pytest.raises(InputError, match="images of 20 × 24 pixels are not whole patches of 8 × 8"):
        read(model, image_size=(20, 24))
    with pytest.raises(InputError, match="images of 4 × 24 pixels are smaller than a patch, 8 × 8"):
        read(model, image_size=(4, 24))


def test_what_is_computed_names_what_it_comes_from() -> None:
    """A change of any of these parameters changes the tower's version, so that it is read again."""
    made = {
        "Siglip2Model": ["head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"],
        "Siglip2VisionModel": ["embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"],
        "ViTModel": ["embeddings.position_embeddings"],
        "DINOv3ViTModel": ["embeddings.patch_embeddings.weight"],
        "DINOv3ViTModel, no biases": ["embeddings.patch_embeddings.weight"],
    }
    for name, paths in made.items():
        model = build(name)
        tower = read(model, image_size=(40, 16))
        for path in paths:
            before = tower.version()
            with torch.no_grad():
                vision_transformer(model).get_parameter(path).mul_(1.5)
            assert tower.version() != before, path
        own = {parameter.data_ptr() for parameter in model.parameters()}
        assert {source.data_ptr() for source in tower.sources} <= own | {b.data_ptr() for b in model.buffers()}
    assert read(build("CLIPVisionModel")).sources == ()
    model = build("CLIPModel")
    assert [id(source) for source in read(model).sources] == [id(model.get_parameter("visual_projection.weight"))]


def test_zeros_and_tables_follow_the_dtype_of_the_model() -> None:
    model = build("DINOv3ViTModel, no biases")
    tower = read(model)
    before = tower.version()
    assert not tower.blocks[0].out_bias.any()
    model.to(torch.bfloat16)
    assert tower.version() != before
    assert {tensor.dtype for tensor in read(model).tensors()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------------------- refusals


def refusal(model: nn.Module) -> str:
    with pytest.raises(UnsupportedTower) as caught:
        read(model)
    return str(caught.value)


def test_random_positions_in_training_mode_are_refused() -> None:
    model: Any = build("DINOv3ViTModel")
    assert model.config.pos_embed_rescale == 2.0
    model.rope_embeddings.train()
    state = torch.get_rng_state()
    assert "dropout in training mode: call .eval() first (rope_embeddings: random positions)" in refusal(model)
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
    read(model)


def test_dropped_paths_and_attention_in_training_mode_are_refused() -> None:
    for flag in ("drop_path_rate", "attention_probs_dropout_prob"):
        config = transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8, **{flag: 0.1}
        )
        assert "dropout in training mode" in refusal(transformers.Dinov2Model(config).train()), flag
        read(transformers.Dinov2Model(config).eval())


def test_another_attention_is_refused() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model: Any = build("SiglipVisionModel")
    ALL_ATTENTION_FUNCTIONS.register("of the user", lambda *arguments, **options: None)
    implementation, model.config._attn_implementation = model.config._attn_implementation, "of the user"
    assert "attention by of the user" in refusal(model)
    model.config._attn_implementation = implementation
    vision_transformer(model).encoder.layers[1].self_attn.scale *= 2
    assert "layer 1: its attention is scaled by 0.5" in refusal(model)


def test_replaced_interpolation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in (("ViTModel", "interpolate_pos_encoding"), ("Siglip2Model", "resize_positional_embeddings")):
        model: Any = build(name)
        kind = type(vision_transformer(model).embeddings)
        with monkeypatch.context() as patched:
            patched.setattr(kind, method, lambda *arguments, **options: None)
            assert f"({kind.__name__}.{method})" in refusal(model)
        read(model)


def test_a_changed_pool_is_refused() -> None:
    model: Any = build("SiglipVisionModel")
    head = vision_transformer(model).head
    own = head.attention
    head.attention = nn.MultiheadAttention(32, 2, batch_first=True, add_bias_kv=True)
    assert "options that its class does not set" in refusal(model)
    head.attention = nn.MultiheadAttention(32, 2, batch_first=True, kdim=32, vdim=16)
    assert "options that its class does not set" in refusal(model)
    head.attention = nn.Identity()
    assert "head.attention: Identity" in refusal(model)
    head.attention = own
    activation, head.mlp.activation_fn = head.mlp.activation_fn, nn.ReLU()
    assert "an activation other than GELU, QuickGELU and SiLU (head.mlp: ReLU)" in refusal(model)
    head.mlp.activation_fn = activation
    head.mlp.fc1 = nn.Sequential(head.mlp.fc1)
    assert "head.mlp.fc1: Sequential" in refusal(model)


@pytest.mark.parametrize("name", ["Dinov2Model, SwiGLU", "DINOv3ViTModel, gated"])
def test_a_changed_gate_is_refused(name: str) -> None:
    model: Any = build(name)
    (gate,) = [path for path, _ in model.named_modules() if path.endswith(("0.mlp.gate_proj", "0.mlp.weights_in"))]
    model.set_submodule(gate, nn.Sequential(model.get_submodule(gate)))
    assert "a layer that is not the one its class comes with" in refusal(model)


def test_models_with_a_classifier_are_not_read() -> None:
    config = transformers.SiglipConfig(
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24}
    )
    message = refusal(transformers.SiglipForImageClassification(config).eval())
    assert message.endswith("but SiglipForImageClassification")


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
