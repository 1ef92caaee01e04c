"""Uses of second-order effects: against effects written out, and on the bundled model, whose images are known."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error
from PIL import Image
from tolerances import FLOAT64
from torch import Tensor

import clipfast
from clipfast import InputError
from clipfast.analyses import second_order_uses as uses
from clipfast.analyses import segmentation
from clipfast.analyses.neuron_moments import SparseTexts, centred, sparse_texts
from clipfast.analyses.second_order import NeuronEffects, SecondOrder
from clipfast.analyses.second_order_moments import EffectMoments, TopImages
from clipfast.scenes.captions import prompts
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.scene import Scene, sample_scene
from clipfast.scenes.vocabulary import HABITAT

NEURONS, EMBED, IMAGES = 64, 20, 9
TEXTS = directions(7, EMBED, dtype=torch.float64)


@dataclass
class Tiny:
    """Effects of a random model on some images, of two layers."""

    effects: tuple[NeuronEffects, ...]
    moments: EffectMoments
    top: TopImages
    directions: Tensor

    @property
    def have(self) -> NeuronEffects:
        return self.effects[1]

    @property
    def vectors(self) -> Tensor:
        return self.have.vectors(range(NEURONS))


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    visual = vision_tower(seed=4, dtype=torch.float64)
    effects = SecondOrder(clipfast.wrap(visual)).decompose(pixels(visual, IMAGES, dtype=torch.float64), tokens=True)
    moments = EffectMoments()
    moments.update(effects[1])
    top = TopImages(moments, 3)
    top.update(effects[1])
    return Tiny(effects, moments, top, top.principal().directions)


# ---------------------------------------------------------------------------------------------------------- ablation


def test_accuracies_are_those_of_effects_replaced_one_by_one(tiny: Tiny) -> None:
    labels = torch.arange(IMAGES) % 7
    batches = [(tiny.have[:4], labels[:4]), (tiny.have[4:], labels[4:])]
    result = uses.evaluate(batches, TEXTS, tiny.top, tiny.directions)
    whole = tiny.have.embedding / tiny.have.norm[:, None]
    away = tiny.vectors - tiny.vectors.mean(0)
    significant = (away.norm(dim=-1) > tiny.top.thresholds() * (1 + FLOAT64))[..., None]
    along = (away * tiny.directions).sum(-1, keepdim=True) * tiny.directions
    expected = {
        "baseline": whole,
        "all": whole - away.sum(1),
        "significant": whole - (away * significant).sum(1),
        "insignificant": whole - (away * ~significant).sum(1),
        "approximated": whole - (away - along).sum(1),
    }
    for name, features in expected.items():
        right = ((features @ TEXTS.T).argmax(1) == labels).double().mean()
        assert getattr(result, name).accuracy == pytest.approx(float(right)), name
        assert getattr(result, name).count == IMAGES
        if name != "baseline":
            distance = float((features - whole).norm(dim=1).mean())
            assert distance > 1e-4
            assert result.changes[name] == pytest.approx(distance, abs=FLOAT64)
    assert set(result.changes) == set(expected) - {"baseline"}
    top = TopImages(count=3)
    top.update(tiny.have)
    with pytest.raises(InputError, match="these top images were measured from 0"):
        uses.evaluate(batches, TEXTS, top, tiny.directions)


# ------------------------------------------------------------------------------------------------------------- texts


def test_descriptions_in_pieces_are_those_of_matching_pursuit(tiny: Tiny) -> None:
    whole = sparse_texts(tiny.directions, TEXTS, 3)
    have = uses.describe(tiny.directions, TEXTS, 3)
    assert torch.equal(have.picks, whole.picks)
    assert error(have.weights, whole.weights) <= FLOAT64
    assert error(have.explained, whole.explained) <= FLOAT64
    # A direction that is made of two texts is described by them.
    made = (2 * TEXTS[4] - 0.5 * TEXTS[1])[None]
    found = uses.describe(made, TEXTS, 2)
    assert set(found.picks[0].tolist()) == {1, 4}
    assert float(found.explained[0, 1]) == pytest.approx(1, abs=FLOAT64)


def hand_made() -> tuple[Tensor, SparseTexts, Tensor]:
    """Three neurons along the axes; texts 0 and 1 are the classes, 2 and 3 words, 4 nearly the first class."""
    texts = torch.zeros(5, EMBED, dtype=torch.float64)
    texts[0, 0], texts[1, 1], texts[2, 2], texts[3, 3], texts[4, 0], texts[4, 4] = 1, 1, 1, 1, 1, 0.2
    picks = torch.tensor([[2, 4], [3, 2], [2, 3]])
    weights = torch.tensor([[0.5, 0.9], [0.25, -0.75], [1.0, 1.0]], dtype=torch.float64)
    return torch.eye(3, EMBED, dtype=torch.float64), SparseTexts(picks, weights, weights), texts


def test_confusing_texts_of_three_neurons_by_hand() -> None:
    axes, described, texts = hand_made()
    assert uses.between_classes(axes, 3 * texts[0], texts[1]).tolist() == [1, -1, 0]
    found = uses.confusing_texts(axes, described, texts, texts[0], texts[1])
    # Neuron 0 pushes text 2 by 0.5, neuron 1 by -1 * -0.75, and text 3 by -0.25. Text 4 names the class.
    assert [(push.text, push.score, push.neurons) for push in found] == [(2, 1.25, (1, 0))]
    assert [push.text for push in uses.confusing_texts(axes, described, texts, texts[0], texts[1], limit=1.1)] == [2, 4]
    one = uses.confusing_texts(axes, described, texts, texts[0], texts[1], neurons=1)
    assert [(push.text, push.neurons) for push in one] == [(2, (0,))]
    back = uses.confusing_texts(axes, described, texts, texts[1], texts[0])
    assert [(push.text, push.score) for push in back] == [(3, 0.25)]
    assert uses.confusing_texts(axes, described, texts, texts[0], texts[1], count=0) == []


def test_concepts_are_what_significant_neurons_say(tiny: Tiny) -> None:
    described = uses.describe(tiny.directions, TEXTS, 3)
    away = tiny.vectors - tiny.vectors.mean(0)
    amounts = away.norm(dim=-1) * (away.norm(dim=-1) > tiny.top.thresholds() * (1 + FLOAT64))
    table = torch.zeros(NEURONS, 7, dtype=torch.float64).scatter(1, described.picks, described.weights)
    assert error(uses.concepts(tiny.have, tiny.top, described, 7), amounts @ table) <= FLOAT64
    along = (away * tiny.directions).sum(-1) * (amounts > 0)
    assert error(uses.concepts(tiny.have, tiny.top, described, 7, tiny.directions), along @ table) <= FLOAT64
    assert float(amounts.sum()) > 0


# ------------------------------------------------------------------------------------------------------ segmentation


@pytest.mark.parametrize("signed", [False, True])
def test_maps_of_a_class_are_means_of_activations(tiny: Tiny, signed: bool) -> None:
    both = [directions(NEURONS, EMBED, seed=1, dtype=torch.float64), tiny.directions]
    maps = uses.class_maps(tiny.effects, both, TEXTS, count=10, signed=signed)
    assert maps.shape == (IMAGES, 3, 3, 7)
    kept = [effects.activations for effects in tiny.effects]
    active = torch.cat([each[:, 1:] for each in kept if each is not None], 2)  # [B, 9, both layers' neurons]
    along = torch.cat(both) @ TEXTS.T
    for text in range(7):
        chosen = along[:, text].abs().topk(10).indices
        factor = along[chosen, text].sign() if signed else torch.ones(10, dtype=torch.float64)
        expected = (active[:, :, chosen] * factor).mean(2)
        assert error(maps[..., text].flatten(1), expected) <= FLOAT64
    alone = uses.class_maps(tiny.effects[:1], both[:1], TEXTS, count=10**6)
    assert error(alone[..., 0], alone[..., 1]) <= FLOAT64  # every neuron for every text
    assert segmentation.heat(maps, 2, (24, 24), contrast=False, clip=False).shape == (IMAGES, 24, 24)


def test_bad_input(tiny: Tiny) -> None:
    axes, described, texts = hand_made()
    both = [tiny.directions, tiny.directions]
    with pytest.raises(InputError, match=r"towards has shape \[19\]: expected \[20\]"):
        uses.between_classes(axes, texts[0, 1:], texts[1])
    with pytest.raises(InputError, match="3 neurons are described, and there are 64"):
        uses.concepts(tiny.have, tiny.top, described, 5)
    with pytest.raises(InputError, match="a description has text 4, and there are 4 texts"):
        uses.confusing_texts(axes, described, texts[:4], texts[0], texts[1])
    with pytest.raises(InputError, match=r"text_features has shape \[5, 19\]"):
        uses.confusing_texts(axes, described, texts[:, 1:], texts[0], texts[1])
    with pytest.raises(InputError, match="1 tensors of directions for 2 layers: give one per layer"):
        uses.class_maps(tiny.effects, both[:1], TEXTS)
    with pytest.raises(InputError, match=r"directions have shape \[63, 20\] for 64 neurons of 9 images"):
        uses.class_maps(tiny.effects, [tiny.directions[1:], tiny.directions], TEXTS)
    with pytest.raises(InputError, match="of 2 images: expected"):
        uses.class_maps([tiny.effects[0], tiny.effects[1][:2]], both, TEXTS)
    with pytest.raises(InputError, match="count is 0"):
        uses.class_maps(tiny.effects, both, TEXTS, count=0)
    with pytest.raises(InputError, match="decompose with tokens=True"):
        uses.class_maps([replace(tiny.have, activations=None)], [tiny.directions], TEXTS)


# --------------------------------------------------------------------------------------------------- the known world

ATTRIBUTES = ("colour", "background", "shape")
TRAINING, HELD_OUT = 120, 80
LAYERS = (2, 3, 4)


@dataclass
class World:
    """The bundled model's neurons, from 120 scenes, and their effects on 80 others."""

    words: list[tuple[str, str]]
    texts: Tensor
    scenes: list[Scene]
    masks: Tensor
    effects: tuple[NeuronEffects, ...]
    tops: list[TopImages]
    directions: list[Tensor]
    described: list[SparseTexts]

    def of(self, attribute: str) -> list[int]:
        return [index for index, (name, _) in enumerate(self.words) if name == attribute]

    def shows(self, word: tuple[str, str]) -> Tensor:
        """Which held-out scenes show it, bool ``[B]``."""
        attribute, value = word
        if attribute == "background":
            return torch.tensor([scene.background == value for scene in self.scenes])
        return torch.tensor([any(getattr(item, attribute) == value for item in scene.objects) for scene in self.scenes])


