"""Readers of public data sets, on drawn scenes in the same layouts: every label is the scene's own, by its name."""

import csv
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipfast.dataset.benchmarks.cub import read_attribute, read_cub
from clipfast.dataset.benchmarks.imagenet import read_imagenet
from clipfast.dataset.benchmarks.segmentation import count_segmentation, extract, find_segmentation, masked_folders
from clipfast.dataset.benchmarks.waterbirds import read_waterbirds
from clipfast.errors import InputError, MissingExtra
from clipfast.scenes import layouts
from clipfast.scenes.scene import sample_scene
from clipfast.scenes.vocabulary import LOOKALIKES, SHAPES

COUNT = 12
SCENES = list(islice(layouts.shape_scenes(COUNT), COUNT))
NEEDS_H5PY = "the file is HDF5, and h5py (the extra benchmarks) is not installed"


def number_of(path: Path) -> int:
    return int(re.findall(r"\d+", path.stem)[-1])


# ------------------------------------------------------------------------------------------------------------ ImageNet


@pytest.mark.parametrize("layout", ["folders", "solution", "devkit"])
def test_imagenet_labels_are_looked_up_by_name(layout: layouts.Layout, tmp_path: Path) -> None:
    layouts.write_imagenet(tmp_path, COUNT, layout=layout)
    read = read_imagenet(tmp_path)
    assert {number_of(image.path): image.label for image in read.images} == {
        number: layouts.wnid(shape) for number, (_, shape) in enumerate(SCENES, 1)
    }
    assert all(image.path.is_file() and image.group is None for image in read.images)
    assert read.names[layouts.wnid("star")] == ("star", "star shape")
    assert len(read.names) == len(SHAPES)
    assert read.groups == Counter()
    assert read.labels == sorted({layouts.wnid(shape) for _, shape in SCENES})


def test_imagenet_is_found_from_its_images_or_above(tmp_path: Path) -> None:
    inside = layouts.write_imagenet(tmp_path / "ILSVRC" / "Data" / "CLS-LOC", COUNT)
    for name in ("LOC_synset_mapping.txt",):
        shutil.move(inside / name, tmp_path / name)
    for place in (tmp_path, inside, inside / "val"):
        read = read_imagenet(place)
        assert len(read.images) == COUNT
        assert len(read.names) == len(SHAPES)


def test_some_of_the_flat_images_keep_their_labels(tmp_path: Path) -> None:
    """A subset, in which position and number differ: labels by position would be wrong."""
    layouts.write_imagenet(tmp_path, COUNT, layout="devkit")
    kept = random.Random(0).sample(sorted((tmp_path / "val").iterdir()), 5)
    for path in set((tmp_path / "val").iterdir()) - set(kept):
        path.unlink()
    read = read_imagenet(tmp_path)
    labels = {number_of(image.path): image.label for image in read.images}
    assert labels == {number_of(path): layouts.wnid(SCENES[number_of(path) - 1][1]) for path in kept}


def test_the_development_kit_may_be_elsewhere(tmp_path: Path) -> None:
    layouts.write_imagenet(tmp_path / "a", COUNT, layout="devkit")
    shutil.move(tmp_path / "a" / "ILSVRC2012_devkit_t12", tmp_path / "kit")
    with pytest.raises(InputError, match="without their classes"):
        read_imagenet(tmp_path / "a")
    assert len(read_imagenet(tmp_path / "a", tmp_path / "kit").images) == COUNT


