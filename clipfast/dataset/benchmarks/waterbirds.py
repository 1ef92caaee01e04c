"""Waterbirds: birds of land and water, each on both backgrounds (Sagawa et al. 2019, arXiv 1911.08731).

``metadata.csv`` has a row per image with the columns ``img_filename`` (below the folder), ``y`` (0 for a landbird, 1
for a waterbird), ``place`` (0 for land, 1 for water) and ``split`` (0 train, 1 validation, 2 test).
"""

from pathlib import Path
from typing import Literal, get_args

from clipfast.dataset.benchmarks.layout import (
    Benchmark,
    LabelledImage,
    WrongLayout,
    contents,
    first_that_exists,
    read_columns,
    require_folder,
)
from clipfast.errors import InputError

NAME = "Waterbirds"
Split = Literal["train", "validation", "test"]
BIRDS = ("landbird", "waterbird")
PLACES = ("land", "water")
_COLUMNS = ("img_filename", "y", "place", "split")
_FOLDER = "waterbird_complete95_forest2water2"


def read_waterbirds(folder: Path, split: Split = "test") -> Benchmark:
    """The images of a split; labels are :data:`BIRDS`, groups are a bird on a place.

    Args:
        folder: with ``metadata.csv``, or with the folder that the archive unpacks to.
        split: which images.

    Raises:
        InputError: another layout, or a row whose values are none of the above.
    """
    require_folder(NAME, folder)
    if split not in get_args(Split):
        raise InputError(f"split is {split!r}: choose one of {', '.join(get_args(Split))}")
    file = first_that_exists([folder, folder / _FOLDER], ["metadata.csv"])
    if file is None:
        raise WrongLayout(NAME, folder, "metadata.csv", contents(folder))
    wanted, images = str(get_args(Split).index(split)), []
    for place, row in read_columns(file, _COLUMNS):
        if row["y"] not in ("0", "1") or row["place"] not in ("0", "1") or row["split"] not in ("0", "1", "2"):
            raise InputError(
                f"{place} has y={row['y']}, place={row['place']}, split={row['split']}: expected 0 or 1, 0 or 1, 0 to 2"
            )
        if row["split"] == wanted:
            bird = BIRDS[int(row["y"])]
            images.append(
                LabelledImage(file.parent / row["img_filename"], bird, f"{bird} on {PLACES[int(row['place'])]}")
            )
    if not images:
        raise InputError(f"{file} has no image of the split {split} ({wanted} in the column split)")
    if not any(image.path.is_file() for image in images[:100]):
        raise WrongLayout(NAME, file.parent, f"{images[0].path.name} and others as metadata.csv names them", "none")
    names = {bird: (bird,) for bird in BIRDS}
    return Benchmark(NAME, tuple(images), names, f"{file.name}, split {split}")
