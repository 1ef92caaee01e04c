"""Mutual information of concepts: tables whose bits are known, chance, and scenes, where attributes are known."""

from math import log2

import pytest
import torch
from builders import directions, pixels, vision_tower
from measures import error
from PIL import Image
from tolerances import FLOAT64
from torch import Tensor

import clipfast
from clipfast import InputError, descriptions, wrap
from clipfast.analyses.knowledge import Knowledge, presence
from clipfast.scenes.captions import prompts
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene
from clipfast.scenes.vocabulary import BACKGROUNDS

AXES = torch.eye(6, dtype=torch.float64)
POOL = torch.cat([AXES, -AXES])  # its mean is zero
CLASSES = torch.stack([AXES[0], AXES[1]])


def test_presence_is_the_first_of_the_pool() -> None:
    features = torch.stack([3 * AXES[2] + AXES[4], -AXES[1]])
    present = presence(features, POOL, 2)
    assert present[0].nonzero()[:, 0].tolist() == [2, 4]
    assert present[1].nonzero()[:, 0].tolist() == [0, 7]  # of those that are all zero the first
    moved = presence(features, POOL, 1, mean=AXES[2])
    assert moved[0].nonzero()[:, 0].tolist() == [4]


def test_a_concept_that_is_its_class_has_all_its_bits() -> None:
    knowledge = Knowledge(POOL, CLASSES, top=1)
    assert knowledge.in_classes.nonzero().tolist() == [[0, 0], [1, 1]]
    knowledge.update(CLASSES.repeat_interleave(3, 0)[:4], torch.tensor([0, 0, 0, 1]))  # images that look like classes
    bits = -(3 / 4) * log2(3 / 4) - (1 / 4) * log2(1 / 4)
    expected = torch.zeros(12, dtype=torch.float64)
    expected[:2] = bits
    for found in (knowledge.with_class(False), knowledge.shared(False), knowledge.known_to_texts()):
        assert error(found, expected) <= FLOAT64
    assert knowledge.share(False) == pytest.approx(1, abs=FLOAT64)


def test_a_table_computed_by_hand() -> None:
    """Eight images: concept 0 in three of four of class 0 and in one of four of class 1."""
    images = torch.stack([AXES[0]] * 3 + [AXES[3]] + [AXES[0]] + [AXES[3]] * 3)
    labels = torch.tensor([0] * 4 + [1] * 4)
    knowledge = Knowledge(POOL, CLASSES, top=1)
    knowledge.update(images, labels)
    joint = {(0, 0): 1 / 8, (0, 1): 3 / 8, (1, 0): 3 / 8, (1, 1): 1 / 8}
    bits = sum(share * log2(share / 0.25) for share in joint.values())
    assert float(knowledge.with_class(False)[0]) == pytest.approx(bits, abs=FLOAT64)
    assert float(knowledge.shared(False)[0]) == pytest.approx(bits, abs=FLOAT64)
    assert float(knowledge.shared(False)[3]) == 0  # no class's text has it
    assert float(knowledge.with_class(False)[3]) == pytest.approx(bits, abs=FLOAT64)
    correction = (4 - 2 - 2 + 1) / (2 * 8) / torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert float(knowledge.with_class()[0]) == pytest.approx(bits - float(correction), abs=FLOAT64)
    halves = Knowledge(POOL, CLASSES, top=1)
    other = Knowledge(POOL, CLASSES, top=1)
    halves.update(images[:5], labels[:5])
    other.update(images[5:], labels[5:])
    halves.merge(other)
    assert halves.count == 8
    assert torch.equal(halves.with_class(), knowledge.with_class())


def test_unrelated_concepts_have_no_bits_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = directions(60, 20, dtype=torch.float64)
    knowledge = Knowledge(pool, directions(5, 20, seed=1, dtype=torch.float64), top=6)
    knowledge.update(
        torch.randn(300, 20, generator=generator, dtype=torch.float64), torch.randint(5, (300,), generator=generator)
    )
    plain, corrected = knowledge.with_class(False), knowledge.with_class()
    assert float(plain.min()) >= 0
    assert float(plain.mean()) > 0.005  # the bias: about (5 − 1) / (2 · 300 · ln 2) = 0.0096
    assert abs(float(corrected.mean())) < 0.3 * float(plain.mean())


def test_contributions_are_taken_and_predicted_classes() -> None:
    model = wrap(vision_tower(dtype=torch.float64))
    contributions = model.decompose(pixels(model.module, 5, dtype=torch.float64))
    pool, classes = directions(30, 20, dtype=torch.float64), directions(3, 20, seed=1, dtype=torch.float64)
    one, two = Knowledge(pool, classes), Knowledge(pool, classes)
    assert one.top == 3
    one.update(contributions)
    two.update(contributions.embedding, (contributions.embedding @ classes.T).argmax(1))
    assert torch.equal(one.with_class(), two.with_class())


@pytest.mark.parametrize(
    ("labels", "features", "message"),
    [
        (torch.tensor([2]), AXES[:1], "labels go from 2 to 2: there are 2 classes"),
        (torch.tensor([0.0]), AXES[:1], "labels is torch.float32"),
        (torch.tensor([0, 0]), AXES[:1], "labels is torch.int64"),
        (torch.tensor([0]), AXES[:1, 1:], "do not fit"),
        (torch.tensor([0]), AXES[:1] * torch.nan, "a feature is not finite"),
    ],
)
def test_batches_that_do_not_fit(labels: Tensor, features: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Knowledge(POOL, CLASSES, top=1).update(features, labels)


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="top is 13, expected 1 to 12"):
        Knowledge(POOL, CLASSES, top=13)
    with pytest.raises(InputError, match="the classifier has shape"):
        Knowledge(POOL, CLASSES[:1])
    with pytest.raises(InputError, match="no images were counted"):
        Knowledge(POOL, CLASSES).share()
    with pytest.raises(InputError, match="other texts or classes"):
        Knowledge(POOL, CLASSES, top=1).merge(Knowledge(POOL, CLASSES, top=2))


def test_scenes_share_the_backgrounds_that_texts_name() -> None:
    """What images and texts know of backgrounds is what texts of backgrounds say, not what texts of lighting say."""
    model = clipfast.load("scenes")
    kinds = descriptions.scene_attributes()
    scenes = [sample_scene(0, "test-unbiased", index) for index in range(120)]
    features = model.encode_image([Image.fromarray(render(scene)) for scene in scenes])
    classifier = torch.stack([model.encode_text(prompts("background")[name]).mean(0) for name in BACKGROUNDS])
    knowledge = Knowledge(model.encode_text(list(kinds)), classifier, mean=features.mean(0))
    knowledge.update(features, torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]))
    for bits in (knowledge.with_class(), knowledge.shared()):
        means = {
            attribute: float(bits[[name == attribute for name in kinds.values()]].mean())
            for attribute in ("background", "shape", "lighting")
        }
        assert means["background"] > 0.2
        assert max(means["shape"], means["lighting"]) < 0.1 * means["background"]
    assert 0.3 < knowledge.share() <= 1
