"""Data sets of Python as inputs: Hugging Face's, torch's, sequences, iterables and generators."""

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from input_files import Given, encoded, everything, given, level, picture, read
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from clipfast.dataset.inputs.objects import IterableInput, from_object
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.plan import Input, write_plan
from clipfast.errors import InputError


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pixels(number: int) -> Any:
    return torch.full((3, 4, 5), number, dtype=torch.uint8)


FORMS: dict[str, Callable[[int], Any]] = {
    "pil": picture,
    "lazy pil": lambda number: Image.open(io.BytesIO(encoded(number))),
    "bytes": encoded,
    "bytearray": lambda number: bytearray(encoded(number)),
    "tensor": pixels,
    "one channel": lambda number: pixels(number)[:1],
    "array": lambda number: pixels(number).permute(1, 2, 0).numpy(),
    "grey array": lambda number: pixels(number)[0].numpy(),
    "struct": lambda number: {"bytes": encoded(number), "path": None},
}


class Images(Dataset[Any]):
    """Gives what ``make`` makes of a number."""

    def __init__(self, make: Callable[[int], Any], count: int = 7) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return self.make(number)


def in_units(source: Input, folder: Path, size: int = 3) -> list[Given]:
    plan = write_plan(folder, [source], size)
    return [read(source, unit) for unit in plan.units()]


def levels(parts: list[Given]) -> list[int]:
    return [level(sample) for part in parts for sample in part.good]


# --------------------------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("form", FORMS)
def test_torch_data_sets_give_images_of_every_form(tmp_path: Path, form: str) -> None:
    make = FORMS[form]
    for data, columns in (
        (Images(make), {}),
        (Images(lambda number: (make(number), number % 2)), {"label": "1"}),
        (Images(lambda number: (make(number), torch.tensor(number % 2))), {"label": "1"}),
        (Images(lambda number: {"image": make(number), "label": np.int64(1), "more": [1]}), {"label": "1"}),
    ):
        source = from_object(data)
        parts = in_units(source, tmp_path)
        assert levels(parts) == list(range(7))
        assert [sample.id for part in parts for sample in part.samples] == [f"Images:{n}" for n in range(7)]
        assert dict(parts[0].samples[1].columns) == columns
        names = given(source.names(next(iter(source.units(3)))))
        assert [(each.id, each.content, dict(each.columns)) for each in names.samples] == [
            (f"Images:{number}", None, {}) for number in range(3)
        ]


def test_ranges_of_a_torch_data_set_are_read_alone_and_in_any_order(tmp_path: Path) -> None:
    asked: list[int] = []

    def make(number: int) -> Any:
        asked.append(number)
        return pixels(number), number

    data = Images(make)
    data.classes = [f"c{number}" for number in range(7)]  # type: ignore[attr-defined]
    source = from_object(data, name="train")
    units = list(write_plan(tmp_path, [source], 3).units())
    assert [(unit.start, unit.stop) for unit in units] == [(0, 3), (3, 6), (6, 7)]
    asked.clear()
    have = read(source, units[2])
    assert asked == [6]
    assert (have.ids, dict(have.good[0].columns)) == (["train:6"], {"label": "c6"})


def test_items_that_fail_are_given_with_the_reason(tmp_path: Path) -> None:
    def make(number: int) -> Any:
        if number == 1:
            raise ValueError("a bad\nrecord")
        if number == 2:
            raise FileNotFoundError("x.png")
        if number == 3:
            raise MemoryError
        if number == 4:
            return torch.zeros(3, 4, 4)
        if number == 5:
            return Image.open(io.BytesIO(encoded(1)[:50]))
        return str(tmp_path / "gone.png") if number == 6 else pixels(number)

    have = everything(from_object(Images(make)))
    assert have.failures == {
        "Images:1": "decode_error",
        "Images:2": "missing",
        "Images:3": "out_of_memory",
        "Images:4": "no_image",
        "Images:5": "decode_error",
    }
    reasons = {sample.id: sample.failure.reason for sample in have.samples if sample.failure is not None}
    assert reasons["Images:1"] == "Images:1: damaged, or its data set failed (ValueError: a bad record)"
    assert "Images:4: its image is a float32 tensor [3, 4, 4]: expected a PIL image" in reasons["Images:4"]
    assert have.good[-1].path == str(tmp_path / "gone.png")


def test_a_data_set_of_floats_is_refused_before_anything_is_computed() -> None:
    source = from_object(Images(lambda _: torch.zeros(3, 4, 4)))
    with pytest.raises(InputError, match=r"Images: item 0: its image is a float32 tensor \[3, 4, 4\]: expected"):
        list(source.units(3))


def test_what_is_no_data_set() -> None:
    for data, message in (
        (DataLoader(Images(picture)), "a DataLoader gives batches"),
        ("photos", "type str is no data set"),
        (Path("photos"), "type PosixPath is no data set"),
        (3, "type int is no data set"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"a": [1]})), "give one of 'train'"),
    ):
        with pytest.raises(InputError, match=message):
            from_object(data)


