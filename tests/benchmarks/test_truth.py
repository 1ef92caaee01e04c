"""The experiments with known ground truth, on few scenes: that they run, and that their figures are correct."""

import json
from pathlib import Path

import pytest
from PIL import Image

import clipfast
from benchmarks.truth import __main__ as truth
from benchmarks.truth.naming import called, score
from benchmarks.truth.scenes import Bar, Scenes, classifier
from clipfast.scenes.drawing import render
from clipfast.scenes.scene import sample_scene
from clipfast.scenes.vocabulary import BACKGROUNDS


@pytest.mark.parametrize(
    ("names", "attribute"),
    [
        (["shape", "shape", "colour", "shape", "size"], "shape"),
        (["shape", "shape", "colour", "colour", "size"], None),  # two of five are too few
        (["shape, size", "shape, size", "shape, size", "colour", "colour"], None),  # a tie
        (["shape, size", "shape, size", "shape", "colour", "colour"], "shape"),
        (["", "", "", "colour", "colour"], None),
        (["a", "b", "c", "d", "e", "shape", "shape", "shape"], None),  # only the first five count
    ],
)
def test_attribute_that_a_head_is_named_after(names: list[str], attribute: str | None) -> None:
    assert called(names) == attribute


def test_scores_and_bars() -> None:
    cost = score({"shape": 0.3, "colour": 0.1, "size": 0.05}, "shape")
    assert cost == pytest.approx({"own": 0.3, "others": 0.075, "ratio": 4})
    assert score({"shape": 0.3, "colour": -0.2}, "shape")["ratio"] == pytest.approx(
        300
    )  # the denominator has a lower bound
    assert Bar("x", 0.9, 0.9).met
    assert not Bar("x", 0.89, 0.9).met


def test_accuracies_equal_those_of_the_embeddings() -> None:
    model = clipfast.load("scenes")
    scenes = Scenes.draw(model, "test-unbiased", 40)
    records = [sample_scene(0, "test-unbiased", index) for index in range(40)]
    features = model.encode_image([Image.fromarray(render(scene)) for scene in records])
    guesses = (features @ classifier(model, "background").T).argmax(1).tolist()
    right = [BACKGROUNDS[guess] == scene.background for guess, scene in zip(guesses, records, strict=True)]
    assert scenes.accuracies(scenes.contributions.total())["background"] == sum(right) / 40


@pytest.mark.slow
def test_all_experiments_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth.main(["--scenes", "3", "--pools", "scenes,random", "--out", str(tmp_path)])
    document = json.loads((tmp_path / "truth.json").read_text())
    assert list(document["experiments"]) == ["names", "terms", "texts", "spurious", "retrieval", "segmentation"]
    assert capsys.readouterr().out.strip() == (tmp_path / "truth.md").read_text().strip()
    assert document["experiments"]["terms"]["accuracies"]["nothing"]["background"] > 0.9
    assert document["experiments"]["segmentation"]["methods"]["clipfast"]["mean_iou"] > 0.5
