"""A wrapped module keeps its weights: nothing is copied, and what happens to them later is followed."""

from collections.abc import Callable

import open_clip
import pytest
import torch
from builders import clip_model, named_tower, pixels, randomise, vision_tower
from measures import error, relative_error
from tolerances import EMBEDDING_BFLOAT16, EMBEDDING_FLOAT32, FLOAT64, SUM_BFLOAT16, SUM_FLOAT32
from torch import nn

from clipfast import InputError, wrap


def test_every_parameter_is_shared_none_is_copied() -> None:
    visual = vision_tower(ls_init_value=0.1)
    state = {name: tensor.clone() for name, tensor in visual.state_dict().items()}
    model = wrap(visual)
    assert {t.data_ptr() for t in model.tower.tensors()} == {p.data_ptr() for p in visual.parameters()}
    model.decompose(pixels(visual), attention=True, tokens=True).heads()
    assert model.module is visual
    assert state.keys() == visual.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in visual.state_dict().items())


def test_decomposing_leaves_images_unchanged() -> None:
    visual = vision_tower()
    images = pixels(visual)
    before = images.clone()
    wrap(visual).decompose(images, attention=True, tokens=True)
    assert torch.equal(images, before)


def test_a_clip_and_its_visual_agree() -> None:
    clip = clip_model()
    images = pixels(clip.visual)
    whole, part = wrap(clip).decompose(images), wrap(clip.visual).decompose(images)
    assert torch.equal(whole.embedding, part.embedding)
    assert torch.equal(whole.heads(), part.heads())
    assert torch.equal(whole.mlps, part.mlps)
    assert relative_error(whole.embedding, clip.encode_image(images).detach()) <= EMBEDDING_FLOAT32


def test_a_later_dtype_is_followed() -> None:
    visual = vision_tower()
    model = wrap(visual)
    images = pixels(visual)
    assert model.decompose(images).heads().dtype == torch.float32
    visual.to(torch.float64)
    contributions = model.decompose(images)
    assert model.dtype == contributions.embedding.dtype == contributions.heads().dtype == torch.float64
    assert contributions.max_error() <= FLOAT64
    with torch.no_grad():
        assert error(contributions.embedding, visual(images.double())) <= FLOAT64


def in_place(visual: nn.Module) -> None:
    randomise(visual, seed=9)


def by_an_optimiser(visual: nn.Module) -> None:
    optimiser = torch.optim.SGD(visual.parameters(), lr=0.1)
    visual(pixels(visual)).square().sum().backward()
    optimiser.step()


def by_loading(visual: nn.Module) -> None:
    visual.load_state_dict(vision_tower(seed=9).state_dict())


def by_assigning(visual: nn.Module) -> None:
    """load_state_dict(assign=True) puts new parameters in place of the old ones."""
    visual.load_state_dict(vision_tower(seed=9).state_dict(), assign=True)


def through_data(visual: nn.Module) -> None:
    """As older code writes to weights; torch counts no version."""
    visual.proj.data.mul_(2)


def through_data_of_the_last_norm(visual: nn.Module) -> None:
    visual.ln_post.bias.data[3] += 1


def through_data_of_one_head(visual: nn.Module) -> None:
    visual.transformer.resblocks[1].attn.out_proj.weight.data[:, :16] *= -1


def through_data_by_swapping_heads(visual: nn.Module) -> None:
    weight = visual.transformer.resblocks[1].attn.out_proj.weight.data
    weight.copy_(weight.roll(16, 1))


def by_replacing_one(visual: nn.Module) -> None:
    visual.proj = nn.Parameter(visual.proj.detach().flip(0))


CHANGES = [
    in_place,
    by_an_optimiser,
    by_loading,
    by_assigning,
    by_replacing_one,
    through_data,
    through_data_of_the_last_norm,
    through_data_of_one_head,
    through_data_by_swapping_heads,
]


@pytest.mark.parametrize("change", CHANGES)
def test_later_weights_are_followed(change: Callable[[nn.Module], None]) -> None:
    visual = vision_tower()
    model = wrap(visual)
    images = pixels(visual)
    before = model.decompose(images)
    before.heads()
    change(visual)
    after = model.decompose(images)
    with torch.no_grad():
        off = relative_error(after.embedding, visual(images))
    assert off <= EMBEDDING_FLOAT32, "the old weights were decomposed"
    assert relative_error(after.embedding, before.embedding) > EMBEDDING_FLOAT32
    assert after.max_error() <= SUM_FLOAT32


def test_the_basis_is_made_once_and_again_when_weights_change() -> None:
    visual = vision_tower()
    model = wrap(visual)
    old = model.basis()
    assert model.basis() is old
    assert model.basis("termwise") is model.basis("termwise")
    assert model.basis("termwise") is not old
    with torch.no_grad():
        visual.proj.mul_(2)
    new = model.basis()
    assert new is not old
    assert torch.equal(new.biases, 2 * old.biases)
    assert torch.equal(new.values(0), wrap(visual).basis().values(0))