# ----------------------------------------------------------------------------------------------------------- iterables


@pytest.mark.parametrize("form", FORMS)
def test_sequences_of_id_and_image(tmp_path: Path, form: str) -> None:
    pairs = [(f"x{number}", FORMS[form](number)) for number in range(7)]
    parts = in_units(from_object(pairs), tmp_path)
    assert [sample.id for part in parts for sample in part.samples] == [f"x{number}" for number in range(7)]
    assert levels(parts) == list(range(7))


def test_columns_of_items() -> None:
    have = everything(
        from_object(
            [
                ("a", picture(1), {"label": "dog", "n": np.float32(0.5), "t": torch.tensor(True)}),
                (7, picture(2), "cat"),
                {"__key__": "b", "png": encoded(3), "cls": 4, "emb": np.zeros(3)},
                ("a", picture(4)),
                ("c", 5),
                (None, picture(6)),
                picture(7),
                {"n": 1},
                {"file_name": "gone.png"},
            ]
        )
    )
    assert [(sample.id, dict(sample.columns)) for sample in have.good] == [
        ("a", {"label": "dog", "n": "0.5", "t": "true"}),
        ("7", {"label": "cat"}),
        ("b", {"cls": "4"}),
        ("list:8", {}),
    ]
    assert have.failures == {
        "a": "duplicate",
        "c": "no_image",
        "list:5": "no_image",
        "list:6": "no_image",
        "list:7": "no_image",
    }
    reasons = {sample.id: sample.failure.reason for sample in have.samples if sample.failure is not None}
    assert reasons["list:6"] == "list:6: a value of type Image: expected (id, image) or (id, image, columns)"
    assert reasons["list:7"] == "list:7: no image among its keys n: name the image column"


class Counted:
    """An iterable that counts how often it is begun, and its items."""

    def __init__(self, count: int) -> None:
        self.count, self.begun, self.given = count, 0, 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self.begun += 1
        for number in range(self.count):
            self.given += 1
            yield f"x{number}", pixels(number)


class Sized(Counted):
    def __len__(self) -> int:
        return 7


def test_units_of_an_iterable_are_read_in_one_pass(tmp_path: Path) -> None:
    data = Sized(7)
    source = from_object(data)
    units = list(write_plan(tmp_path, [source], 3).units())
    assert [(unit.start, unit.stop) for unit in units] == [(0, 3), (3, 6), (6, 7)]
    assert data.given == 0
    assert levels([read(source, unit) for unit in units]) == list(range(7))
    assert (data.begun, data.given) == (1, 7)
    assert levels([read(source, units[1])]) == [3, 4, 5]
    assert (data.begun, data.given) == (2, 13)
    assert levels([read(source, units[2])]) == [6]
    assert data.begun == 2
    other = pickle.loads(pickle.dumps(source))
    assert read(other, units[1]).ids == ["x3", "x4", "x5"]


def test_an_iterable_without_a_length_is_one_unit(tmp_path: Path) -> None:
    data = Counted(7)
    source = from_object(data)
    (unit,) = write_plan(tmp_path, [source], 3).units()
    assert (unit.start, unit.stop, data.given) == (0, 0, 0)
    for _ in range(2):
        assert levels([read(source, unit)]) == list(range(7))
    assert len(list(from_object(data, length=7).units(3))) == 3


def test_a_length_that_is_wrong_is_noticed() -> None:
    few, many = (from_object(Sized(count)) for count in (5, 9))
    have = [read(few, unit) for unit in few.units(3)]
    assert levels(have) == [0, 1, 2, 3, 4]
    assert str(have[1].error) == "Sized: it ended after 5 of 7 items"
    have = [read(many, unit) for unit in many.units(3)]
    assert levels(have) == [0, 1, 2, 3, 4, 5, 6]
    assert str(have[2].error) == "Sized: it has more items than its length, 7"


def test_a_generator_is_read_once(tmp_path: Path) -> None:
    source = from_object(((f"x{number}", pixels(number)) for number in range(7)), length=7)
    assert isinstance(source, IterableInput)
    units = list(write_plan(tmp_path, [source], 3).units())
    remedy = "it can be read only once: give a list, or the function that makes it"
    with pytest.raises(InputError, match="cannot be given to other processes"):
        pickle.dumps(source)
    with pytest.raises(InputError, match="labels by name need its names first"):
        source.names(units[0])
    assert levels([read(source, unit) for unit in units[1:]]) == [3, 4, 5, 6]  # a pass that goes on
    have = read(source, units[0])
    assert not have.samples
    assert (str(have.error), have.error and have.error.kind) == (f"generator: {remedy}", "unreadable")


def make_items() -> Iterator[tuple[str, Any]]:
    return ((f"x{number}", pixels(number)) for number in range(7))


def test_the_function_that_makes_a_generator_can_be_read_again(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(from_object(make_items, length=7)))
    units = list(write_plan(tmp_path, [source], 3).units())
    assert levels([read(source, unit) for unit in (*units, units[0])]) == [*range(7), 0, 1, 2]


