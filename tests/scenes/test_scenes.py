"""Scenes: reproducible, and the images agree with the records."""

import colorsys
import hashlib
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from clipfast.scenes.drawing import render, render_with_masks
from clipfast.scenes.scene import SPLITS, Scene, sample_scene
from clipfast.scenes.vocabulary import (
    ATTRIBUTES,
    BACKGROUNDS,
    BIAS,
    HABITAT,
    IMAGE_SIZE,
    LOOKALIKES,
    PLAIN_SHAPES,
    class_index,
)

SCENES = [sample_scene(3, "train", index) for index in range(300)]


def digest(count: int) -> str:
    """Hash of the records and pixels of some scenes of every split."""
    state = hashlib.sha256()
    for split in SPLITS:
        for index in range(count):
            scene = sample_scene(11, split, index)
            picture, masks = render_with_masks(scene)
            state.update(repr(scene).encode() + picture.tobytes() + masks.tobytes())
    return state.hexdigest()


def test_scenes_are_equal_in_another_process() -> None:
    code = "import test_scenes; print(test_scenes.digest(12))"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join([__file__.rsplit("/", 1)[0], *sys.path]), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == digest(12)


def test_seed_split_and_index_each_change_the_scene() -> None:
    pictures = {
        render(sample_scene(*key)).tobytes()
        for key in [(0, "train", 0), (1, "train", 0), (0, "test", 0), (0, "train", 1)]
    }
    assert len(pictures) == 4


@pytest.mark.parametrize(("split", "index", "seed"), [("valid", 0, 0), ("train", -1, 0), ("train", 0, -1)])
def test_invalid_arguments_are_rejected(split: str, index: int, seed: int) -> None:
    with pytest.raises(ValueError, match=r"split|negative"):
        sample_scene(seed, split, index)


def test_class_index_rejects_unknown_names() -> None:
    with pytest.raises(ValueError, match="unknown colour 'mauve'"):
        class_index("colour", "mauve")
    with pytest.raises(ValueError, match="unknown attribute 'taste'"):
        class_index("taste", "sweet")


def test_json_round_trip() -> None:
    for scene in SCENES[:20]:
        restored = Scene.from_json(json.loads(json.dumps(scene.to_json())))
        assert restored == scene
        assert render(restored).tobytes() == render(scene).tobytes()


def test_shapes_and_dtypes() -> None:
    picture, masks = render_with_masks(SCENES[0])
    assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert picture.dtype == np.uint8
    assert masks.dtype == np.bool_
    assert masks.shape == (len(SCENES[0].objects), IMAGE_SIZE, IMAGE_SIZE)


def test_masks_match_the_recorded_positions() -> None:
    for scene in SCENES:
        _, masks = render_with_masks(scene)
        assert not (masks.sum(axis=0) > 1).any()
        for item, mask in zip(scene.objects, masks, strict=True):
            rows, columns = np.nonzero(mask)
            share = mask.sum() / (math.pi * item.radius**2)
            assert 0.2 < share < 1.3, (item, share)
            # the mass of a crescent is to one side of its centre
            assert math.hypot(rows.mean() - item.y, columns.mean() - item.x) < 0.5 * item.radius
            assert rows.min() >= 0
            assert np.hypot(rows - item.y, columns - item.x).max() < 1.3 * item.radius


def test_objects_stay_in_the_frame() -> None:
    for scene in SCENES:
        for item in scene.objects:
            for centre in (item.x, item.y):
                assert item.radius <= centre + 0.51
                assert item.radius <= IMAGE_SIZE - 1 - centre + 0.51


def test_colours_match_the_record() -> None:
    bounds = {"red": 0, "orange": 26, "yellow": 54, "green": 126, "blue": 220, "purple": 275, "pink": 330}
    for scene in SCENES:
        if scene.tint != "neutral":
            continue
        picture, masks = render_with_masks(scene)
        for item, mask in zip(scene.objects, masks, strict=True):
            # The brightest part excludes the outline and the dark tone. Clipped channels and the background at
            # soft edges would change the hue.
            inside = mask.copy()
            for axis in (0, 1):
                inside &= np.roll(mask, 1, axis) & np.roll(mask, -1, axis)
            if item.colour != "white":
                inside &= picture.max(2) < 255
            pixels = picture[inside].astype(float)
            assert len(pixels) >= 8
            light = pixels[pixels.sum(axis=1) >= np.quantile(pixels.sum(axis=1), 0.7)].mean(axis=0) / 255
            hue, saturation, _ = colorsys.rgb_to_hsv(*light)
            if item.colour == "white":
                assert saturation < 0.15, (scene, light)
            else:
                gap = abs((hue * 360 - bounds[item.colour] + 180) % 360 - 180)
                assert gap < 16, (scene, hue * 360)
                assert saturation > 0.3


