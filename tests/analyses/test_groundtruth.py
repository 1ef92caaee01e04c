"""Masks where the model looks: against open_clip's own transforms, pixel by pixel."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from builders import vision_tower
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import CenterCropOrPad, PreprocessCfg, ResizeKeepRatio, image_transform_v2
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import clipfast
from clipfast.analyses.groundtruth import Geometry, truth
from clipfast.analyses.segmentation import IGNORE

SIZES: list[Any] = [16, (16, 24), (24, 16)]
RESIZES = ["shortest", "longest", "squash"]
PADDING = 77


def labelled(width: int, height: int, seed: int = 0, low: int = 0) -> Image.Image:
    """A mask of random labels below 60."""
    drawn = np.random.default_rng(seed).integers(low, 60, (height, width))
    return Image.fromarray(drawn.astype(np.uint8))


def model_of(size: Any, resize: str) -> clipfast.Model:
    """A model of an input size with open_clip's own preprocessing for it."""
    model = clipfast.wrap(vision_tower(image_size=size, patch_size=8))
    model.preprocess = image_transform_v2(PreprocessCfg(size=size, resize_mode=resize), is_train=False)
    return model


def moved(mask: Image.Image, steps: list[Any]) -> torch.Tensor:
    """A mask through the very transforms that move pixels, by nearest neighbour, padding marked."""
    for step in steps:
        if hasattr(step, "interpolation"):
            step.interpolation = InterpolationMode.NEAREST
        if hasattr(step, "fill"):
            step.fill = PADDING
        if type(step).__name__ in ("Resize", "CenterCrop", "ResizeKeepRatio", "CenterCropOrPad"):
            mask = step(mask)
    labels = torch.from_numpy(np.array(mask)).long()
    return labels.masked_fill(labels == PADDING, IGNORE)


# -------------------------------------------------------------------------------------------------------- geometries


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resize", RESIZES)
def test_the_geometry_is_read_off_the_transforms(size: Any, resize: str) -> None:
    square = (size, size) if isinstance(size, int) else size
    assert Geometry.of(model_of(size, resize)) == Geometry(square, resize)  # type: ignore[arg-type]


def test_the_bundled_model_and_a_plain_tower() -> None:
    assert Geometry.of(clipfast.load("scenes", device="cpu")) == Geometry((64, 64), "shortest")
    assert Geometry.of(clipfast.wrap(vision_tower(image_size=24))) == Geometry((24, 24), "shortest")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("resize", RESIZES)
@settings(max_examples=40, deadline=None)
@given(width=st.integers(5, 120), height=st.integers(5, 120))
def test_aligned_is_what_happens_to_the_image(size: Any, resize: str, width: int, height: int) -> None:
    """Rounding of sizes, crops and padding included."""
    mask, square = labelled(width, height), (size, size) if isinstance(size, int) else size
    steps = list(image_transform_v2(PreprocessCfg(size=size, resize_mode=resize), is_train=False).transforms)
    result = truth(mask, Geometry(square, resize))  # type: ignore[arg-type]
    assert torch.equal(result, moved(mask, steps))


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("size", [(64, 40), (40, 64), (57, 57)])
def test_aligned_is_where_the_pixels_are(resize: str, size: tuple[int, int]) -> None:
    """A white box on black through the whole preprocessing: only pixels at its edge may differ."""
    model = model_of(32, resize)
    box = np.zeros(size[::-1], dtype=np.uint8)
    box[size[1] // 4 : size[1] // 2, size[0] // 3 : size[0] - size[0] // 5] = 1
    pixels = model.preprocess(Image.fromarray(255 * box).convert("RGB"))[0]
    black, white = (model.preprocess(Image.new("RGB", (32, 32), name))[0, 0, 0] for name in ("black", "white"))
    seen = pixels > (black + white) / 2
    result = truth(Image.fromarray(box), Geometry.of(model))
    inner = result == 1
    near = F.max_pool2d(inner[None].float(), 3, 1, 1)[0] != -F.max_pool2d(-inner[None].float(), 3, 1, 1)[0]
    assert int(inner.sum()) > 50
    assert not bool((seen != inner)[~near].any())
    squashed = truth(Image.fromarray(box), Geometry.of(model), "published") == 1
    apart = bool((seen != squashed)[~near].any())
    assert apart == (size[0] != size[1] and resize != "squash")


def test_aligned_by_hand() -> None:
    """Eight columns to an input of two: four are left of the shorter side, the middle two are kept."""
    mask = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8), (4, 1)))
    assert truth(mask, Geometry((2, 2), "shortest")).tolist() == [[3, 5]] * 2  # columns 1 3 5 7 of eight
    assert truth(mask, Geometry((2, 2), "squash")).tolist() == [[2, 6]] * 2
    assert truth(mask, Geometry((2, 2), "shortest"), "published").tolist() == [[2, 6]] * 2
    assert truth(mask, Geometry((4, 4), "longest")).tolist() == [[IGNORE] * 4, *[[1, 3, 5, 7]] * 2, [IGNORE] * 4]


def test_a_mask_as_large_as_the_input_stays_as_it_is() -> None:
    mask = labelled(24, 24)
    for resize in RESIZES:
        result = truth(mask, Geometry((24, 24), resize))  # type: ignore[arg-type]
        assert torch.equal(result, torch.from_numpy(np.array(mask)).long())


