"""The validation images of ImageNet (ILSVRC 2012): in a folder per class, or all in one folder.

* A folder per class, named by the class's WordNet id: ``val/n01440764/ILSVRC2012_val_00000293.JPEG``.
* All in one folder, ``val/ILSVRC2012_val_00000001.JPEG``, with the class of each in ``LOC_val_solution.csv``, or in the
  development kit: ``ILSVRC2012_validation_ground_truth.txt``, whose line ``i`` has the number of the class of image
  ``i``, and ``meta.mat`` or ``map_clsloc.txt``, which have the WordNet id of every number.

Names of classes are read from ``LOC_synset_mapping.txt`` or ``synset_words.txt`` where one is beside the images.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from clipfast.dataset.benchmarks.layout import (
    Benchmark,
    LabelledImage,
    WrongLayout,
    contents,
    first_that_exists,
    is_image,
    read_columns,
    read_pairs,
    read_text,
    require_folder,
)
from clipfast.errors import InputError, MissingExtra
from clipfast.inputs import printable

NAME = "ImageNet validation images"
_WNID = re.compile(r"n\d{8}")
_FLAT = re.compile(r"ILSVRC2012_val_(\d{8})", re.IGNORECASE)
_INSIDE = ("", "val", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val")
_SOLUTION = ("LOC_val_solution.csv",)
_TRUTH = ("ILSVRC2012_validation_ground_truth.txt",)
_NUMBERS = ("meta.mat", "map_clsloc.txt")
_WORDS = ("LOC_synset_mapping.txt", "synset_words.txt")
_EXPECTED = "folders named by WordNet ids (n01440764/) or files ILSVRC2012_val_00000001.JPEG, here or in val/"


def read_imagenet(folder: Path, devkit: Path | None = None) -> Benchmark:
    """The validation images with their WordNet ids as labels.

    Args:
        folder: with the images, or with ``val/``, or the unpacked competition data.
        devkit: a folder with the development kit or ``LOC_val_solution.csv``, where they are not beside the images.

    Raises:
        InputError: another layout, or images without a class.
        MissingExtra: ``meta.mat`` is all there is, and scipy is not installed.
    """
    require_folder(NAME, folder)
    if devkit is not None:
        require_folder("the development kit", devkit)
    for place in (folder / inside for inside in _INSIDE):
        if not place.is_dir():
            continue
        classes = sorted(path for path in place.iterdir() if path.is_dir() and _WNID.fullmatch(path.name))
        near = _near(folder, place, devkit)
        if classes:
            images = tuple(
                LabelledImage(path, each.name)
                for each in classes
                for path in sorted(each.iterdir())
                if path.is_file() and is_image(path)
            )
            if not images:
                raise WrongLayout(NAME, place, "images in the folders of classes", f"{len(classes)} empty folders")
            return Benchmark(NAME, images, _names(near, {path.name for path in classes}), "names of folders")
        flat = {int(match[1]): path for path in sorted(place.iterdir()) if (match := _FLAT.match(path.stem))}
        if flat:
            labels, source = _flat_labels(place, near, flat)
            images = tuple(LabelledImage(path, labels[number]) for number, path in sorted(flat.items()))
            return Benchmark(NAME, images, _names(near, set(labels.values())), source)
    raise WrongLayout(NAME, folder, _EXPECTED, contents(folder))


def _near(folder: Path, place: Path, devkit: Path | None) -> list[Path]:
    """Folders in which the files with labels and names may be, the likeliest first."""
    roots = [*([devkit] if devkit is not None else []), folder, place, *place.parents[:4]]
    return [each for root in roots for each in (root, root / "data", root / "ILSVRC2012_devkit_t12" / "data")]


def _flat_labels(place: Path, near: list[Path], images: Mapping[int, Path]) -> tuple[dict[int, str], str]:
    """The WordNet id of every image by its number, and where they are from."""
    solution = first_that_exists(near, _SOLUTION)
    if solution is not None:
        labels = {}
        for where, row in read_columns(solution, ("ImageId", "PredictionString")):
            number, wnid = _FLAT.fullmatch(row["ImageId"]), row["PredictionString"].partition(" ")[0]
            if number is None or not _WNID.fullmatch(wnid):
                raise InputError(f"{where}: expected ILSVRC2012_val_00000001 and a WordNet id such as n01440764")
            labels[int(number[1])] = wnid
        return _complete(labels, images, solution), solution.name
    truth = first_that_exists(near, _TRUTH)
    if truth is None:
        needed = f"{_SOLUTION[0]} or {_TRUTH[0]} beside the images or in the development kit"
        raise WrongLayout(NAME, place, needed, f"{len(images)} images in one folder without their classes")
    numbers = first_that_exists([truth.parent, *near], _NUMBERS)
    if numbers is None:
        needed = f"{' or '.join(_NUMBERS)} beside {truth.name}, which names classes by number"
        raise WrongLayout(NAME, truth.parent, needed, contents(truth.parent))
    wnids = _meta(numbers) if numbers.suffix == ".mat" else _map(numbers)
    labels = {}
    for image, line in enumerate(read_text(truth).split(), 1):
        if line not in wnids:
            raise InputError(f"{printable(truth)}:{image} is {line!r}, which {numbers.name} does not have")
        labels[image] = wnids[line]
    return _complete(labels, images, truth), f"{truth.name} with {numbers.name}"


def _complete(labels: dict[int, str], images: Mapping[int, Path], file: Path) -> dict[int, str]:
    lacking = [number for number in images if number not in labels]
    if lacking:
        raise InputError(
            f"{printable(file)} has no class for {len(lacking)} of {len(images)} images, {images[lacking[0]].name} the "
            "first: it belongs to other images"
        )
    return {number: labels[number] for number in images}


def _map(file: Path) -> dict[str, str]:
    """WordNet ids by number, from lines ``n02119789 1 kit_fox``."""
    wnids = {}
    for wnid, rest in read_pairs(file, "a WordNet id, a number and a name").items():
        number = rest.split()[0]
        if not _WNID.fullmatch(wnid) or not number.isdecimal():
            raise InputError(f"{printable(file)} has {wnid!r} and {number!r}: expected a WordNet id and a number")
        wnids[number] = wnid
    return wnids


def _meta(file: Path) -> dict[str, str]:
    """WordNet ids by number, from the development kit's MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise MissingExtra("scipy", "benchmarks", f"{printable(file)} (map_clsloc.txt does without)") from None
    try:
        synsets = loadmat(file, squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in synsets}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{printable(file)} is not the development kit's meta.mat ({type(error).__name__})") from None


def _names(near: list[Path], labels: set[str]) -> dict[str, tuple[str, ...]]:
    """Names by WordNet id, from a file of synsets where one is there and has all of them."""
    file = first_that_exists(near, _WORDS)
    if file is None:
        return {}
    words = read_pairs(file, "a WordNet id and names with commas between")
    lacking = sorted(labels - set(words))
    if lacking:
        raise InputError(f"{printable(file)} has no names for {lacking[0]}: it belongs to other classes")
    return {wnid: tuple(name.strip() for name in words[wnid].split(",") if name.strip()) for wnid in sorted(set(words))}
