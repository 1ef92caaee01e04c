"""Contributions: what its parts have to do with each other, and what it refuses."""

from functools import partial
from pathlib import Path

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error
from open_clip.transformer import QuickGELU
from tolerances import FLOAT32, FLOAT64
from torch.utils.flop_counter import FlopCounterMode

from clipfast import Contributions, InputError, Model, NotKept, wrap

TEXTS = directions(3, 20, dtype=torch.float64)


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(vision_tower(dtype=torch.float64))


@pytest.fixture(scope="module")
def images(model: Model) -> torch.Tensor:
    return pixels(model.module, 2, dtype=torch.float64)


@pytest.fixture(scope="module")
def full(model: Model, images: torch.Tensor) -> Contributions:
    return model.decompose(images, texts=TEXTS, maps="per_head", attention=True, tokens=True)


# ------------------------------------------------------------------------------------------------ parts and wholes


def test_codes_times_basis_are_heads(full: Contributions) -> None:
    """c = [z, 1, μ, σ]/(σ n) @ basis, written out for every head."""
    basis, scale = full.basis, 1 / (full.std * full.norm)
    for layer in range(3):
        for head in range(2):
            constants = (
                basis.biases[layer] + torch.outer(full.mean, basis.mean_row) + torch.outer(full.std, basis.std_row)
            )
            expected = full.codes[:, layer, head] @ basis.values(layer)[head] + constants * scale[:, None]
            assert error(full.heads()[:, layer, head], expected) <= FLOAT64


def test_one_head_is_that_of_all(full: Contributions) -> None:
    heads = full.heads()
    for layer in range(3):
        for head in range(2):
            assert error(full.head(layer, head), heads[:, layer, head]) <= FLOAT64
            assert error(full.head(layer - 3, head), heads[:, layer, head]) <= FLOAT64


def test_tokens_sum_to_heads(full: Contributions) -> None:
    for layer in range(3):
        tokens = full.tokens(layer)
        assert tokens.shape == (2, 10, 2, 20)
        assert error(tokens.sum(1), full.heads()[:, layer]) <= FLOAT64
        assert torch.equal(full.tokens(layer - 3), tokens)
        for head in range(2):
            assert error(full.tokens(layer, head), tokens[:, :, head]) <= FLOAT64


def test_everything_sums_to_the_embedding(full: Contributions) -> None:
    total = full.heads().sum((1, 2)) + full.start + full.mlps.sum(1) + full.rest
    whole = full.embedding / full.norm[:, None]
    assert error(total, whole) <= FLOAT64
    assert error(full.total(), total) <= FLOAT64
    assert full.max_error() == error(full.total(), whole)
    assert error(full.norm, full.embedding.norm(dim=-1)) <= FLOAT64


def test_check_sees_a_wrong_term(model: Model, images: torch.Tensor) -> None:
    contributions = model.decompose(images)
    contributions.mlps[1, 0, 3] += 0.25
    assert abs(contributions.max_error() - 0.25) <= FLOAT64


def test_attention_rows_sum_to_one(full: Contributions) -> None:
    assert full.attention.shape == (2, 3, 2, 10)
    assert error(full.attention.sum(-1), torch.ones(2, 3, 2)) <= FLOAT64


def test_scores_are_terms_towards_texts(full: Contributions) -> None:
    scores = full.scores(TEXTS)
    assert error(scores.start, full.start @ TEXTS.T) <= FLOAT64
    assert error(scores.heads, full.heads() @ TEXTS.T) <= FLOAT64
    assert error(scores.mlps, full.mlps @ TEXTS.T) <= FLOAT64
    assert error(scores.rest, full.rest @ TEXTS.T) <= FLOAT64
    whole = full.embedding / full.norm[:, None] @ TEXTS.T
    assert error(scores.total(), whole) <= FLOAT64


def test_maps_of_texts_chosen_later(full: Contributions) -> None:
    """The same as maps asked for in the forward, of all heads and of some."""
    assert error(full.text_maps(TEXTS), full.maps.sum((1, 2))) <= FLOAT64
    some = full.text_maps(TEXTS, heads=[(1, 0), (-1, 1), (1, 0)])  # a head counts once
    assert error(some, full.maps[:, 1, 0] + full.maps[:, 2, 1]) <= FLOAT64
    assert error(full.text_maps(TEXTS, heads=[]), torch.zeros(2, 10, 3)) == 0