def test_an_iterable_that_fails() -> None:
    def items() -> Iterator[tuple[str, Any]]:
        yield "a", pixels(1)
        raise RuntimeError("no more\nof this")

    have = everything(from_object(items))
    assert have.ids == ["a"]
    assert str(have.error) == "function: it failed after 1 items (RuntimeError: no more of this)"


def test_torch_iterables_give_items_without_ids() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return ((pixels(number), number) for number in range(4))

    have = everything(from_object(Stream()))
    assert have.ids == [f"Stream:{number}" for number in range(4)]
    assert [sample.columns["label"] for sample in have.good] == ["0", "1", "2", "3"]


# --------------------------------------------------------------------------------------------------- Hugging Face


def dataset(count: int = 20) -> Any:
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
            "box": datasets.Sequence(datasets.Value("int64")),
        }
    )
    columns = {
        "picture": [{"bytes": encoded(number), "path": None} for number in range(count)],
        "label": [number % 2 for number in range(count)],
        "text": [f"t{number}" for number in range(count)],
        "box": [[1, 2]] * count,
    }
    return datasets.Dataset.from_dict(columns, features=features)


def test_hugging_face_data_sets(tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(from_object(dataset(), name="hf")))
    parts = in_units(source, tmp_path, 6)
    assert [len(part.samples) for part in parts] == [6, 6, 6, 2]
    assert levels(parts) == list(range(20))
    sample = parts[1].samples[1]
    assert (sample.id, dict(sample.columns)) == ("hf:7", {"label": "dog", "text": "t7"})
    assert sample.content == encoded(7)  # encoded, as it is in the data set
    by_column = from_object(dataset(), id_column="text", columns=["label"])
    assert everything(by_column).ids == [f"t{number}" for number in range(20)]
    for each in (source, by_column):
        for unit in each.units(6):
            names = given(each.names(unit))
            assert [sample.id for sample in names.samples] == read(each, unit).ids
            assert all(sample.content is None and not sample.columns for sample in names.samples)
    chosen = from_object(dataset().select([5, 3, 9]), name="some")
    assert levels([everything(chosen)]) == [5, 3, 9]


def test_hugging_face_paths_and_missing_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(9))
    values = [str(tmp_path / "a.png"), None, str(tmp_path / "gone.png")]
    images = datasets.Dataset.from_dict({"image": values}).cast_column("image", datasets.Image())
    paths = datasets.Dataset.from_dict({"file_name": values})
    for data in (images, paths):
        have = everything(from_object(data))
        assert have.failures == {"Dataset:1": "no_image"}
        assert [sample.path for sample in have.good] == [values[0], values[2]]
        assert level(have.good[0]) == 9
    with pytest.raises(InputError, match="Dataset has no column of images, paths or URLs: its columns are n"):
        list(from_object(datasets.Dataset.from_dict({"n": [1]})).units(3))
    with pytest.raises(InputError, match="Dataset has no column 'x': its columns are n"):
        list(from_object(datasets.Dataset.from_dict({"n": [1]}), image_column="x").units(3))


def test_saved_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset().save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict(train=dataset(5), test=dataset(2)).save_to_disk(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    (source,) = open_inputs(["one"])
    units = list(write_plan(tmp_path, [source], 6).units())
    assert len(pickle.dumps(source)) < 1000
    source = pickle.loads(pickle.dumps(source))
    assert levels([read(source, unit) for unit in units]) == list(range(20))
    assert read(source, units[3]).ids == ["one:18", "one:19"]
    splits = open_inputs(["two"])
    assert [each.name for each in splits] == ["two/train", "two/test"]
    assert everything(splits[1]).ids == ["two/test:0", "two/test:1"]
    dataset(20).map(lambda row: row).save_to_disk(tmp_path / "other")
    for name in (tmp_path / "one").iterdir():
        name.unlink()
    for name in (tmp_path / "other").iterdir():
        (tmp_path / "one" / name.name).write_bytes(name.read_bytes())
    assert "one: it was changed after the pass was planned" in str(read(open_inputs(["one"])[0], units[0]).error)
    for path in (tmp_path / "one").glob("*.arrow"):
        path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="one: the saved data set cannot be read"):
        list(open_inputs(["one"])[0].units(3))


@pytest.mark.parametrize("shards", [1, 3])
def test_hugging_face_streams(tmp_path: Path, shards: int) -> None:
    source = from_object(dataset().to_iterable_dataset(num_shards=shards), name="hf")
    units = list(write_plan(tmp_path, [source], 6).units())
    assert len(units) == shards
    parts = [read(source, unit) for unit in reversed(units)]
    assert sorted(levels(parts)) == list(range(20))
    ids = [sample.id for part in parts for sample in part.samples]
    assert len(set(ids)) == 20
    assert ids[0] == ("hf:0" if shards == 1 else "hf:2:0")
    first = parts[-1].samples[1]
    assert (first.content, dict(first.columns)) == (encoded(1), {"label": "dog", "text": "t1"})
