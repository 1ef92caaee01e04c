"""Masks of known truth, brought to where the model looks.

A model sees an image resized and cropped; a mask has to go the same way, or the two do not meet. Protocol ``"aligned"``
does that, by nearest neighbour. ``"published"`` squashes the whole mask to the model's square whatever happened to the
image, as published figures have it: for comparison with them only, the two differ for every image that is not square.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipfast.analyses.segmentation import IGNORE
from clipfast.errors import InputError


class HasInput(Protocol):
    """What has an input size: a tower."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the input."""


class HasPreprocessing(Protocol):
    """A model with preprocessing for its images."""

    preprocess: Callable[[Image.Image], Tensor]

    @property
    def tower(self) -> HasInput:
        """The vision tower."""


MaskProtocol = Literal["aligned", "published"]
Resize = Literal["shortest", "longest", "squash"]
Box: TypeAlias = tuple[int, int]

_COLOURS: Final = frozenset({"MaybeConvertMode", "MaybeToTensor", "ToTensor", "Normalize", "_convert_to_rgb"})
"""Transforms that move no pixel."""
_MODES: Final = frozenset({"1", "L", "P", "I", "I;16"})
"""PIL modes of one whole number per pixel."""


@dataclass(frozen=True)
class Geometry:
    """Where the pixels of an image go when a model's preprocessing makes its input.

    Attributes:
        image_size: height and width of the model's input.
        resize: ``"shortest"``: the image covers the input and is cropped at its centre; ``"longest"``: it fits into the
            input and is padded around; ``"squash"``: it is stretched onto the input.
    """

    image_size: Box
    resize: Resize

    def __post_init__(self) -> None:
        if self.resize not in get_args(Resize):
            raise InputError(f"resize is {self.resize!r}: choose one of {', '.join(get_args(Resize))}")
        if min(self.image_size) < 1:
            raise InputError(f"image_size is {self.image_size}, expected height and width of the model's input")

    @classmethod
    def of(cls, model: HasPreprocessing) -> "Geometry":
        """Reads the geometry off the transforms that a model's preprocessing consists of.

        Raises:
            InputError: preprocessing that consists of anything but open_clip's transforms for evaluation.
        """
        height, width = model.tower.image_size
        steps = getattr(model.preprocess, "transforms", None)
        if not isinstance(steps, list | tuple):
            raise _unknown(f"a {type(model.preprocess).__name__}", (height, width))
        moving = [step for step in steps if _name(step) not in _COLOURS]
        resize = _resize_of(moving, (height, width))
        if resize is None:
            raise _unknown(" + ".join(_described(step) for step in moving) or "no resize", (height, width))
        return cls((height, width), resize)

    def resized(self, size: Box) -> Box:
        """Height and width to which an image of a height and width is resized, before it is cropped or padded."""
        (height, width), (high, wide) = size, self.image_size
        if self.resize == "squash":
            return self.image_size
        if self.resize == "shortest" and high == wide:  # torchvision's Resize cuts the longer side's fraction off
            short, long = sorted(size)
            longer = int(high * long / short)
            return (high, longer) if height <= width else (longer, high)
        choose = min if self.resize == "shortest" else max
        ratio = choose(height / high, width / wide)
        return max(round(height / ratio), 1), max(round(width / ratio), 1)


def _resize_of(steps: list[Any], image_size: Box) -> Resize | None:
    """Which of the three geometries some transforms are, exactly; None if none."""
    names = [_name(step) for step in steps]
    crops = len(steps) == 2 and _size(steps[1]) == image_size
    if names == ["Resize"]:
        return "squash" if _size(steps[0]) == image_size and not isinstance(steps[0].size, int) else None
    if names == ["Resize", "CenterCrop"]:
        plain = steps[0].size == image_size[0] == image_size[1] and steps[0].max_size is None
        return "shortest" if plain and crops else None
    if not names or names[0] != "ResizeKeepRatio" or not crops:
        return None
    first = steps[0]
    if _size(first) != image_size or first.random_scale_prob or first.random_aspect_prob:
        return None
    if names[1] == "CenterCrop" and first.longest == 0 and image_size[0] != image_size[1]:
        return "shortest"
    return "longest" if names[1] == "CenterCropOrPad" and first.longest == 1 else None