@pytest.fixture(scope="module")
def world() -> World:
    model = clipfast.load("scenes", device="cpu")
    scenes = [sample_scene(5, "test-unbiased", number) for number in range(TRAINING + HELD_OUT)]
    drawn = [render_with_masks(scene) for scene in scenes]
    images = [Image.fromarray(picture) for picture, _ in drawn]
    words: list[tuple[str, str]] = []
    features: list[Tensor] = []
    for attribute in ATTRIBUTES:
        for value, sentences in prompts(attribute).items():
            words.append((attribute, value))
            features.append(torch.nn.functional.normalize(model.encode_text(sentences).mean(0), dim=0))
    texts = centred(torch.stack(features))
    lens = SecondOrder(model, LAYERS)
    tops = []
    for effects in lens.decompose(images[:TRAINING]):
        moments = EffectMoments(covariance=False)
        moments.update(effects)
        top = TopImages(moments, 15)
        top.update(effects)
        tops.append(top)
    found = [top.principal().directions.float() for top in tops]
    described = [uses.describe(each, texts, 3) for each in found]
    effects = lens.decompose(images[TRAINING:], tokens=True)
    masks = torch.tensor(np.stack([masks.any(0) for _, masks in drawn[TRAINING:]]))
    return World(words, texts, scenes[TRAINING:], masks, effects, tops, found, described)