def test_maps_of_texts_chosen_later_of_some_layers(model: Model, images: torch.Tensor, full: Contributions) -> None:
    contributions = model.decompose(images, tokens=True, layers=[0, 2])
    assert error(contributions.text_maps(TEXTS), full.maps[:, [0, 2]].sum((1, 2))) <= FLOAT64
    assert error(contributions.text_maps(TEXTS, heads=[(2, 1)]), full.maps[:, 2, 1]) <= FLOAT64
    with pytest.raises(InputError, match=r"layer 1 was not kept: the layers here are \[0, 2\]"):
        contributions.text_maps(TEXTS, heads=[(1, 0)])
    with pytest.raises(InputError, match="head 2 does not exist"):
        contributions.text_maps(TEXTS, heads=[(0, 2)])
    with pytest.raises(InputError, match=r"text_features has shape \[3, 7\], expected \[texts, 20\]"):
        contributions.text_maps(torch.ones(3, 7))
    with pytest.raises(NotKept, match="tokens were not kept"):
        model.decompose(images, attention=True).text_maps(TEXTS)


def test_maps_are_tokens_towards_texts(full: Contributions, model: Model, images: torch.Tensor) -> None:
    assert full.maps.shape == (2, 3, 2, 10, 3)
    for layer in range(3):
        assert error(full.maps[:, layer], (full.tokens(layer) @ TEXTS.T).transpose(1, 2)) <= FLOAT64
    summed = model.decompose(images, texts=TEXTS, maps="summed")
    assert error(summed.maps, full.maps.sum((1, 2))) <= FLOAT64
    assert error(full.maps.sum(3), full.scores(TEXTS).heads) <= FLOAT64


def test_texts_alone_give_summed_maps(model: Model, images: torch.Tensor) -> None:
    assert model.decompose(images, texts=TEXTS).maps.shape == (2, 10, 3)


def test_patch_maps_are_rows_and_columns_without_the_class_token() -> None:
    """A tower of 2 × 3 patches: token 1 + 3·row + column."""
    model = wrap(vision_tower(image_size=(8, 12), patch_size=4))
    x = pixels(model.module)
    for maps, shape in (("summed", (2, 2, 3, 3)), ("per_head", (2, 3, 2, 2, 3, 3))):
        contributions = model.decompose(x, texts=TEXTS, maps=maps)
        patches = contributions.patch_maps()
        assert patches.shape == shape
        for row in range(2):
            for column in range(3):
                assert torch.equal(patches[..., row, column, :], contributions.maps[..., 1 + 3 * row + column, :])


def test_images_do_not_depend_on_their_batch(model: Model, images: torch.Tensor, full: Contributions) -> None:
    alone = model.decompose(images[1:], texts=TEXTS, maps="per_head")
    assert error(alone.heads()[0], full.heads()[1]) <= FLOAT64
    assert error(alone.maps[0], full.maps[1]) <= FLOAT64
    assert len(alone) == 1
    assert len(full) == 2


# ------------------------------------------------------------------------------------------------- the class token

VARIANTS = {
    "plain": {},
    "layer scale": {"ls_init_value": 0.1},
    "QuickGELU": {"act_layer": QuickGELU},
    "no ln_pre": {"no_ln_pre": True},
    "average pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "one layer": {"layers": 1},
    "head of 20": {"width": 40},
}


