"""A model's preprocessing, faster to the same bits, and bounded in what it allocates."""

from collections.abc import Callable
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Resize

from clipfast.errors import ImageError
from clipfast.inputs import printable

Transform: TypeAlias = Callable[[Image.Image], Tensor]

MAX_RESIZED_PIXELS = 1 << 25
"""The most pixels an image may have after resizing: 224 times 149,796, or 128 MiB."""
_LEVELS = 256
_LAST_STEPS = (["_convert_to_rgb", "ToTensor", "Normalize"], ["MaybeConvertMode", "MaybeToTensor", "Normalize"])
"""The last steps of open_clip's preprocessing, in its versions."""


class Prepare:
    """A model's preprocessing: PIL image → ``[3, height, width]``, the same bits that the preprocessing gives itself.

    open_clip's preprocessing ends by converting every byte to a float and normalising it. A channel has 256 possible
    bytes, so the results of these two steps are computed once for each and then looked up. This also avoids torch
    operations on images, each of which would wake a full set of torch's threads, in every reading thread.

    Args:
        transform: the preprocessing; called in several threads at once.
    """

    def __init__(self, transform: Transform) -> None:
        self._transform = transform
        self._steps, self._table = _split(transform)

    def __call__(self, image: Image.Image, name: str = "the image") -> Tensor:
        """The image as the model's input, ``[3, height, width]``.

        Args:
            image: what to prepare.
            name: of the image, for messages.

        Raises:
            ImageError: the image is so long and narrow that resizing it would take too much memory, or leave no pixel.
        """
        _check_resized(self._transform, image.size, name)
        if self._table is None:
            return self._transform(image)
        pixels = self._pixels(image)
        prepared = np.empty((3, *pixels.shape[:2]), np.float32)
        look_up(self._table, pixels, prepared)
        return torch.from_numpy(prepared)

    @property
    def levels(self) -> NDArray[np.float32] | None:
        """What the last two steps make of every byte, ``[3, 256]``; None for a preprocessing that has other steps."""
        return self._table

    def pixels(self, image: Image.Image, name: str = "the image") -> NDArray[np.uint8]:
        """What :attr:`levels` are looked up for, ``[height, width, 3]``; only where there are levels.

        Args:
            image: what to prepare.
            name: of the image, for messages.

        Raises:
            ImageError: as for a call.
        """
        _check_resized(self._transform, image.size, name)
        return self._pixels(image)

    def _pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        picture = image
        for step in self._steps:
            picture = step(picture)
        return np.asarray(picture)


def look_up(levels: NDArray[np.float32], pixels: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Writes an image's numbers, without torch.

    Args:
        levels: the number of every byte, ``[3, 256]``.
        pixels: ``[height, width, 3]``.
        out: ``[3, height, width]``, gets the result.
    """
    for channel, numbers in enumerate(levels):
        # mode="clip" skips the bounds check: every byte is a valid index
        np.take(numbers, pixels[:, :, channel], out=out[channel], mode="clip")


def _split(transform: Transform) -> tuple[list[Callable[[Image.Image], Image.Image]], NDArray[np.float32] | None]:
    """The steps up to an 8-bit RGB image, and the results of the others for every byte, ``[3, 256]``.

    There is no table unless the preprocessing has open_clip's own order: … → RGB → ToTensor → Normalize.
    """
    steps = steps_of(transform)
    if [name_of(step) for step in steps[-3:]] not in _LAST_STEPS or getattr(steps[-3], "mode", "RGB") != "RGB":
        return [], None
    ramp = np.broadcast_to(np.arange(_LEVELS, dtype=np.uint8)[None, :, None], (1, _LEVELS, 3))
    levels = steps[-1](steps[-2](Image.fromarray(np.ascontiguousarray(ramp))))
    if levels.dtype != torch.float32:
        return [], None
    return steps[:-2], levels[:, 0].contiguous().numpy()


def steps_of(transform: Transform) -> list[Any]:
    """The steps of a torchvision ``Compose``; none for another preprocessing."""
    return list(cast(Any, transform).transforms) if type(transform) is Compose else []


def name_of(step: object) -> str:
    """What a step is called: a function's name, or that of its class."""
    return getattr(step, "__name__", type(step).__name__)


def _check_resized(transform: Transform, size: tuple[int, int], name: str) -> None:
    """Raises :class:`ImageError` where the first resizing step would make too many pixels, or none."""
    for step in steps_of(transform):
        resized = _resized(step, size)
        if resized is None:
            continue
        width, height = resized
        if width * height > MAX_RESIZED_PIXELS or not (width and height):
            sizes = f"{size[0]} × {size[1]} pixels, resized to {width} × {height}"
            raise ImageError(f"{printable(name)}: too long and narrow: {sizes}", "too_large")
        return


def _resized(step: Any, size: tuple[int, int]) -> tuple[int, int] | None:
    """Width and height after a resizing step of torchvision or open_clip; None for other steps."""
    width, height = size
    if isinstance(step, Resize):
        target = [step.size] if isinstance(step.size, int) else list(step.size)
        if len(target) > 1:
            return target[1], target[0]
        ratio = min(width, height) / target[0]
        if step.max_size is not None:
            ratio = max(ratio, max(width, height) / step.max_size)
    elif name_of(step) == "ResizeKeepRatio":
        ratios = (height / step.size[0], width / step.size[1])
        ratio = max(ratios) * step.longest + min(ratios) * (1 - step.longest)
    else:
        return None
    return round(width / ratio), round(height / ratio)