def test_kinds_and_counts() -> None:
    for scene in SCENES:
        assert 1 <= len(scene.objects) <= 4
        assert sum(number for _, number in scene.kinds) == len(scene.objects)
        assert scene.count == ("one", "two", "three", "four")[len(scene.objects) - 1]
        if len(scene.kinds) == 2:
            first, second = scene.objects
            assert first.shape != second.shape
            assert first.colour != second.colour
            assert scene.value_of("shape") is None
        else:
            assert scene.value_of("shape") == scene.objects[0].shape
        assert (scene.position is None) == (len(scene.objects) > 1)
    with pytest.raises(ValueError, match="unknown attribute"):
        SCENES[0].value_of("mood")


def test_position_of_a_single_object_is_unambiguous() -> None:
    middle = (IMAGE_SIZE - 1) / 2
    for scene in SCENES:
        if scene.position is None:
            continue
        item = scene.objects[0]
        dx, dy = item.x - middle, item.y - middle
        along, across = {
            "left": (-dx, dy),
            "right": (dx, dy),
            "top": (-dy, dx),
            "bottom": (dy, dx),
            "centre": (0.0, max(abs(dx), abs(dy))),
        }[scene.position]
        assert abs(across) <= 3.0
        assert scene.position == "centre" or along >= 6.5


def test_every_value_occurs() -> None:
    scenes = [sample_scene(0, "test-unbiased", index) for index in range(600)]
    for name, values in ATTRIBUTES.items():
        assert {scene.value_of(name) for scene in scenes} - {None} == set(values), name


def test_bias_of_the_training_split() -> None:
    scenes = [sample_scene(5, "train", index) for index in range(6000)]
    for shape in LOOKALIKES:
        own = [scene for scene in scenes if scene.objects[0].shape == shape]
        rate = np.mean([scene.background == HABITAT[shape] for scene in own])
        assert abs(rate - BIAS) < 4 * math.sqrt(BIAS * (1 - BIAS) / len(own))
    for background in BACKGROUNDS:
        others = [s.background == background for s in scenes if s.objects[0].shape in PLAIN_SHAPES]
        assert abs(np.mean(others) - 1 / 6) < 4 * math.sqrt(5 / 36 / len(others))
        here = [scene.objects[0].shape for scene in scenes if scene.background == background]
        assert np.mean([shape in LOOKALIKES for shape in here]) < 0.5


def test_unbiased_split_has_no_bias() -> None:
    scenes = [sample_scene(5, "test-unbiased", index) for index in range(4000)]
    for shape in LOOKALIKES:
        own = [scene.background == HABITAT[shape] for scene in scenes if scene.objects[0].shape == shape]
        assert abs(np.mean(own) - 1 / 6) < 4 * math.sqrt(5 / 36 / len(own))


def test_lookalike_split_is_balanced() -> None:
    scenes = [sample_scene(0, "lookalike", index) for index in range(80)]
    groups = [(scene.objects[0].shape, scene.background) for scene in scenes]
    assert {groups.count(group) for group in groups} == {20}
    assert len(set(groups)) == 4
    assert all(len(scene.objects) == 1 for scene in scenes)


@pytest.mark.parametrize("hub", [0.0, 0.3])
def test_lookalikes_are_similar(hub: float) -> None:
    """They differ in the squareness of their lobes, and in the hole of some gears."""
    scene = sample_scene(0, "lookalike", 0)
    masks = {}
    for shape in LOOKALIKES:
        placed = {"shape": shape, "radius": 18.0, "x": 31.5, "y": 31.5, "hub": hub if shape == "gear" else 0.0}
        data = {**scene.to_json(), "objects": [{**scene.objects[0].__dict__, **placed}]}
        masks[shape] = render_with_masks(Scene.from_json(data))[1][0]
    flower, gear = masks.values()
    overlap = (flower & gear).sum() / (flower | gear).sum()
    assert 0.75 < overlap < 0.97
    assert gear[31, 31] == (hub == 0)


def test_only_some_gears_have_a_hub() -> None:
    items = [item for index in range(1500) for item in sample_scene(0, "test-unbiased", index).objects]
    assert not any(item.hub for item in items if item.shape != "gear")
    gears = [item.hub > 0 for item in items if item.shape == "gear"]
    assert abs(np.mean(gears) - 0.6) < 0.15
