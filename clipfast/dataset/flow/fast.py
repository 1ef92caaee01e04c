"""Fast preprocessing: JPEGs are decoded at part of their size, and images resized as bytes by torch.

The model's own preprocessing resizes whole images with Pillow. Here a JPEG is decoded at 1/2, 1/4 or 1/8 of its size
where that is not below the size it is resized to. The pixels differ by a few of 255 levels;
:mod:`clipfast.dataset.flow.difference` measures by how many, and what that does to embeddings.

Only a preprocessing of known steps has a fast form: a resize, a crop at the centre, RGB, numbers, normalisation.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from clipfast.errors import ImageError, InputError
from clipfast.preprocessing import MAX_RESIZED_PIXELS, Prepare, Transform, name_of, steps_of

Size: TypeAlias = tuple[int, int]
_MODES = {InterpolationMode.BICUBIC: "bicubic", InterpolationMode.BILINEAR: "bilinear"}


class Fast:
    """A model's preprocessing in its fast form.

    Args:
        transform: the preprocessing.

    Attributes:
        levels: the number of every byte, ``[3, 256]``.

    Raises:
        InputError: it has other steps.
    """

    def __init__(self, transform: Transform) -> None:
        levels = Prepare(transform).levels
        steps = steps_of(transform)[:-3]
        if levels is None or not steps:
            raise InputError(f"{_REFUSED}: it is not a resize, a crop, RGB, numbers and normalisation")
        self.levels: NDArray[np.float32] = levels
        self._size, self._mode = _resize(steps[0])
        self._crop: Size | None = None
        self._fill: tuple[int, ...] | int = 0
        if len(steps) == 2 and name_of(steps[1]) in ("CenterCrop", "CenterCropOrPad"):
            self._crop = _pair(steps[1].size)
            self._fill = 0 if isinstance(steps[1], CenterCrop) else steps[1].fill
        elif len(steps) > 1:
            raise InputError(f"{_REFUSED}: {', '.join(name_of(step) for step in steps[1:])} after the resize")

    def size(self, size: Size) -> Size:
        """Width and height that an image is resized to.

        Args:
            size: its own width and height, upright.

        Raises:
            ImageError: that would be too many pixels, or none.
        """
        width, height = self._size(size)
        if width * height > MAX_RESIZED_PIXELS or not (width and height):
            sizes = f"{size[0]} × {size[1]} pixels, resized to {width} × {height}"
            raise ImageError(f"too long and narrow: {sizes}", "too_large")
        return width, height

    def pixels(self, image: Image.Image, size: Size) -> NDArray[np.uint8]:
        """What :attr:`levels` are looked up for, ``[height, width, 3]``.

        Args:
            image: 8-bit RGB, upright, whole or decoded at part of its size.
            size: what :meth:`size` gives for the whole image.
        """
        planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        pixels: NDArray[np.uint8] = self.finish(planes, size).permute(1, 2, 0).numpy()
        return pixels

    def finish(self, planes: Tensor, size: Size) -> Tensor:
        """Resizes and crops images of one size.

        Torch runs this in the calling thread alone.

        Args:
            planes: uint8 ``[..., 3, height, width]``, on any device.
            size: width and height that they are resized to.

        Returns:
            uint8 ``[..., 3, height, width]``.
        """
        width, height = size
        batch = planes if planes.ndim == 4 else planes[None]
        if batch.shape[-2:] != (height, width):
            batch = F.interpolate(batch, (height, width), mode=self._mode, antialias=True)
        if self._crop is not None:
            batch = _cropped(batch, self._crop, self._fill)
        return batch if planes.ndim == 4 else batch[0]


_REFUSED = "this model's preprocessing has no fast form"


def _resize(step: Any) -> tuple[Callable[[Size], Size], str]:
    """The size that a step resizes to, width and height, and how it interpolates."""
    mode = _MODES.get(getattr(step, "interpolation", None))
    if mode is None:
        raise InputError(f"{_REFUSED}: {name_of(step)} is no bicubic or bilinear resize")
    if isinstance(step, Resize):
        target = [step.size] if isinstance(step.size, int) else list(step.size)
        if len(target) == 2:
            return lambda size: (target[1], target[0]), mode
        return lambda size: _shortest(size, target[0], step.max_size), mode
    if name_of(step) == "ResizeKeepRatio" and not (step.random_scale_prob or step.random_aspect_prob):
        return lambda size: _keeping_ratio(size, step.size, step.longest), mode
    raise InputError(f"{_REFUSED}: {name_of(step)} is no resize that is known")


def _shortest(size: Size, target: int, most: int | None) -> Size:
    """As torchvision's ``Resize`` of one number."""
    short, long = min(size), max(size)
    short, long = target, int(target * long / short)
    if most is not None and long > most:
        short, long = int(most * short / long), most
    return (short, long) if size[0] <= size[1] else (long, short)


def _keeping_ratio(size: Size, target: Size, longest: float) -> Size:
    """As open_clip's ``ResizeKeepRatio``."""
    width, height = size
    ratios = (height / target[0], width / target[1])
    ratio = max(ratios) * longest + min(ratios) * (1 - longest)
    return round(width / ratio), round(height / ratio)


def _cropped(batch: Tensor, crop: Size, fill: tuple[int, ...] | int) -> Tensor:
    """As torchvision's ``CenterCrop`` and open_clip's ``CenterCropOrPad``: what is too small is padded first."""
    wanted_height, wanted_width = crop
    height, width = batch.shape[-2:]
    if wanted_height > height or wanted_width > width:
        across, down = max(wanted_width - width, 0), max(wanted_height - height, 0)
        shape = (*batch.shape[:-2], height + down, width + across)
        colour = torch.tensor(fill, dtype=batch.dtype, device=batch.device).reshape(-1, 1, 1)
        padded = colour.expand(shape).clone()
        padded[..., down // 2 : down // 2 + height, across // 2 : across // 2 + width] = batch
        batch, height, width = padded, height + down, width + across
    top, left = round((height - wanted_height) / 2), round((width - wanted_width) / 2)
    return batch[..., top : top + wanted_height, left : left + wanted_width]


def _pair(size: Any) -> Size:
    """Height and width of a crop."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