def test_the_development_kits_matlab_file(tmp_path: Path) -> None:
    layouts.write_imagenet(tmp_path, COUNT, layout="devkit")
    expected = read_imagenet(tmp_path)
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    rows = [line.split() for line in (data / "map_clsloc.txt").read_text().splitlines()]
    (data / "map_clsloc.txt").unlink()
    scipy = pytest.importorskip("scipy.io", reason="scipy (the extra benchmarks) is not installed")
    synsets = np.array([(int(number), wnid) for wnid, number, _ in rows], [("ILSVRC2012_ID", "O"), ("WNID", "O")])
    scipy.savemat(data / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    assert read_imagenet(tmp_path).images == expected.images


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("folders", lambda at: shutil.rmtree(at / "val"), r"expected folders named by WordNet ids .* found LOC_synset"),
        (
            "folders",
            lambda at: [path.unlink() for path in (at / "val").rglob("*.JPEG")],
            r"expected images in the folders of classes, found \d+ empty folders",
        ),
        (
            "folders",
            lambda at: (at / "LOC_synset_mapping.txt").write_text("n00000001 a thing\n"),
            r"has no names for n9000000\d: it belongs to other classes",
        ),
        (
            "folders",
            lambda at: (at / "LOC_synset_mapping.txt").write_text("n90000001\n"),
            r":1 is 'n90000001': expected",
        ),
        (
            "solution",
            lambda at: (at / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n"),
            r"has no class for 12 of 12 images, ILSVRC2012_val_00000001.JPEG the first",
        ),
        (
            "solution",
            lambda at: (at / "LOC_val_solution.csv").write_text("image,class\n"),
            r"has no column 'ImageId': expected ImageId, PredictionString, found image, class",
        ),
        (
            "solution",
            lambda at: (at / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n1,n90000001\n"),
            r"LOC_val_solution.csv:2: expected ILSVRC2012_val_00000001 and a WordNet id",
        ),
        (
            "devkit",
            lambda at: next(at.rglob("*ground_truth.txt")).write_text("77\n" * COUNT),
            r"ground_truth.txt:1 is '77', which map_clsloc.txt does not have",
        ),
        (
            "devkit",
            lambda at: next(at.rglob("*ground_truth.txt")).write_text("1\n"),
            r"has no class for 11 of 12 images, ILSVRC2012_val_00000002.JPEG the first",
        ),
        (
            "devkit",
            lambda at: next(at.rglob("map_clsloc.txt")).unlink(),
            r"expected meta.mat or map_clsloc.txt beside ILSVRC2012_validation_ground_truth.txt",
        ),
    ],
)
def test_other_layouts_of_imagenet_say_what_was_expected(
    layout: layouts.Layout, change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    layouts.write_imagenet(tmp_path, COUNT, layout=layout)
    change(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        read_imagenet(tmp_path)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------- Waterbirds


def test_waterbirds_are_read_with_their_groups(tmp_path: Path) -> None:
    layouts.write_waterbirds(tmp_path, 8, train=6)
    test, train = read_waterbirds(tmp_path), read_waterbirds(tmp_path, "train")
    assert len(test.images) == 8
    assert len(train.images) == 6
    for index, image in enumerate(test.images):
        scene = sample_scene(0, "lookalike", index)
        bird = {"flower": "landbird", "gear": "waterbird"}[scene.objects[0].shape]
        assert (image.label, image.group) == (
            bird,
            f"{bird} on { {'forest': 'land', 'city': 'water'}[scene.background] }",
        )
        assert image.path.is_file()
    assert set(test.groups.values()) == {2}
    own = train.groups["landbird on land"] + train.groups["waterbird on water"]
    assert own > len(train.images) / 2  # the spurious correlation of the training split
    assert LOOKALIKES == ("flower", "gear")


def test_the_folder_above_waterbirds_will_do(tmp_path: Path) -> None:
    layouts.write_waterbirds(tmp_path / "waterbird_complete95_forest2water2", 4)
    assert len(read_waterbirds(tmp_path).images) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"expected metadata.csv, found an empty folder"),
        ("img_filename,y,split\n", r"has no column 'place': expected img_filename, y, place, split, found img_"),
        ("img_filename,y,place,split\na.jpg,2,0,2\n", r"metadata.csv:2 has y=2, place=0, split=2: expected 0 or 1"),
        ("img_filename,y,place,split\na.jpg,1,0,0\n", r"has no image of the split test \(2 in the column split\)"),
        ("img_filename,y,place,split\na.jpg,1,0,2\n", r"expected a.jpg and others as metadata.csv names them, found"),
    ],
)
def test_other_layouts_of_waterbirds(rows: str | None, message: str, tmp_path: Path) -> None:
    if rows is not None:
        (tmp_path / "metadata.csv").write_text(rows)
    with pytest.raises(InputError, match=message):
        read_waterbirds(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- CUB


def test_cub_is_read_with_classes_splits_and_attributes(tmp_path: Path) -> None:
    layouts.write_cub(tmp_path / "CUB_200_2011", COUNT)
    splits = {split: read_cub(tmp_path, split) for split in ("all", "train", "test")}
    assert {split: len(read.images) for split, read in splits.items()} == {"all": 12, "train": 3, "test": 9}
    labels = {number_of(image.path): image.label for image in splits["all"].images}
    assert labels == {
        n: f"{SHAPES.index(shape) + 1:03d}.{shape.capitalize()}" for n, (_, shape) in enumerate(SCENES, 1)
    }
    assert splits["test"].names["004.Star"] == ("Star",)
    colours = read_attribute(tmp_path, "has_primary_color")
    assert {number_of(path): value for path, value in colours.items()} == {
        number: scene.value_of("colour") for number, (scene, _) in enumerate(SCENES, 1)
    }
    assert set(colours) == {image.path for image in splits["all"].images}


def test_an_attribute_counts_only_where_the_surest_value_is_one(tmp_path: Path) -> None:
    root = layouts.write_cub(tmp_path, 4)
    lines = ["1 1 1 4 0", "1 2 1 3 0", "2 1 1 3 0", "2 2 1 3 0", "3 1 0 4 0", "4 2 1 1 0"]
    (root / "attributes" / "image_attribute_labels.txt").write_text("\n".join(lines) + "\n")
    shutil.move(root / "attributes" / "attributes.txt", root / "attributes.txt")
    values = {number_of(path): value for path, value in read_attribute(root, "has_primary_color").items()}
    assert values == {1: "red", 4: "orange"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda at: (at / "images.txt").unlink(),
            r"expected images.txt, image_class_labels.txt, classes.txt, .* found",
        ),
        (lambda at: (at / "classes.txt").unlink(), r"expected classes.txt, found"),
        (lambda at: (at / "images.txt").write_text("1\n"), r"images.txt:1 is '1': expected a number and a path"),
        (lambda at: (at / "images.txt").write_text("1 a\n1 b\n"), r"images.txt:2 names '1' a second time"),
        (lambda at: (at / "train_test_split.txt").write_text("1 0\n"), r"train_test_split.txt has no line for image 2"),
        (lambda at: (at / "classes.txt").write_text("77 a\n"), r"classes.txt has no class \d+, the label of"),
        (lambda at: shutil.rmtree(at / "images"), r"expected images/ with the files of images.txt, found"),
    ],
)
def test_other_layouts_of_cub(change: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    layouts.write_cub(tmp_path, 4)
    change(tmp_path)
    with pytest.raises(InputError, match=message):
        read_cub(tmp_path)


def test_attributes_that_are_not_there(tmp_path: Path) -> None:
    layouts.write_cub(tmp_path, 4)
    with pytest.raises(InputError, match="has no attribute 'has_beard'"):
        read_attribute(tmp_path, "has_beard")
    (tmp_path / "attributes" / "image_attribute_labels.txt").write_text("1 1\n")
    with pytest.raises(InputError, match=r"image_attribute_labels.txt:1: expected image, attribute"):
        read_attribute(tmp_path, "has_primary_color")
    shutil.rmtree(tmp_path / "attributes")
    with pytest.raises(InputError, match=r"expected attributes.txt and attributes/image_attribute_labels.txt"):
        read_attribute(tmp_path, "has_primary_color")


# -------------------------------------------------------------------------------------------------------- segmentation


def pairs(images: Path, masks: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (np.asarray(Image.open(path)), np.asarray(Image.open(masks / f"{path.stem}.png")))
        for path in sorted(images.iterdir())
    ]


def check_pairs(images: Path, masks: Path, count: int) -> None:
    read = pairs(images, masks)
    assert len(read) == count
    for (image, mask), (pixels, truth) in zip(read, layouts.masked_scenes(count), strict=True):
        assert np.array_equal(image, pixels)
        assert np.array_equal(mask, truth)
        assert 0 < truth.mean() < 1


def test_masks_in_folders(tmp_path: Path) -> None:
    layouts.write_segmentation(tmp_path, 3)
    assert find_segmentation(tmp_path) == tmp_path
    assert count_segmentation(tmp_path) == 3
    found = masked_folders(tmp_path)
    check_pairs(found.images, found.masks, 3)
    (tmp_path / "masks" / "000001.png").unlink()
    with pytest.raises(InputError, match=r"expected a mask in masks/ for every image .* found no mask of 000001.png"):
        masked_folders(tmp_path)


def test_the_published_file_gives_the_same_pixels(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason=NEEDS_H5PY)
    file = layouts.write_segmentation_mat(tmp_path / "set" / "gtsegs_ijcv.mat", 4)
    assert find_segmentation(tmp_path / "set") == file
    assert count_segmentation(file) == 4
    seen: list[int] = []
    out = extract(file, tmp_path / "out", seen.append)
    assert seen == [1] * 4
    check_pairs(out.images, out.masks, 4)
    before = (out.images / "000000.png").stat().st_mtime_ns
    (out.masks / "000002.png").unlink()  # as if it had been interrupted
    extract(file, tmp_path / "out")
    check_pairs(out.images, out.masks, 4)
    assert (out.images / "000000.png").stat().st_mtime_ns == before
    with h5py.File(file, "r+") as opened:
        image = np.asarray(opened[opened["value/img"][1, 0]])
        opened["#refs#/image1"].attrs["read"] = 1
        opened["value/img"][1, 0] = opened.create_dataset("#refs#/turned", data=image[:, :, :50]).ref
    with pytest.raises(InputError, match=r"found image \[3, 64, 50\] and mask \[64, 64\] in place 1"):
        extract(file, tmp_path / "other")


def test_wide_and_grey_images_are_turned_the_right_way(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason=NEEDS_H5PY)
    wide = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)  # height 2, width 5
    with h5py.File(tmp_path / "a.mat", "w") as opened:
        for name in ("img", "gt"):
            opened.create_dataset(f"value/{name}", (2, 1), h5py.ref_dtype)
        for row, array in enumerate((wide.transpose(2, 1, 0), wide[..., 0].T)):
            opened["value/img"][row, 0] = opened.create_dataset(f"r/i{row}", data=array).ref
            opened["value/gt"][row, 0] = opened.create_dataset(f"r/g{row}", data=(wide[..., 0] > 9).T * 2.0).ref
    out = extract(tmp_path / "a.mat", tmp_path / "out")
    (first, mask), (grey, _) = pairs(out.images, out.masks)
    assert np.array_equal(first, wide)
    assert np.array_equal(mask, (wide[..., 0] > 9).astype(np.uint8))
    assert np.array_equal(grey, np.repeat(wide[..., :1], 3, 2))


