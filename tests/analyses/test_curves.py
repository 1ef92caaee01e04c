"""Deletion and insertion curves: cases computed by hand, any map, and a map that knows where a scene's object is."""

import re

import pytest
import torch
from measures import error
from PIL import Image
from tolerances import FLOAT32, FLOAT64
from torch import Tensor

import clipfast
from clipfast import InputError
from clipfast.analyses.curves import deletion, insertion
from clipfast.scenes.drawing import render_with_masks
from clipfast.scenes.scene import sample_scene
from clipfast.scenes.vocabulary import SHAPES

CLASSIFIER = torch.eye(2, dtype=torch.float64)


def two_colours(images: Tensor) -> Tensor:
    """An "embedding" of two numbers: the mean of the first channel, and one."""
    return torch.stack([images[:, 0].mean((1, 2)), torch.ones(len(images), dtype=images.dtype)], 1)


def four_cells() -> Tensor:
    """One image of 2 × 2 cells of 2 × 2 pixels; the first channel of the cells is 8, 4, 2 and 1."""
    cells = torch.tensor([[8.0, 4.0], [2.0, 1.0]], dtype=torch.float64)
    image = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    image[0, 0] = cells.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return image


def test_a_curve_computed_by_hand() -> None:
    heat = torch.tensor([[[3.0, 1.0], [2.0, 0.0]]], dtype=torch.float64)  # cells go in the order 8, 2, 4, 1
    black = torch.zeros(1, dtype=torch.float64)
    given = {"scale": 2.0, "steps": 4, "fill": black}
    target = torch.tensor([0])
    means = torch.tensor([15 / 4, 7 / 4, 5 / 4, 1 / 4, 0], dtype=torch.float64)
    cosines = means / (means**2 + 1).sqrt()
    others = 1 / (means**2 + 1).sqrt()
    probabilities = (2 * cosines).exp() / ((2 * cosines).exp() + (2 * others).exp())
    curve = deletion(two_colours, four_cells(), heat, CLASSIFIER, target, **given)
    assert error(curve.fractions, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)) == 0
    assert error(curve.similarities[0], cosines) <= FLOAT64
    assert error(curve.probabilities[0], probabilities) <= FLOAT64
    area = (probabilities[0] / 2 + probabilities[1:4].sum() + probabilities[4] / 2) / 4
    assert error(curve.area(), area[None]) <= FLOAT64
    shown = insertion(two_colours, four_cells(), heat, CLASSIFIER, target, **given)
    means = torch.tensor([0, 8 / 4, 10 / 4, 14 / 4, 15 / 4], dtype=torch.float64)
    assert error(shown.similarities[0], means / (means**2 + 1).sqrt()) <= FLOAT64
    assert error(shown.area("similarities"), torch.trapezoid(shown.similarities, dx=0.25)) <= FLOAT64


def test_fills_and_ties() -> None:
    target, level = torch.tensor([0]), torch.zeros(1, 2, 2, dtype=torch.float64)
    black = deletion(two_colours, four_cells(), level, CLASSIFIER, target, scale=1.0, steps=4, fill=torch.zeros(()))
    means = torch.tensor([15, 7, 3, 1, 0], dtype=torch.float64) / 4  # of equal cells the first goes first
    assert error(black.similarities[0], means / (means**2 + 1).sqrt()) <= FLOAT64
    mean = deletion(two_colours, four_cells(), level, CLASSIFIER, target, scale=1.0, steps=4)
    for end in (0, 4):  # the image's mean colour keeps its mean
        assert error(mean.similarities[:, end], black.similarities[:, 0]) <= FLOAT64
    blurred = deletion(two_colours, four_cells(), level, CLASSIFIER, target, scale=1.0, steps=1, fill="blur")
    assert error(blurred.similarities[0, 1], black.similarities[0, 0]) <= FLOAT64  # its four means average to the mean
    assert len(deletion(two_colours, four_cells(), level, CLASSIFIER, target, scale=1.0, steps=50).fractions) == 5


def test_each_image_has_its_own_order_and_class() -> None:
    images = four_cells().repeat(2, 1, 1, 1)
    heat = torch.tensor([[[3.0, 2.0], [1.0, 0.0]], [[0.0, 1.0], [2.0, 3.0]]])
    both = deletion(two_colours, images, heat, CLASSIFIER, torch.tensor([0, 1]), scale=1.0, fill=torch.zeros(()))
    for row in (0, 1):
        alone = deletion(
            two_colours,
            images[:1],
            heat[row : row + 1],
            CLASSIFIER,
            torch.tensor([row]),
            scale=1.0,
            fill=torch.zeros(()),
        )
        assert error(both.probabilities[row], alone.probabilities[0]) <= FLOAT64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": torch.zeros(3, 4, 4)},
            "images is torch.float32 [3, 4, 4], expected floating [B, 3, height, width]",
        ),
        ({"heat": torch.zeros(2, 2, 2)}, "heat has shape [2, 2, 2], expected [1, rows, columns]"),
        ({"heat": torch.zeros(1, 3, 2)}, "3 × 2 cells do not divide images of 4 × 4 pixels evenly"),
        ({"heat": torch.full((1, 2, 2), torch.nan)}, "heat has values that are not finite"),
        ({"classifier": torch.zeros(2)}, "the classifier has shape [2], expected [classes, embed_dim]"),
        ({"targets": torch.zeros(1)}, "targets is torch.float32 [1], expected integers [1]"),
        ({"targets": torch.tensor([2])}, "targets go from 2 to 2: there are 2 classes"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"fill": "grey"}, "fill is 'grey': choose from mean, blur, or give pixels"),
        ({"fill": torch.zeros(5)}, "fill has shape [5], which does not broadcast to [1, 3, 4, 4]"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict, message: str) -> None:
    given = {"images": four_cells(), "heat": torch.zeros(1, 2, 2), "classifier": CLASSIFIER, "scale": 1.0}
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        deletion(two_colours, **(given | {"targets": torch.tensor([0])} | changes))


def test_a_map_of_the_object_beats_its_opposite() -> None:
    """Scenes' own masks: without its object a scene loses its shape at once; without the background it keeps it."""
    model = clipfast.load("scenes")
    drawn = [render_with_masks(sample_scene(0, "test-unbiased", index)) for index in (3, 6)]
    shapes = [str(sample_scene(0, "test-unbiased", index).objects[0].shape) for index in (3, 6)]
    images = model.prepare([Image.fromarray(pixels) for pixels, _ in drawn])
    masks = torch.stack([torch.from_numpy(objects.any(0)) for _, objects in drawn]).double()
    heat = torch.nn.functional.avg_pool2d(masks, 8)  # the share of each patch that is object
    classifier = model.encode_text([f"a photo of a {shape}" for shape in SHAPES])
    targets = torch.tensor([SHAPES.index(shape) for shape in shapes])
    scale = float(model.module.logit_scale.detach().exp())
    first, last = (
        deletion(model.encode_image, images, sign * heat, classifier, targets, scale=scale, steps=4) for sign in (1, -1)
    )
    assert first.area().mean() < 0.5 * last.area().mean()
    whole = model.encode_image(images) @ classifier.T
    assert error(first.similarities[:, 0], whole.gather(1, targets[:, None])[:, 0]) <= FLOAT32
    assert error(first.similarities[:, -1], last.similarities[:, -1]) <= FLOAT32  # all of it is gone
