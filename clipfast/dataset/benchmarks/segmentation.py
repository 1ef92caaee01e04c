"""ImageNet-segmentation: foreground masks of 4,276 images (Guillaumin, Küttel and Ferrari 2014).

* As published: ``gtsegs_ijcv.mat``, a MATLAB 7.3 (HDF5) file. ``/value/img`` refers to every image, stored as
  ``[3, width, height]``, and ``/value/gt`` to a cell with its mask, ``[width, height]``, 1 for the foreground.
* As plain files: a folder with ``images/`` and ``masks/``, in which a mask has its image's name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipfast.dataset.benchmarks.layout import WrongLayout, contents, is_image, some
from clipfast.errors import InputError, MissingExtra
from clipfast.files import atomic_write
from clipfast.inputs import printable

NAME = "ImageNet-segmentation"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_EXPECTED = "gtsegs_ijcv.mat, or a folder with images/ and masks/"


@dataclass(frozen=True)
class MaskedFolders:
    """Images and their masks as files; a mask has its image's name and an ending of its own.

    Attributes:
        images: folder of the images.
        masks: folder of the masks: all but 0 is foreground.
        count: images with masks.
    """

    images: Path
    masks: Path
    count: int


def find_segmentation(place: Path) -> Path:
    """The ``.mat`` file, or the folder with ``images/`` and ``masks/``, that a path stands for.

    Raises:
        InputError: nothing there, or another layout.
    """
    if place.is_file():
        return place
    if not place.is_dir():
        raise InputError(f"{NAME}: no {printable(place)}")
    if (place / "images").is_dir() and (place / "masks").is_dir():
        return place
    files = sorted(place.glob("*.mat"))
    if len(files) == 1:
        return files[0]
    raise WrongLayout(NAME, place, _EXPECTED, contents(place))


def count_segmentation(place: Path) -> int:
    """How many images there are.

    Raises:
        InputError: another layout.
        MissingExtra: a ``.mat`` file, and h5py is not installed.
    """
    place = find_segmentation(place)
    if place.is_dir():
        return masked_folders(place).count
    with _opened(place) as file:
        return len(file["value/img"])


def masked_folders(folder: Path) -> MaskedFolders:
    """The plain layout.

    Raises:
        InputError: no images, or an image without a mask.
    """
    images, masks = folder / "images", folder / "masks"
    named = sorted(path for path in images.iterdir() if is_image(path))
    known = {path.stem for path in masks.iterdir()}
    lacking = [path.name for path in named if path.stem not in known]
    if not named or lacking:
        found = f"no mask of {some(lacking)}" if named else "no images"
        raise WrongLayout(NAME, folder, "a mask in masks/ for every image in images/", found)
    return MaskedFolders(images, masks, len(named))


def extract(file: Path, out: Path, advance: Callable[[int], None] = lambda _: None) -> MaskedFolders:
    """Writes the images and masks of ``gtsegs_ijcv.mat`` as PNG files, ``000000.png`` for the first; PNG is lossless.

    Files that are there are left: a call that was interrupted goes on where it stopped. All 4,276 images take about
    1.5 GB.

    Args:
        file: the data set.
        out: gets ``images/`` and ``masks/``.
        advance: called with 1 for every image.

    Raises:
        InputError: no such file, or arrays of another shape.
        MissingExtra: h5py is not installed.
        OSError: a file cannot be written.
    """
    folders = out / "images", out / "masks"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    with _opened(file) as opened:
        count = len(opened["value/img"])
        for number in range(count):
            paths = [folder / f"{number:06d}.png" for folder in folders]
            if not all(path.exists() for path in paths):
                for path, pixels in zip(paths, _pair(opened, number, file), strict=True):
                    with atomic_write(path, durable=False) as partial:
                        Image.fromarray(pixels).save(partial, format="png")
            advance(1)
    return MaskedFolders(*folders, count)


def _pair(opened: Any, number: int, file: Path) -> tuple[Any, Any]:
    """Image ``[height, width, 3]`` and mask ``[height, width]``, uint8."""
    image = np.asarray(opened[opened["value/img"][number, 0]])
    cell = opened[opened["value/gt"][number, 0]]
    mask = np.asarray(opened[cell[0, 0]] if cell.dtype.hasobject else cell)
    channels = image[None] if image.ndim == 2 else image  # [C, width, height]
    if channels.ndim != 3 or len(channels) not in (1, 3) or mask.shape != channels.shape[1:]:
        found = f"image {list(image.shape)} and mask {list(mask.shape)} in place {number}"
        raise WrongLayout(NAME, file, "images [3, width, height] with masks [width, height]", found)
    colours = np.broadcast_to(channels, (3, *mask.shape)).transpose(2, 1, 0)  # [height, width, 3]
    return np.ascontiguousarray(colours, dtype=np.uint8), np.ascontiguousarray((mask.T != 0).astype(np.uint8))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The HDF5 file, checked for what is read."""
    try:
        with file.open("rb") as raw:
            start = raw.read(1024)
    except OSError as error:
        raise InputError(f"cannot read {printable(file)}: {error.strerror}") from None
    if _HDF5 not in (start[:8], start[512:520]):
        found = "a MATLAB 5 file" if start.startswith(b"MATLAB 5.0") else "another kind of file"
        raise WrongLayout(NAME, file, "a MATLAB 7.3 (HDF5) file", found)
    try:
        import h5py
    except ImportError:
        raise MissingExtra("h5py", "benchmarks", f"{printable(file)}") from None
    try:
        opened = h5py.File(file, "r")
    except OSError:
        raise InputError(f"{printable(file)} is damaged: it is not a whole HDF5 file") from None
    with opened:
        lacking = [name for name in ("value/img", "value/gt") if name not in opened]
        if lacking:
            raise WrongLayout(NAME, file, "/value/img and /value/gt", f"/{', /'.join(sorted(opened)) or 'nothing'}")
        if len(opened["value/img"]) != len(opened["value/gt"]):
            counts = f"{len(opened['value/img'])} images and {len(opened['value/gt'])} masks"
            raise WrongLayout(NAME, file, "a mask for every image", counts)
        yield opened
