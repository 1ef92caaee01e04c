"""A whole explanation: its sums, its table and JSON, and what is refused."""

import json
from collections.abc import Callable

import pytest
import torch
from builders import clip_model, directions, pixels
from measures import error
from tolerances import FLOAT32

import clipfast
from clipfast import InputError, Model, explain, wrap
from clipfast.analyses.explaining import explain_image

CLASSES = ("a cat", "a dog", "a house")
TEXTS = tuple(f"{colour} {thing}" for colour in ("red", "green", "blue") for thing in ("fur", "wood", "stone", "grass"))


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(clip_model())


def test_an_explanation_adds_up(model: Model) -> None:
    image = pixels(model.module.visual, 1)
    found = explain(model, image, CLASSES, TEXTS, groups=3)
    embedding = model.encode_image(image)[0]
    cosines = model.encode_text(CLASSES) @ embedding
    order = cosines.argsort(descending=True).tolist()
    assert (found.target, found.rival) == (CLASSES[order[0]], CLASSES[order[1]])
    assert error(found.decision.scores, cosines) <= FLOAT32
    assert found.decision.margin == pytest.approx(float(cosines[order[0]] - cosines[order[1]]), abs=FLOAT32)
    scale = model.module.logit_scale.detach().exp()
    assert found.probabilities is not None
    assert error(found.probabilities, (scale * cosines).softmax(0)) <= float(scale) * FLOAT32
    shares = sum(concept.share for concept in found.texts)
    assert shares + found.unexplained == pytest.approx(found.decision.margin, abs=FLOAT32)
    groups = sum(group.score for group in found.visual.groups)
    assert groups + found.visual.prefix + found.visual.other == pytest.approx(found.decision.margin, abs=FLOAT32)
    assert found.heat().shape == (3, 3)


def test_another_class_and_another_rival(model: Model) -> None:
    image = pixels(model.module.visual, 1)
    found = explain(model, image, CLASSES, TEXTS, target="a dog", against="a house", layers=[-1])
    assert found.headline().startswith("a dog rather than a house: margin ")
    assert {layer for _, group in found.groups() for layer, _, _ in group.heads} == {1}
    mean = explain(model, image, CLASSES, TEXTS, target="a dog", against="mean")
    assert mean.headline().startswith("a dog rather than the other classes: margin ")
    assert mean.to_json()["rival"] is None


def test_the_table_and_the_json_say_the_same(model: Model) -> None:
    found = explain(model, pixels(model.module.visual, 1), CLASSES, TEXTS, groups=2)
    whole = json.loads(json.dumps(found.to_json()))
    table = found.table()
    assert str(found) == table
    for name, score in whole["scores"].items():
        assert f"{name} " in table
        assert f"{score:+.3f}" in table
    assert [group["name"] for group in whole["groups"]] == ["A", "B"]
    for group in whole["groups"]:
        assert f"{group['score']:+.3f}" in table
        assert group["texts"][0]["text"] in table
        assert len(group["texts"]) == 5
    mask = torch.tensor([group["mask"] for group in whole["groups"]])
    assert torch.equal(mask.sum(0), torch.ones(3, 3, dtype=torch.long))
    assert sum(whole["probabilities"].values()) == pytest.approx(1, abs=FLOAT32)
    for entry in whole["texts"]:
        assert entry["text"] in table
        assert 1 <= entry["image"]["rank"] <= len(TEXTS)


def test_features_in_place_of_texts_and_no_scale(model: Model) -> None:
    contributions = model.decompose(pixels(model.module.visual, 1), tokens=True)
    found = explain_image(contributions, directions(2, 20), ["x", "y"], directions(9, 20, seed=1), [*"abcdefghi"])
    assert found.probabilities is None
    assert found.to_json()["probabilities"] is None
    assert [row[2] for row in found.class_rows()] == ["", ""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model, x: explain(model, x, ["a cat"], TEXTS), "1 classes were given: expected at least two"),
        (lambda model, x: explain(model, x, "a cat", TEXTS), "are lists of strings"),
        (lambda model, x: explain(model, x, CLASSES, ["x"]), "1 texts were given"),
        (lambda model, x: explain(model, x, ["a cat", "a cat"], TEXTS), "the class 'a cat' is given twice"),
        (
            lambda model, x: explain(model, x, CLASSES, TEXTS, target="a cow"),
            "no class 'a cow': choose from a cat, a d",
        ),
        (lambda model, x: explain(model, x, CLASSES, TEXTS, against="a cow"), "no class 'a cow'"),
        (lambda model, x: explain(model, x, CLASSES, TEXTS, target="a cat", against="a cat"), "held against itself"),
        (lambda model, x: explain(model, x.repeat(2, 1, 1, 1), CLASSES, TEXTS), "one image at a time: here are 2"),
        (lambda model, x: explain(model, x, CLASSES, TEXTS, layers=[7]), "layer 7 does not exist"),
        (lambda model, x: explain(model, "gone.png", CLASSES, TEXTS), "gone.png: no such file"),
        (
            lambda model, x: explain_image(model.decompose(x), directions(2, 20), ["x"], directions(3, 20), [*"abc"]),
            "1 labels for 2 rows of features",
        ),
    ],
)
def test_arguments_that_do_not_fit(model: Model, change: Callable[[Model, torch.Tensor], object], message: str) -> None:
    with pytest.raises(clipfast.ClipfastError, match=message):
        change(model, pixels(model.module.visual, 1))


def test_one_class_only_is_an_input_error(model: Model) -> None:
    with pytest.raises(InputError):
        explain(model, pixels(model.module.visual, 1), [], TEXTS)