@pytest.mark.parametrize("centring", ["uniform", "termwise"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_class_tokens_part_is_token_zero_of_each_layer(variant: str, centring: str) -> None:
    visual = vision_tower(seed=5, dtype=torch.float64, **VARIANTS[variant])
    decompose = partial(wrap(visual).decompose, pixels(visual, 3, dtype=torch.float64), centring=centring)
    result, full = decompose(class_token=True), decompose(tokens=True)
    expected = torch.stack([full.tokens(layer)[:, 0].sum(1) for layer in full.layers], 1)
    assert error(result.class_token(), expected) <= FLOAT64
    assert error(result.heads(), full.heads()) <= FLOAT64
    everything = decompose(class_token=True, tokens=True, attention=True, texts=TEXTS)
    assert error(everything.class_token(), expected) <= FLOAT64
    for layer in full.layers:  # codes are α_0 v_0 / (σ n), which the values kept with the tokens give too
        first = full.attention[:, layer, :, 0, None] * full._values[layer][:, 0]
        assert error(result.class_codes[:, layer], first / (full.std * full.norm)[:, None, None]) <= FLOAT64


def test_the_class_tokens_part_of_some_layers_in_float32() -> None:
    visual = vision_tower(seed=5)
    x = pixels(visual)
    result, full = (wrap(visual).decompose(x, layers=[2, 0], **{name: True}) for name in ("class_token", "tokens"))
    assert result.class_codes.shape == (2, 2, 2, 16)
    for position, layer in enumerate((0, 2)):
        assert error(result.class_token()[:, position], full.tokens(layer)[:, 0].sum(1)) <= FLOAT32


def test_the_class_tokens_part_costs_one_row_of_values() -> None:
    """A tower of one block, whose keys and values are never formed: one token's values are all that is added."""
    visual = vision_tower(layers=1)
    model, x = wrap(visual), pixels(visual, 3)
    with FlopCounterMode(display=False):
        model.decompose(x, class_token=True)
    costs, sizes = {}, {}
    for name, options in (("bare", {}), ("class token", {"class_token": True}), ("tokens", {"tokens": True})):
        with FlopCounterMode(display=False) as counter:
            sizes[name] = model.decompose(x, **options).nbytes
        costs[name] = counter.get_total_flops()
    assert costs["class token"] - costs["bare"] == 2 * 3 * 32 * 32  # images × width × inner
    assert costs["tokens"] - costs["bare"] == 10 * 2 * 3 * 32 * 32
    assert sizes["class token"] - sizes["bare"] == 4 * 3 * 32


def test_the_class_tokens_part_goes_where_the_codes_go(model: Model, images: torch.Tensor, tmp_path: Path) -> None:
    contributions = model.decompose(images, class_token=True)
    expected = contributions.class_token()
    assert error(contributions.select([1, 0]).class_token(), expected[[1, 0]]) <= FLOAT64
    assert torch.equal(contributions.cpu().class_token(), expected)
    copy = contributions.clone()
    copy.class_codes.zero_()
    assert torch.equal(contributions.class_token(), expected)
    parts = [contributions.select([0]), contributions.select([1])]
    assert error(Contributions.cat(parts).class_token(), expected) <= FLOAT64
    with pytest.raises(InputError, match="keep the same results"):
        Contributions.cat([contributions, model.decompose(images)])
    contributions.save(tmp_path / "found")
    assert torch.equal(Contributions.load(tmp_path / "found").class_token(), expected)
    assert repr(contributions).endswith("kept ['class_token'])")
    none = model.decompose(images[:0], class_token=True)
    assert none.class_token().shape == (0, 3, 20)
    assert model.decompose(images, class_token=True, layers=[]).class_token().shape == (2, 0, 20)


# -------------------------------------------------------------------------------------------------- layer subsets


@pytest.mark.parametrize("layers", [[2], [0, 2], [-1, 0], [1, 1, -2], [2, 1, 0], []])
def test_a_subset_keeps_its_layers_and_the_sum_of_the_rest(
    layers: list[int], model: Model, images: torch.Tensor, full: Contributions
) -> None:
    kept = sorted({layer % 3 for layer in layers})
    left_out = [layer for layer in range(3) if layer not in kept]
    contributions = model.decompose(images, texts=TEXTS, maps="per_head", attention=True, tokens=True, layers=layers)
    assert contributions.layers == tuple(kept)
    assert error(contributions.codes, full.codes[:, kept]) <= FLOAT64
    assert error(contributions.heads(), full.heads()[:, kept]) <= FLOAT64
    assert error(contributions.attention, full.attention[:, kept]) <= FLOAT64
    assert error(contributions.maps, full.maps[:, kept]) <= FLOAT64
    assert error(contributions.scores(TEXTS).heads, full.scores(TEXTS).heads[:, kept]) <= FLOAT64
    assert error(contributions.rest, full.heads()[:, left_out].sum((1, 2))) <= FLOAT64
    assert contributions.max_error() <= FLOAT64
    for layer in kept:  # labels are the model's layers, not positions
        assert error(contributions.tokens(layer), full.tokens(layer)) <= FLOAT64
        assert error(contributions.head(layer - 3, 1), full.head(layer, 1)) <= FLOAT64
    for layer in left_out:
        with pytest.raises(InputError, match=rf"^layer {layer} was not kept: the layers here are \["):
            contributions.head(layer, 0)


def test_rest_is_zero_when_all_are_kept(full: Contributions) -> None:
    assert full.layers == (0, 1, 2)
    assert torch.equal(full.rest, torch.zeros(2, 20, dtype=torch.float64))


def test_summed_maps_of_a_subset_are_of_its_layers(model: Model, images: torch.Tensor, full: Contributions) -> None:
    contributions = model.decompose(images, texts=TEXTS, maps="summed", layers=[0, 2])
    assert error(contributions.maps, full.maps[:, [0, 2]].sum((1, 2))) <= FLOAT64


# ---------------------------------------------------------------------------------------------------------- errors


def test_what_was_not_kept_is_named(model: Model, images: torch.Tensor) -> None:
    bare = model.decompose(images)
    with pytest.raises(NotKept, match=r"^attention was not kept: decompose with attention=True$"):
        _ = bare.attention
    with pytest.raises(NotKept, match=r"^maps were not kept: decompose with texts=… and maps="):
        _ = bare.maps
    with pytest.raises(NotKept, match="maps were not kept"):
        bare.patch_maps()
    with pytest.raises(NotKept, match=r"^tokens were not kept: decompose with tokens=True$"):
        bare.tokens(0)
    for read in (lambda: bare.class_codes, bare.class_token):
        with pytest.raises(NotKept, match=r"^the class token was not kept: decompose with class_token=True$"):
            read()


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_a_layer_that_does_not_exist(full: Contributions, layer: int) -> None:
    for read in (lambda: full.head(layer, 0), lambda: full.tokens(layer)):
        with pytest.raises(
            InputError, match=rf"^layer {layer} does not exist: choose from 0 to 2, or negative from the end$"
        ):
            read()


@pytest.mark.parametrize("head", [2, -1, 99])
def test_a_head_that_does_not_exist(full: Contributions, head: int) -> None:
    for read in (lambda: full.head(0, head), lambda: full.tokens(0, head)):
        with pytest.raises(InputError, match=rf"^head {head} does not exist: heads are 0 to 1$"):
            read()


@pytest.mark.parametrize("shape", [(20,), (3, 19), (1, 3, 20)])
def test_scores_towards_features_of_another_width(full: Contributions, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^text_features has shape \[.*\], expected \[texts, 20\]$"):
        full.scores(torch.ones(shape))


def test_repr_says_what_is_there(full: Contributions, model: Model, images: torch.Tensor) -> None:
    assert repr(full) == (
        "Contributions(2 images, 3 layers, 2 heads, head_dim 16, embed_dim 20, centring 'uniform', "
        "kept ['attention', 'maps', 'tokens'])"
    )
    assert repr(model.decompose(images, centring="termwise")).endswith("centring 'termwise', kept [])")


# ------------------------------------------------------------------------------------------------------- no images


def test_no_images_at_all(model: Model) -> None:
    none = pixels(model.module, 0, dtype=torch.float64)
    for maps, shape in (("summed", (0, 10, 3)), ("per_head", (0, 3, 2, 10, 3))):
        contributions = model.decompose(none, texts=TEXTS, maps=maps, attention=True, tokens=True)
        assert len(contributions) == 0
        assert contributions.max_error() == 0.0
        assert contributions.embedding.shape == contributions.rest.shape == (0, 20)
        assert contributions.codes.shape == (0, 3, 2, 16)
        assert contributions.heads().shape == (0, 3, 2, 20)
        assert contributions.mlps.shape == (0, 3, 20)
        assert contributions.attention.shape == (0, 3, 2, 10)
        assert contributions.tokens(1).shape == (0, 10, 2, 20)
        assert contributions.maps.shape == shape
        assert [part.shape for part in contributions.scores(TEXTS)] == [(0, 3), (0, 3, 2, 3), (0, 3, 3), (0, 3)]


def test_an_empty_list_of_images(model: Model) -> None:
    assert len(model.decompose([])) == 0
    assert model.encode_image([]).shape == (0, 20)
