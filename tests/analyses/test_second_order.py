"""Second-order effects of neurons against brute force in float64, and against the heads of a decomposition."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error, relative_error
from open_clip.transformer import QuickGELU
from second_order_paths import Recorded, record
from tolerances import EMBEDDING_BFLOAT16, EMBEDDING_FLOAT32, FLOAT32
from torch import Tensor

import clipfast
from clipfast import InputError
from clipfast.analyses import second_order
from clipfast.analyses.second_order import NeuronEffects, PathWeights, SecondOrder
from clipfast.kernels import native

TIGHT = 1e-10  # of float64, tighter than tolerances.FLOAT64
EMBED = 20
NEURONS = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "QuickGELU": {"act_layer": QuickGELU},
    "layer scale": {"ls_init_value": 0.1},
    "mean pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "no ln_pre, custom blocks": {"no_ln_pre": True, "block_type": "custom"},
}
TEXTS = directions(5, EMBED, dtype=torch.float64)
SOME = [3, 63, 0, 17, 3]


def tower(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return vision_tower(seed=4, dtype=dtype, **VARIANTS[name])


Case = tuple[Any, Tensor, Recorded]


@pytest.fixture(scope="module", params=VARIANTS)
def any_case(request: pytest.FixtureRequest) -> Case:
    visual = tower(request.param)
    images = pixels(visual, 3, dtype=torch.float64)
    return visual, images, record(visual, images)


@pytest.fixture(scope="module")
def case() -> Case:
    visual = tower("plain")
    images = pixels(visual, 3, dtype=torch.float64)
    return visual, images, record(visual, images)


@torch.no_grad()
@pytest.mark.parametrize("centring", ["uniform", "termwise"])
def test_every_neuron_is_what_brute_force_gives(any_case: Case, centring: Any) -> None:
    visual, images, expected = any_case
    for effects in SecondOrder(clipfast.wrap(visual), centring=centring).decompose(images):
        layer = effects.layer
        assert effects.coefficients.shape == (3, 2 * (2 - layer), NEURONS)
        assert error(effects.embedding, expected.embedding) <= TIGHT
        neurons = expected.neurons(layer, centring)
        assert error(effects.vectors(range(NEURONS)), neurons) <= TIGHT
        assert error(effects.norms(), neurons.norm(dim=-1)) <= TIGHT
        assert error(effects.vectors(SOME, even=True), expected.neurons(layer, centring, even=True)[:, SOME]) <= TIGHT
        assert error(effects.total(), expected.whole(layer, centring)) <= TIGHT
        assert error(neurons.sum(1) + effects.shared, effects.total()) <= TIGHT
        assert float(neurons.norm(dim=-1).mean()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("centring", ["uniform", "termwise"])
def test_all_sources_of_an_attention_add_up_to_its_heads(any_case: Case, centring: Any) -> None:
    """The MLPs' effects through a layer, with those of the start and of earlier attention, are the layer's heads."""
    visual, images, expected = any_case
    layers = len(visual.transformer.resblocks)
    heads = clipfast.wrap(visual).decompose(images, centring=centring).heads().sum(2)  # [B, L, D]
    mlps = [torch.zeros_like(expected.embedding) for _ in range(layers)]
    for later in range(1, layers):
        part = 1 / (1 + 2 * later)

        def given(source: Tensor, later: int = later, part: float = part) -> Tensor:
            row = expected.through_attention(later, source, part, centring)
            return expected.read_out(row, part / (1 + 2 * layers), centring)

        total = given(expected.streams[0])
        for layer in range(later):
            total += given(expected.streams[layer + 1] - expected.streams[layer] - expected.mlp(layer))
            mlp = given(expected.mlp(layer))
            total += mlp
            mlps[layer] += mlp
        assert error(total, heads[:, later]) <= TIGHT
    for effects in SecondOrder(clipfast.wrap(visual), centring=centring).decompose(images):
        assert error(effects.total(), mlps[effects.layer]) <= TIGHT


@torch.no_grad()
def test_scores_shares_and_sums(case: Case) -> None:
    visual, images, expected = case
    have, neurons = second_order.decompose(clipfast.wrap(visual), images, 0), expected.neurons(0, "uniform")
    assert error(have.scores(TEXTS), neurons @ TEXTS.T) <= TIGHT
    unit = expected.embedding / expected.norm[:, None]
    assert error(have.shares(), torch.einsum("bmd,bd->bm", neurons, unit)) <= TIGHT
    own = directions(NEURONS, EMBED, seed=3, dtype=torch.float64)
    assert error(have.along(own), torch.einsum("bmd,md->bm", neurons, own)) <= TIGHT
    assert error(have.by_layer().sum(1), neurons.sum(1)) <= TIGHT
    last = SecondOrder(clipfast.wrap(visual), 1).decompose(images)[0]
    assert error(last.by_layer()[:, 0], expected.neurons(1, "uniform").sum(1)) <= TIGHT
    assert have.vectors([]).shape == (3, 0, EMBED)
    assert have.scores(TEXTS[:0]).shape == (3, NEURONS, 0)
    assert error(have[1:].norms(), have.norms()[1:]) <= TIGHT
    assert len(have[1:]) == 2


@torch.no_grad()
def test_ablation_replaces_effects_by_their_means(case: Case) -> None:
    visual, images, expected = case
    have, neurons = second_order.decompose(clipfast.wrap(visual), images, 0), expected.neurons(0, "uniform")
    mean, means = have.coefficients.mean(0), neurons.mean(0)
    unit = expected.embedding / expected.norm[:, None]
    away = neurons - means
    assert error(have.norms(mean), away.norm(dim=-1)) <= TIGHT
    assert error(have.ablated(mean), unit - away.sum(1)) <= TIGHT
    assert error(have.ablated(mean, [3, 5]), unit - away[:, [3, 5]].sum(1)) <= TIGHT
    assert error(have.ablated(mean, []), unit) <= TIGHT
    mask = torch.rand(3, NEURONS, generator=torch.Generator().manual_seed(0)) > 0.5
    assert error(have.ablated(mean, mask=mask), unit - (away * mask[..., None]).sum(1)) <= TIGHT
    own = directions(NEURONS, EMBED, seed=3, dtype=torch.float64)
    kept = torch.einsum("bmd,md,mc->bc", away, own, own)
    assert error(have.approximated(mean, own), unit - away.sum(1) + kept) <= TIGHT


@torch.no_grad()
def test_maps_add_up_to_scores(case: Case) -> None:
    visual, images, expected = case
    have = second_order.decompose(clipfast.wrap(visual), images, 1, tokens=True)
    assert error(have.activation_maps(SOME).flatten(1, 2), expected.hidden[1][:, 1:, SOME]) <= TIGHT
    without_class = expected.hidden[1].clone()
    without_class[:, 0] = 0
    patches = replace(expected, hidden=[expected.hidden[0], without_class, expected.hidden[2]])
    scores = patches.neurons(1, "uniform") @ TEXTS.T  # [B, M, T]
    maps = have.maps(TEXTS)
    assert maps.shape == (3, 3, 3, 5)
    assert error(maps.sum((1, 2)), scores.sum(1)) <= TIGHT
    assert error(have.maps(TEXTS, [3, 9]).sum((1, 2)), scores[:, [3, 9]].sum(1)) <= TIGHT
    one = expected.hidden[1].clone()
    one[:, :5], one[:, 6:] = 0, 0  # the patch in row 1, column 1
    alone = replace(expected, hidden=[expected.hidden[0], one, expected.hidden[2]])
    assert error(maps[:, 1, 1], (alone.neurons(1, "uniform") @ TEXTS.T).sum(1)) <= TIGHT
    with pytest.raises(InputError, match="decompose with tokens=True"):
        second_order.decompose(clipfast.wrap(visual), images, 1).maps(TEXTS)


def test_in_pieces_it_is_the_same(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    visual, images, _ = case
    have = second_order.decompose(clipfast.wrap(visual), images, 0)
    norms, vectors = have.norms(), have.vectors(SOME)
    monkeypatch.setattr(second_order, "_TOGETHER", 4 * EMBED * 3)
    assert len(list(have.weights.pieces())) == 22
    assert error(have.norms(), norms) <= TIGHT
    assert error(have.vectors(SOME), vectors) <= TIGHT


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_float32(name: str) -> None:
    narrow, visual = tower(name, torch.float32), tower(name)
    images = pixels(narrow, 2)
    expected = record(visual, images.double())
    for have in SecondOrder(clipfast.wrap(narrow)).decompose(images):
        assert relative_error(have.embedding, expected.embedding) <= EMBEDDING_FLOAT32
        assert have.coefficients.dtype == torch.float32
        assert error(have.vectors(SOME), expected.neurons(have.layer, "uniform")[:, SOME]) <= FLOAT32
        assert error(have.total(), expected.whole(have.layer, "uniform")) <= FLOAT32


def test_bfloat16_sums_in_float32() -> None:
    visual = vision_tower(seed=4, dtype=torch.bfloat16)
    images = pixels(visual, 3, dtype=torch.bfloat16)
    have = second_order.decompose(clipfast.wrap(visual), images, 1)
    with torch.no_grad():
        expected = record(visual.double(), images.double()).neurons(1, "uniform")
    assert have.coefficients.dtype == torch.float32
    assert relative_error(have.norms(), expected.norm(dim=-1)) <= EMBEDDING_BFLOAT16


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_backends_agree(backend: str) -> None:
    if backend == "native" and native.unsupported_reasons():
        pytest.skip("; ".join(native.unsupported_reasons()))
    visual = vision_tower(seed=4)
    images = pixels(visual, 2)
    auto = SecondOrder(clipfast.wrap(visual)).decompose(images)
    other = SecondOrder(clipfast.wrap(visual, backend=backend)).decompose(images)
    for a, b in zip(auto, other, strict=True):
        assert error(a.coefficients, b.coefficients) <= FLOAT32
        assert error(a.shared, b.shared) <= FLOAT32


def test_layers_come_from_one_forward(case: Case) -> None:
    visual, images, _ = case
    both = SecondOrder(clipfast.wrap(visual), [1, 0, 1])
    assert both.layers == (0, 1)
    for effects in both.decompose(images):
        (alone,) = SecondOrder(clipfast.wrap(visual), effects.layer).decompose(images)
        assert torch.equal(effects.coefficients, alone.coefficients)
        assert torch.equal(effects.shared, alone.shared)


def test_images_of_a_batch_do_not_see_each_other(case: Case) -> None:
    visual, images, _ = case
    whole = second_order.decompose(clipfast.wrap(visual), images, 0)
    alone = second_order.decompose(clipfast.wrap(visual), images[1:2], 0)
    assert error(alone.coefficients, whole.coefficients[1:2]) <= TIGHT
    assert len(second_order.decompose(clipfast.wrap(visual), images[:0], 0)) == 0


def test_register_tokens_are_tokens_like_others() -> None:
    model = clipfast.wrap(vision_tower(seed=1, dtype=torch.float64))
    tower_with = replace(
        model.tower,
        registers=torch.randn(2, 32, dtype=torch.float64),
        positional_embedding=torch.zeros(10, 32).double(),
    )

    class WithRegisters:
        backend = "auto"
        tower = tower_with
        prepare = staticmethod(lambda images: images)

    images = torch.randn(2, 3, 24, 24, dtype=torch.float64)
    have = second_order.decompose(WithRegisters(), images, 1, tokens=True)  # type: ignore[arg-type]
    assert have.activations is not None
    assert have.activations.shape == (2, 12, NEURONS)
    assert have.activation_maps([0]).shape == (2, 3, 3, 1)
    assert error(have.activation_maps([0])[:, 0, 0, 0], have.activations[:, 3, 0]) == 0


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (2, "layer 2 has no second-order effects: choose from layers 0 to 1, those before the last"),
        (-1, "layer -1 has no second-order effects"),
        ([0, 5], "layer 5 has no"),
        ([], "there are no layers whose neurons have no second-order effects"),
    ],
)
def test_layers_that_are_refused(layers: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SecondOrder(clipfast.wrap(vision_tower()), layers)


def test_other_bad_input(case: Case) -> None:
    visual, images, _ = case
    model = clipfast.wrap(visual)
    have = second_order.decompose(model, images, 0)
    with pytest.raises(InputError, match="a tower of one layer has no second-order effects"):
        SecondOrder(clipfast.wrap(vision_tower(layers=1)))
    with pytest.raises(InputError, match="centring is 'none': choose one of uniform, termwise"):
        SecondOrder(model, centring="none")  # type: ignore[arg-type]
    for neurons, message in (([64], "neuron 64 does not exist: layer 0 has neurons 0 to 63"), ([-1], "neuron -1")):
        with pytest.raises(InputError, match=message):
            have.vectors(neurons)
    with pytest.raises(InputError, match=r"neurons are torch\.float32"):
        have.vectors([1.5])  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"text_features has shape \[5, 19\], expected \[texts, 20\]"):
        have.scores(TEXTS[:, 1:])
    with pytest.raises(InputError, match=r"mean has shape \[4, 63\], expected \[later heads, neurons\] \[4, 64\]"):
        have.norms(torch.zeros(4, 63))
    with pytest.raises(InputError, match="directions have shape"):
        have.along(TEXTS)
    mean = have.coefficients.mean(0)
    for neurons, mask in ((None, torch.ones(3, 64)), (None, torch.ones(2, 64).bool()), ([1], torch.ones(3, 64).bool())):
        with pytest.raises(InputError, match="mask is"):
            have.ablated(mean, neurons, mask=mask)


def test_towers_that_are_refused_name_every_reason() -> None:
    visual = vision_tower(pool_type="avg", final_ln_after_pool=False)
    with pytest.raises(InputError, match="this one has pooling after the final norm"):
        SecondOrder(clipfast.wrap(visual))
    model = clipfast.wrap(vision_tower())

    class Special:
        backend = "auto"
        tower = replace(model.tower, activation="silu", projection_bias=torch.zeros(20))

    with pytest.raises(InputError, match="this one has a bias of the projection, gated MLPs"):
        SecondOrder(Special())  # type: ignore[arg-type]


@pytest.mark.parametrize("through_data", [False, True])
def test_weights_that_changed_are_noticed(through_data: bool) -> None:
    visual = vision_tower()
    lens = SecondOrder(clipfast.wrap(visual))
    lens.decompose(pixels(visual, 1))
    with torch.no_grad():
        weight = visual.transformer.resblocks[1].mlp.c_proj.weight
        (weight.data if through_data else weight).mul_(2)
    with pytest.raises(InputError, match="the model's weights have changed"):
        lens.decompose(pixels(visual, 1))


def test_weights_are_compared_by_what_they_are() -> None:
    tower_a, tower_b = clipfast.wrap(vision_tower()).tower, clipfast.wrap(vision_tower(seed=1)).tower
    assert PathWeights(tower_a, 0).same_as(PathWeights(tower_a, 0))
    assert not PathWeights(tower_a, 0).same_as(PathWeights(tower_b, 0))
    assert not PathWeights(tower_a, 0).same_as(PathWeights(tower_a, 1))
    assert not PathWeights(tower_a, 0).same_as(PathWeights(tower_a, 0, "termwise"))


def test_effects_that_are_not_finite_are_known(case: Case) -> None:
    visual, images, _ = case
    have: NeuronEffects = second_order.decompose(clipfast.wrap(visual), images, 0)
    assert have.is_finite()
    broken = images.clone()
    broken[0, 0, 0, 0] = float("nan")
    assert not second_order.decompose(clipfast.wrap(visual), broken, 0).is_finite()