def test_neurons_fire_on_new_images_of_what_they_are_named(world: World) -> None:
    """Names of the 60 most important neurons of layer 4 are in their strongest images 3 times as often as in all."""
    effects, top, described = world.effects[2], world.tops[2], world.described[2]
    along = effects.along(world.directions[2], top.mean)
    hits: list[float] = []
    rates: list[float] = []
    for neuron in top.select(60).tolist():
        if float(described.weights[neuron, 0]) > 0:
            shown = world.shows(world.words[int(described.picks[neuron, 0])]).double()
            hits.append(float(shown[along[:, neuron].topk(8).indices].mean()))
            rates.append(float(shown.mean()))
    assert len(hits) >= 20
    assert np.mean(hits) >= 3 * np.mean(rates)


def test_one_direction_explains_most_of_an_important_neuron(world: World) -> None:
    for top in world.tops:
        assert float(top.principal(top.select(60)).shares.mean()) >= 0.8


def test_a_spurious_cue_is_found_among_the_words_that_confuse_look_alikes(world: World) -> None:
    """The training put flowers in forests and gears in cities: these words push towards shapes they do not name."""
    together = torch.cat(world.directions)
    described = SparseTexts(
        *(torch.cat([getattr(each, name) for each in world.described]) for name in ("picks", "weights", "explained"))
    )
    for shape, other in (("flower", "gear"), ("gear", "flower")):
        towards, away = (world.texts[world.words.index(("shape", name))] for name in (shape, other))
        found = uses.confusing_texts(together, described, world.texts, towards, away, neurons=40, count=3)
        assert world.words[found[0].text] == ("background", HABITAT[shape])
        assert len(found[0].neurons) >= 5


def test_concepts_of_an_image_name_its_background(world: World) -> None:
    """One in six by chance."""
    places = world.of("background")
    effects, top, described, own = (each[0] for each in (world.effects, world.tops, world.described, world.directions))
    scores = uses.concepts(effects, top, described, len(world.words), own)[:, places].argmax(1)
    right = [
        world.words[places[int(place)]][1] == scene.background
        for place, scene in zip(scores, world.scenes, strict=True)
    ]
    assert np.mean(right) >= 0.5


def test_active_neurons_of_a_colour_show_where_it_is(world: World) -> None:
    """The share of pairs of an object's and another pixel that the heat orders rightly; a half by chance."""
    places = world.of("colour")
    colours: list[Any] = [world.words[place][1] for place in places]
    target = torch.tensor([colours.index(scene.objects[0].colour) for scene in world.scenes])
    maps = uses.class_maps(world.effects, world.directions, world.texts[places], count=60)
    heat = segmentation.heat(maps, target, (64, 64), contrast=False, clip=False)
    ordered = []
    for one, mask in zip(heat.flatten(1), world.masks.flatten(1), strict=True):
        inside, outside = one[mask].sort().values, one[~mask].sort().values
        ordered.append(float(torch.searchsorted(outside, inside).double().mean() / len(outside)))
    assert np.mean(ordered) >= 0.7