# ------------------------------------------------------------------------------------------------- labels and modes


def test_every_mode_of_whole_numbers() -> None:
    labels = np.arange(16).reshape(4, 4)
    geometry, expected = Geometry((4, 4), "squash"), torch.arange(16).view(4, 4)
    palette = Image.fromarray(labels.astype(np.uint8)).convert("P")
    palette.putpalette([200] * 768)  # its colours say nothing
    palette.putdata(list(range(16)))
    for mask in (
        Image.fromarray(labels.astype(np.uint8)),
        Image.fromarray(labels.astype(np.uint16)),
        Image.fromarray(labels.astype(np.int32)),
        palette,
    ):
        assert torch.equal(truth(mask, geometry), expected), mask.mode
    assert torch.equal(truth(Image.fromarray(labels > 7), geometry), (expected > 7).long())


def test_large_labels_survive() -> None:
    labels = np.array([[0, 255], [256, 40000]])
    for kind in (np.uint16, np.int32):
        result = truth(Image.fromarray(labels.astype(kind)), Geometry((4, 4), "squash"))
        assert result[::2, ::2].tolist() == labels.tolist()


def test_foreground_and_ignored_labels() -> None:
    mask, geometry = Image.fromarray(np.array([[0, 7], [255, 9]], dtype=np.uint8)), Geometry((2, 2), "squash")
    assert truth(mask, geometry).tolist() == [[0, 7], [255, 9]]
    assert truth(mask, geometry, ignore=255).tolist() == [[0, 7], [IGNORE, 9]]
    assert truth(mask, geometry, foreground=7).tolist() == [[0, 1], [0, 0]]
    assert truth(mask, geometry, foreground=(7, 9), ignore=255).tolist() == [[0, 1], [IGNORE, 1]]
    assert truth(mask, geometry, foreground=255).tolist() == [[0, 0], [1, 0]]


# ------------------------------------------------------------------------------------------------- what is not known

NORMALISE = transforms.Normalize((0.5,) * 3, (0.25,) * 3)
FOREIGN: dict[str, list[Any]] = {
    "no resize": [],
    "RandomResizedCrop": [transforms.RandomResizedCrop(24)],
    "Pad": [transforms.Pad(3), transforms.Resize(24), transforms.CenterCrop(24)],
    "lambda": [lambda image: image, transforms.Resize(24), transforms.CenterCrop(24)],
    "a crop from a larger resize": [transforms.Resize(32), transforms.CenterCrop(24)],
    "a crop of another size": [transforms.Resize(24), transforms.CenterCrop(16)],
    "a longest side": [transforms.Resize(24, max_size=40), transforms.CenterCrop(24)],
    "no crop": [transforms.Resize(24)],
    "half way": [ResizeKeepRatio(24, longest=0.5), CenterCropOrPad(24)],
    "at random": [ResizeKeepRatio(24, longest=1, random_scale_prob=0.5), CenterCropOrPad(24)],
    "twice": [transforms.Resize((24, 24)), transforms.Resize((24, 24))],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_unknown_preprocessing_is_refused(name: str) -> None:
    model = clipfast.wrap(vision_tower(image_size=24))
    model.preprocess = transforms.Compose([*FOREIGN[name], transforms.ToTensor(), NORMALISE])
    with pytest.raises(clipfast.InputError, match=r"where it moves pixels is not known; make it yourself: Geometry\("):
        Geometry.of(model)


def test_preprocessing_of_training_and_of_no_steps_is_refused() -> None:
    model = clipfast.wrap(vision_tower(image_size=24))
    model.preprocess = image_transform_v2(PreprocessCfg(size=24), is_train=True)
    with pytest.raises(clipfast.InputError, match="the preprocessing is RandomResizedCrop"):
        Geometry.of(model)
    model.preprocess = lambda image: torch.zeros(3, 24, 24)
    with pytest.raises(clipfast.InputError, match="the preprocessing is a function: where it moves"):
        Geometry.of(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Geometry((24, 24), "crop"), "resize is 'crop': choose one of shortest, longest, squash"),  # type: ignore[arg-type]
        (lambda: Geometry((0, 24), "squash"), r"image_size is \(0, 24\)"),
        (lambda: truth(labelled(9, 9), Geometry((8, 8), "squash"), "crop"), "protocol is 'crop'"),  # type: ignore[arg-type]
        (lambda: truth(labelled(9, 9).convert("RGB"), Geometry((8, 8), "squash")), "the mask has mode RGB"),
        (lambda: truth(labelled(9, 9).convert("F"), Geometry((8, 8), "squash")), "the mask has mode F"),
        (lambda: truth(Image.new("L", (0, 5)), Geometry((8, 8), "squash")), "the mask has no pixels"),
    ],
)
def test_what_does_not_fit(call: Any, message: str) -> None:
    with pytest.raises(clipfast.InputError, match=message):
        call()


def test_the_size_before_the_crop() -> None:
    geometry = Geometry((16, 16), "shortest")
    assert geometry.resized((30, 47)) == (16, 25)  # 25.07 cut off
    assert geometry.resized((47, 30)) == (25, 16)
    assert Geometry((16, 16), "longest").resized((30, 47)) == (10, 16)  # 10.2 rounded
    assert geometry.resized((16, 16)) == (16, 16)