def test_contributions_of_weights_that_are_gone_are_refused() -> None:
    """Codes of the old weights times a basis of the new ones would be wrong without a sign of it."""
    visual = vision_tower()
    model = wrap(visual)
    weight = visual.transformer.resblocks[1].attn.out_proj.weight
    made = model.decompose(pixels(visual))
    expected = made.heads()  # the basis exists from here on
    weight.data.mul_(2)
    assert torch.equal(made.heads(), expected)
    for scale in (weight.detach().mul_, weight.data.mul_):  # with a version, and without one
        unmade = model.decompose(pixels(visual))
        scale(2)
        with pytest.raises(
            InputError, match=r"weights have changed since these images were decomposed: decompose them again$"
        ):
            unmade.heads()
        with pytest.raises(InputError, match="weights have changed"):
            unmade.max_error()


def test_contributions_keep_the_projection_they_were_made_with() -> None:
    visual = vision_tower()
    images = pixels(visual)
    expected = wrap(visual).decompose(images).heads()
    contributions = wrap(visual).decompose(images)
    visual.proj.data.mul_(2)
    assert torch.equal(contributions.heads(), expected)


def test_text_weights_written_through_data_are_followed() -> None:
    clip = clip_model()
    model, images = wrap(clip), pixels(clip.visual)
    before = model.decompose(images, texts=["a forest"]).maps
    clip.text_projection.data.copy_(clip.text_projection.data.flip(1))
    after = model.decompose(images, texts=["a forest"]).maps
    assert not torch.equal(after, before)
    assert torch.equal(after, wrap(clip).decompose(images, texts=["a forest"]).maps)


def test_results_require_no_gradients() -> None:
    visual = vision_tower()
    contributions = wrap(visual).decompose(pixels(visual), tokens=True)
    for result in (
        contributions.embedding,
        contributions.codes,
        contributions.mlps,
        contributions.heads(),
        contributions.head(0, 0),
        contributions.tokens(0),
    ):
        assert not result.requires_grad


def test_inference_tensors_are_read() -> None:
    """Weights made under inference_mode count no versions."""
    with torch.inference_mode():
        visual = vision_tower()
    assert wrap(visual).decompose(pixels(visual)).max_error() <= SUM_FLOAT32


@pytest.mark.parametrize("name", ["ViT-S-32-alt", "ViT-M-16-alt"])
def test_mixed_precision_modules(name: str) -> None:
    """open_clip's precision="bf16": matrices in bfloat16; LayerNorms, embeddings and layer scales in float32."""
    visual = named_tower(name, layers=2, image_size=128 if "32" in name else 64)
    open_clip.model.convert_weights_to_lp(visual, torch.bfloat16)
    assert {p.dtype for p in visual.parameters()} == {torch.float32, torch.bfloat16}
    assert_decomposes_in_mixed_precision(visual)


def assert_decomposes_in_mixed_precision(visual: nn.Module) -> None:
    images = pixels(visual, dtype=torch.bfloat16)
    contributions = wrap(visual).decompose(images, attention=True, tokens=True)
    assert contributions.max_error() <= SUM_BFLOAT16
    float32 = wrap(visual.float()).decompose(images.float())
    assert relative_error(contributions.embedding, float32.embedding) <= EMBEDDING_BFLOAT16
    assert relative_error(contributions.mlps, float32.mlps) <= EMBEDDING_BFLOAT16


def test_a_model_created_in_mixed_precision() -> None:
    clip = open_clip.create_model("ViT-S-32-alt", precision="bf16")
    del clip.visual.transformer.resblocks[2:]  # two layers are enough, and quick
    visual = randomise(clip.visual, seed=0).eval()
    with torch.no_grad():
        plain = visual(pixels(visual, dtype=torch.bfloat16))
    contributions = wrap(clip).decompose(pixels(visual))
    assert contributions.embedding.dtype == torch.bfloat16
    assert relative_error(contributions.embedding, plain) <= EMBEDDING_BFLOAT16
    assert_decomposes_in_mixed_precision(visual)


def test_autocast_does_not_change_the_precision() -> None:
    visual = vision_tower().float()
    images, texts = pixels(visual).float(), torch.eye(3, visual.output_dim)
    model = wrap(visual)
    alone = model.decompose(images, texts=texts, tokens=True)
    for around in (torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode()):
        with around:
            other = wrap(visual).decompose(images, texts=texts, tokens=True)
            heads, tokens, scores, total = other.heads(), other.tokens(-1), other.scores(texts).heads, other.total()
        assert torch.equal(alone.embedding, other.embedding)
        assert torch.equal(alone.maps, other.maps)
        assert torch.equal(alone.mlps, other.mlps)
        assert torch.equal(alone.heads(), heads)
        assert torch.equal(alone.tokens(-1), tokens)
        assert torch.equal(alone.scores(texts).heads, scores)
        assert torch.equal(alone.total(), total)
        assert torch.equal(alone.head(-1, 0), other.head(-1, 0))  # and what it has kept is exact afterwards
