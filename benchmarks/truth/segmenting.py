"""Zero-shot segmentation: clipfast and five other methods on the same tower, by one protocol."""

from typing import Any

import torch
from PIL import Image

import clipfast
from benchmarks.truth.scenes import Bar, classifier
from clipfast.analyses.groundtruth import Geometry, truth
from clipfast.analyses.relevance import METHODS
from clipfast.analyses.segmentation import Scores, heat, normalise
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.scene import sample_scene
from clipfast.scenes.vocabulary import SHAPES

OURS = "clipfast"
_BATCH = 50


def experiment(model: clipfast.Model, count: int) -> dict[str, Any]:
    """Scores of every method on the first scenes with one shape.

    Every method explains the same direction: the text of the shape minus the mean over all shapes and backgrounds.
    """
    texts = torch.cat([classifier(model, "shape"), classifier(model, "background")])
    directions = texts - texts.mean(0)
    scale = float(model.module.logit_scale.detach().exp())
    geometry = Geometry.of(model)
    scores = {name: Scores() for name in (OURS, *METHODS)}
    for pictures, masks, targets in _batches(count):
        images = model.prepare(pictures)
        truths = torch.stack([truth(mask, geometry, foreground=range(1, 256)) for mask in masks])
        maps = model.decompose(images, texts=texts, maps="summed").patch_maps()
        scores[OURS].update(heat(maps, targets, geometry.image_size), truths)
        for name, method in METHODS.items():
            relevance = method(model.tower, images, scale * directions[targets])
            scores[name].update(normalise(relevance, geometry.image_size), truths)
    rows = {
        name: {"accuracy": score.accuracy, "mean_iou": score.mean_iou, "mean_ap": score.mean_ap}
        for name, score in scores.items()
    }
    best = max(METHODS, key=lambda name: rows[name]["mean_iou"])
    ours = 100 * rows[OURS]["mean_iou"]
    return {
        "scenes": count,
        "methods": rows,
        "bars": [
            Bar(
                f"mIoU minus that of the best other method ({best}), points",
                ours - 100 * rows[best]["mean_iou"],
                0,
                False,
            ),
            Bar("mIoU minus that of raw attention, points", ours - 100 * rows["attention"]["mean_iou"], 5, False),
        ],
    }


def _batches(count: int) -> Any:
    """Pictures, masks and shapes of scenes with one shape."""
    pictures: list[Image.Image] = []
    masks: list[Image.Image] = []
    targets: list[int] = []
    index = taken = 0
    while taken < count:
        scene = sample_scene(0, "test-unbiased", index)
        index += 1
        shape = scene.value_of("shape")
        if shape is None:
            continue
        pixels, objects = render_with_masks(scene)
        pictures.append(Image.fromarray(pixels))
        masks.append(Image.fromarray(objects.any(0).astype("uint8")))
        targets.append(SHAPES.index(shape))
        taken += 1
        if len(pictures) == _BATCH or taken == count:
            yield pictures, masks, torch.tensor(targets)
            pictures, masks, targets = [], [], []