def test_other_files_in_place_of_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "gtsegs_ijcv.mat"
    file.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(600))
    with pytest.raises(InputError, match=r"expected a MATLAB 7.3 \(HDF5\) file, found a MATLAB 5 file"):
        count_segmentation(file)
    file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(600))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "h5py", None)
        with pytest.raises(MissingExtra, match=r"pip install 'clipfast\[benchmarks\]'"):
            count_segmentation(file)
    with pytest.raises(InputError, match=r"no .*nothing"):
        count_segmentation(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"expected gtsegs_ijcv.mat, or a folder with images/ and masks/, found an"):
        count_segmentation(tmp_path / "other")
    h5py = pytest.importorskip("h5py", reason=NEEDS_H5PY)
    with pytest.raises(InputError, match="damaged"):
        count_segmentation(file)
    with h5py.File(file, "w") as opened:
        opened.create_group("data")
    with pytest.raises(InputError, match=r"expected /value/img and /value/gt, found /data"):
        count_segmentation(file)


# ---------------------------------------------------------------------------------------------------------------- lists


def test_a_list_has_absolute_paths_labels_and_groups(tmp_path: Path) -> None:
    layouts.write_waterbirds(tmp_path / "w", 4)
    path = read_waterbirds(tmp_path / "w").write_list(tmp_path / "images.csv")
    rows = list(csv.DictReader(path.open()))
    assert [row["label"] for row in rows] == ["landbird", "waterbird"] * 2
    assert all(Path(row["file"]).is_absolute() and Path(row["file"]).is_file() for row in rows)
    assert {row["group"] for row in rows} == {
        f"{b} on {p}" for b in ("landbird", "waterbird") for p in ("land", "water")
    }


@pytest.mark.parametrize("read", [read_imagenet, read_waterbirds, read_cub])
def test_no_folder(read: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no .*missing"):
        read(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, not a folder"):
        read(tmp_path / "file")