def _name(step: Any) -> str:
    """The name of a transform of open_clip or torchvision; of any other, its whole path."""
    kind = step if hasattr(step, "__qualname__") else type(step)
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package in ("open_clip", "torchvision") else f"{kind.__module__}.{kind.__qualname__}"


def _size(step: Any) -> Box:
    size = step.size
    return (size, size) if isinstance(size, int) else cast(Box, tuple(size))


def _described(step: Any) -> str:
    size = getattr(step, "size", None)
    return _name(step) if size is None else f"{_name(step)}({size})"


def _unknown(what: str, image_size: Box) -> InputError:
    return InputError(
        f"the preprocessing is {what}: where it moves pixels is not known; "
        f'make it yourself: Geometry({image_size}, "shortest" | "longest" | "squash")'
    )


def truth(
    mask: Image.Image,
    geometry: Geometry,
    protocol: MaskProtocol = "aligned",
    *,
    foreground: int | Collection[int] | None = None,
    ignore: int | None = None,
) -> Tensor:
    """A mask as labels of the model's input pixels, ``[height, width]`` int64, by nearest neighbour.

    Args:
        mask: one label per pixel, as large as the image as it was before preprocessing. Palette images hold their
            indices, two-colour ones 0 and 1.
        geometry: what the model's preprocessing does, :meth:`Geometry.of`.
        protocol: ``"aligned"``: resized, cropped and padded as the image was, padding is :data:`IGNORE`;
            ``"published"``: squashed to the model's input.
        foreground: labels that become 1, while all others become 0; None leaves labels as they are.
        ignore: the label that becomes :data:`IGNORE`, 255 in many data sets; None for none.

    Raises:
        InputError: a mask with more than one channel or with fractions, an empty one, or no such protocol.
    """
    if protocol not in get_args(MaskProtocol):
        raise InputError(f"protocol is {protocol!r}: choose 'aligned' or 'published'")
    if mask.mode not in _MODES:
        raise InputError(f"the mask has mode {mask.mode}: one label per pixel is needed ({', '.join(sorted(_MODES))})")
    if not all(mask.size):
        raise InputError("the mask has no pixels")
    size = geometry.image_size if protocol == "published" else geometry.resized((mask.height, mask.width))
    nearest = mask.resize(size[::-1], Image.Resampling.NEAREST)
    labels = torch.from_numpy(np.array(nearest, dtype=np.int64))
    original = labels
    if foreground is not None:
        values = [foreground] if isinstance(foreground, int) else sorted(foreground)
        labels = torch.isin(original, torch.tensor(values, dtype=torch.int64)).long()
    if ignore is not None:
        labels = labels.masked_fill(original == ignore, IGNORE)
    return _centred(labels, geometry.image_size)


def _centred(labels: Tensor, size: Box) -> Tensor:
    """Labels cropped about their centre to a height and width, padded with :data:`IGNORE` where they are smaller."""
    out = labels.new_full(size, IGNORE)
    overlaps = [_overlap(available, wanted) for available, wanted in zip(labels.shape, size, strict=True)]
    ours, theirs = zip(*overlaps, strict=True)
    out[ours] = labels[theirs]
    return out


def _overlap(available: int, size: int) -> tuple[slice, slice]:
    """Which of ``size`` places are filled, and from which of ``available``, as torchvision's centre crop rounds."""
    if available >= size:
        start = round((available - size) / 2)
        return slice(size), slice(start, start + size)
    start = (size - available) // 2
    return slice(start, start + available), slice(available)
