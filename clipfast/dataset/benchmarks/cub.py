"""CUB-200-2011: birds of 200 species with attributes (Wah et al. 2011, Caltech technical report CNS-TR-2011-001).

All files name images by number: ``images.txt`` (``1 001.Black_footed_Albatross/….jpg``, below ``images/``),
``image_class_labels.txt`` (``1 1``), ``classes.txt`` (``1 001.Black_footed_Albatross``), ``train_test_split.txt``
(``1 0``; 1 for training) and ``attributes/image_attribute_labels.txt`` (image, attribute, 1 if present, certainty from
1 to 4, seconds). ``attributes.txt`` (``1 has_bill_shape::curved``) is in the folder, beside it or in ``attributes/``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from clipfast.dataset.benchmarks.layout import (
    Benchmark,
    LabelledImage,
    WrongLayout,
    contents,
    first_that_exists,
    read_pairs,
    read_text,
    require_folder,
)
from clipfast.errors import InputError
from clipfast.inputs import printable

NAME = "CUB-200-2011"
Split = Literal["all", "train", "test"]
_FILES = ("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt")


def read_cub(folder: Path, split: Split = "test") -> Benchmark:
    """The images of a split; labels are the classes' folder names, names are these without number and underscores.

    Args:
        folder: ``CUB_200_2011``, or the folder that holds it.
        split: which images.

    Raises:
        InputError: another layout, or files that do not fit together.
    """
    root = _root(folder)
    if split not in get_args(Split):
        raise InputError(f"split is {split!r}: choose one of {', '.join(get_args(Split))}")
    files, labels, classes, training = _tables(root)
    images = tuple(
        LabelledImage(root / "images" / file, classes[labels[number]])
        for number, file in files.items()
        if split == "all" or training[number] == str(int(split == "train"))
    )
    if not images:
        raise InputError(f"{printable(root / _FILES[3])} has no image of the split {split}")
    if not any(image.path.is_file() for image in images[:100]):
        raise WrongLayout(NAME, root, "images/ with the files of images.txt", contents(root))
    names = {label: (_spoken(label),) for label in sorted(classes.values())}
    return Benchmark(NAME, images, names, f"image_class_labels.txt, split {split}")


def read_attribute(folder: Path, attribute: str) -> dict[Path, str]:
    """The value of an attribute of every image that has exactly one.

    Of values marked as present, those of the highest certainty count; an image with two such, or none, is left out.

    Args:
        folder: as for :func:`read_cub`.
        attribute: its name before ``::``, such as ``has_primary_color``.

    Raises:
        InputError: no attributes, no such one, or files that do not fit together.
    """
    root = _root(folder)
    named = first_that_exists([root, root.parent, root / "attributes"], ["attributes.txt"])
    marked = root / "attributes" / "image_attribute_labels.txt"
    if named is None or not marked.is_file():
        expected = "attributes.txt and attributes/image_attribute_labels.txt"
        raise WrongLayout(NAME, root, expected, contents(root))
    values = {
        number: text.partition("::")[2]
        for number, text in read_pairs(named, "a number and NAME::VALUE").items()
        if text.partition("::")[0] == attribute
    }
    if not values:
        raise InputError(f"{printable(named)} has no attribute {attribute!r}")
    files = read_pairs(root / _FILES[0], "a number and a path")
    best: dict[str, tuple[int, list[str]]] = {}
    for place, line in enumerate(read_text(marked).splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) < 4 or parts[0] not in files or not parts[3].isdecimal():
            raise InputError(f"{printable(marked)}:{place}: expected image, attribute, 0 or 1, certainty, seconds")
        image, number, present, certainty = parts[0], parts[1], parts[2], int(parts[3])
        if present != "1" or number not in values:
            continue
        level, found = best.get(image, (-1, []))
        if certainty > level:
            best[image] = (certainty, [values[number]])
        elif certainty == level:
            found.append(values[number])
    return {root / "images" / files[image]: found[0] for image, (_, found) in best.items() if len(found) == 1}


def _root(folder: Path) -> Path:
    require_folder(NAME, folder)
    for root in (folder, folder / "CUB_200_2011"):
        if (root / _FILES[0]).is_file():
            return root
    raise WrongLayout(NAME, folder, ", ".join(_FILES), contents(folder))


def _tables(root: Path) -> tuple[Mapping[str, str], Mapping[str, str], Mapping[str, str], Mapping[str, str]]:
    """Path, class number and split by image number, and label by class number, all checked against each other."""
    lacking = [name for name in _FILES if not (root / name).is_file()]
    if lacking:
        raise WrongLayout(NAME, root, lacking[0], contents(root))
    whats = ("a number and a path", "two numbers", "a number and a name", "two numbers")
    files, labels, classes, training = (read_pairs(root / name, what) for name, what in zip(_FILES, whats, strict=True))
    for number, file in files.items():
        if number not in labels or number not in training:
            place = _FILES[1] if number not in labels else _FILES[3]
            raise InputError(f"{printable(root / place)} has no line for image {number}, {file}")
        if labels[number] not in classes:
            raise InputError(f"{printable(root / _FILES[2])} has no class {labels[number]}, the label of {file}")
    return files, labels, classes, training


def _spoken(label: str) -> str:
    """``001.Black_footed_Albatross`` as ``Black footed Albatross``."""
    return re.sub(r"^\d+\.", "", label).replace("_", " ")
