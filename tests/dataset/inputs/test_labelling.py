"""Labels of images that pass by one at a time: the same as those of a list of images, whoever looks them up."""

import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from input_files import encoded, shard

from clipfast.dataset.files import find_images
from clipfast.dataset.inputs.objects import from_object
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.label_table import LabelTable, identity, names_of
from clipfast.dataset.labelling import Labeller, LabelNotes, all_names, peek
from clipfast.dataset.labels import read_labels
from clipfast.dataset.plan import Input, write_plan
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.errors import InputError


class Labelled:
    """The images of some inputs with labels, each unit looked up by a labeller of its own, in reverse order."""

    def __init__(self, folder: Path, inputs: list[Input], origin: str, **options: Any) -> None:
        (folder / "plan").mkdir(exist_ok=True)
        plan = write_plan(folder / "plan", inputs, 2)
        labeller = Labeller(origin, **options)
        if labeller.needs_names:
            labeller.prepare(all_names(inputs, plan))
        labeller.check(peek(inputs, plan))
        self.labeller = labeller
        self.kept: list[Sample] = []
        self.notes = LabelNotes()
        parts = []
        for unit in reversed(list(plan.units())):
            worker = pickle.loads(pickle.dumps(labeller))
            samples = [worker.apply(sample) for sample in inputs[unit.input].read(unit)]
            parts.append(([sample for sample in samples if sample is not None], worker.take()))
        for samples, notes in reversed(parts):
            self.kept += samples
            self.notes.merge(LabelNotes.from_json(json.loads(json.dumps(notes.to_json()))))
        self.lines = [*labeller.notes(), *self.notes.lines()]

    @property
    def labels(self) -> dict[str, str | None]:
        return {sample.id: sample.label for sample in self.kept}

    @property
    def groups(self) -> dict[str, str | None]:
        return {sample.id: sample.group for sample in self.kept}


def label(folder: Path, names: Iterable[Path | str], origin: str, **options: Any) -> Labelled:
    return Labelled(folder, open_inputs([str(name) for name in names]), origin, **options)


def same_as_before(folder: Path, paths: list[Path], origin: str, **options: Any) -> Labelled:
    """The labels, after comparing them with those of a list of images."""
    sources = find_images(paths).sources
    expected = read_labels(sources, origin, **options)
    have = label(folder, paths, origin, **options)
    selected = expected.selected or (True,) * len(sources)
    rows = zip(sources, expected.values, expected.groups or (None,) * len(sources), selected, strict=True)
    assert {name: (value, have.groups[name]) for name, value in have.labels.items()} == {
        str(source): (value, group) for source, value, group, kept in rows if kept
    }
    return have


def images(folder: Path, *names: str) -> Path:
    for at, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(at))
    return folder


def table(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def members(*documents: bytes | None, **more: bytes) -> dict[str, bytes]:
    """Images with JSON members; keywords are other members: ``_0_txt`` is ``0.txt``."""
    result: dict[str, bytes] = {}
    for number, document in enumerate(documents):
        result[f"{number}.png"] = encoded(number)
        if document is not None:
            result[f"{number}.json"] = document
        result |= {name[1:].replace("_", "."): data for name, data in more.items() if name.startswith(f"_{number}_")}
    return result


# ------------------------------------------------------------------------------------------------------------- folders


def test_labels_from_folders(tmp_path: Path) -> None:
    folder = images(tmp_path / "in", "dog/b.png", "dog/a.png", "cat/deep/a.png", "loose.png")
    shard(folder / "fox" / "x.tar", {"0.png": encoded(1), "deep/1.png": encoded(2)})
    first = same_as_before(tmp_path, [folder], "folder")
    assert first.labels[f"{folder}/cat/deep/a.png"] == "cat"
    assert first.lines == [
        f"2 images lie in folders inside the first one ({folder}/cat/deep/a.png, {folder}/fox/x.tar:deep/1.png): "
        "the first is the label, 'parent' in place of 'folder' takes the image's own",
        f"1 of 6 images have no label ({folder}/loose.png): left out",
    ]
    own = same_as_before(tmp_path, [folder], "parent")
    assert own.labels[f"{folder}/cat/deep/a.png"] == "deep"
    assert own.notes.labelled == 5
    with pytest.raises(InputError, match="no image has a label from folder: give the folder that holds one folder per"):
        label(tmp_path, [folder / "dog"], "folder")
    with pytest.raises(InputError, match="labels from folders have no column 'place': give a CSV file"):
        Labeller("parent", group="place")
    with pytest.raises(InputError, match="labels from 'folder' have no file column 'x'"):
        Labeller("folder", file_column="x")


# -------------------------------------------------------------------------------------------------------------- shards


def test_labels_from_members_of_shards(tmp_path: Path) -> None:
    documents = [f'{{"y": {n % 2}, "place": "p{n % 3}", "split": {n % 2}}}'.encode() for n in range(6)]
    path = shard(tmp_path / "a.tar", members(*documents))
    options: dict[str, Any] = {"label": "y", "group": ("y", "place"), "where": {"split": "1"}}
    have = same_as_before(tmp_path, [path], "shard", **options)
    assert have.groups == {f"{path}:{n}.png": f"y=1, place=p{n % 3}" for n in (1, 3, 5)}
    assert have.lines == ["3 of 6 images are left out by the row filter"]
    mixed = {
        "0.png": encoded(0),
        "0.cls": b"3\n",
        "1.png": encoded(1),
        "1.json": b'{"label": "dog"}',
        "2.png": encoded(2),
    }
    path = shard(tmp_path / "b.tar", mixed)
    have = same_as_before(tmp_path, [path], "shard")
    assert list(have.labels.values()) == ["3", "dog", None]
    assert have.lines == [f"1 of 3 images have no label ({path}:2.png): left out"]


def test_a_column_that_no_member_has_is_refused_before_the_pass(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        members(b'{"shape": "star"}', b'{"shape": "ring", "n": 1}', _0_txt=b"a star", _1_txt=b"a ring"),
    )
    assert list(label(tmp_path, [path], "shard", label="shape").labels.values()) == ["star", "ring"]
    columns = r"there are shape, n, txt \(the \.txt members\)$"
    for options, message in (
        ({"label": "shap"}, f"no member beside an image has the label column 'shap': {columns}"),
        ({"label": "shape", "group": "palce"}, f"no .json member has the column 'palce': {columns}"),
        ({"label": "shape", "where": {"splt": "1"}}, f"no .json member has the column 'splt': {columns}"),
        ({}, f"no member beside an image has the label column 'label': {columns}"),
    ):
        with pytest.raises(InputError, match=message):
            label(tmp_path, [path], "shard", **options)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            read_labels(find_images([path]).sources, "shard", **options)  # type: ignore[arg-type]


def test_captions_are_labels_only_when_named(tmp_path: Path) -> None:
    captions = {"_0_txt": b"a red star above a blue ring", "_1_txt": b"two green squares beside a circle"}
    beside = shard(tmp_path / "a.tar", members(b'{"url": "x"}', b'{"url": "y"}', **captions))
    with pytest.raises(InputError, match="has the label column 'label': there are url, txt"):
        label(tmp_path, [beside], "shard")
    assert label(tmp_path, [beside], "shard", label="txt").labels[f"{beside}:0.png"] == "a red star above a blue ring"
    alone = shard(tmp_path / "b.tar", members(None, None, **captions))
    with pytest.raises(InputError, match=r"the \.txt members look like captions, not labels \('a red star above"):
        label(tmp_path, [alone], "shard")
    same_as_before(tmp_path, [alone], "shard", label="txt")
    names = shard(tmp_path / "c.tar", members(None, None, _0_txt=b"Gila monster\n", _1_txt=b"curly-coated retriever"))
    assert list(same_as_before(tmp_path, [names], "shard").labels.values()) == [
        "Gila monster",
        "curly-coated retriever",
    ]


def test_captions_of_later_shards_are_no_labels(tmp_path: Path) -> None:
    """The first images have names in .txt members. An image with .json columns keeps its .txt member to itself."""
    first = shard(tmp_path / "a.tar", members(None, None, _0_txt=b"dog", _1_txt=b"cat"))
    labeller = Labeller("shard")
    labeller.check(list(open_inputs([first])[0].read(next(iter(open_inputs([first])[0].units(9))))))
    later = Sample("x.tar:0.png", "/x.tar", "0.png", "0", columns={"txt": "a long caption", "url": "u"})
    assert labeller.apply(later) == Sample("x.tar:0.png", "/x.tar", "0.png", "0", columns=later.columns)
    assert labeller.settings()["members"] == ["txt"]


@pytest.mark.parametrize(
    ("document", "value", "noted"),
    [
        (b'{"label": null}', None, True),
        (b'{"label": ""}', None, False),
        (b'{"label": 3}', "3", False),
        (b'{"label": 0}', "0", False),
        (b'{"label": true}', "true", False),
        (b'{"label": "None"}', "None", False),
        (b'{"other": 1}', None, False),
        (b'{"label": "\\ud800"}', None, True),
        (b'{"label": ["a"]}', None, True),
        (b'{"label": {"a": 1}}', None, True),
        (b'{"label": "cat"', None, False),  # the reader notes it
        (b"[1, 2]", None, False),
    ],
)
def test_values_as_labels(tmp_path: Path, document: bytes, value: str | None, noted: bool) -> None:
    path = shard(tmp_path / "a.tar", members(b'{"label": "dog"}', document))
    have = same_as_before(tmp_path, [path], "shard")
    assert list(have.labels.values()) == ["dog", value]
    expected = [f"labels that cannot be read: its 'label' is not a text or a number: 1 ({path}:1.png)"] if noted else []
    assert have.lines == [
        *expected,
        *([f"1 of 2 images have no label ({path}:1.png): left out"] if value is None else []),
    ]


def test_images_that_failed_are_kept_and_counted_nowhere(tmp_path: Path) -> None:
    labeller = Labeller("shard", label="y", where={"split": "1"})
    failure = Failure(Status.NO_IMAGE, "no image")
    lost = Sample("a", "/a.tar", failure=failure)
    large = Sample("b", "/a.tar", columns={"y": "1", "split": "1"}, failure=failure)
    other = Sample("c", "/a.tar", columns={"y": "1", "split": "0"}, failure=failure)
    assert labeller.apply(lost) == lost
    assert labeller.apply(large) == Sample("b", "/a.tar", columns=large.columns, label="1", failure=failure)
    assert labeller.apply(other) is None
    assert labeller.take().lines() == ["1 of 1 images are left out by the row filter"]
    assert labeller.notes() == []


# ------------------------------------------------------------------------------------------------------------- columns


def test_labels_from_columns_of_tables_lists_and_data_sets(tmp_path: Path) -> None:
    content = [encoded(number) for number in range(6)]
    rows = {"image": content, "y": [number % 2 for number in range(6)], "split": list("aabbab")}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    images(tmp_path, *(f"{number}.png" for number in range(6)))
    lines = (f"{number}.png,{number % 2},{split}" for number, split in enumerate("aabbab"))
    listed = table(tmp_path / "a.csv", "path,y,split", *lines)
    pairs = [(f"x{n}", data, {"y": n % 2, "split": "aabbab"[n]}) for n, data in enumerate(content)]
    for inputs in (open_inputs([tmp_path / "a.parquet"]), open_inputs([listed]), [from_object(pairs)]):
        have = Labelled(tmp_path, inputs, "columns", label="y", group="split", where={"split": "a"})
        assert list(have.labels.values()) == ["0", "1", "0"]
        assert set(have.groups.values()) == {"a"}
        assert have.lines == ["3 of 6 images are left out by the row filter"]
        for options, message in (
            ({"label": "z"}, "no image has the label column 'z': there are y, split"),
            ({"label": "y", "group": "z"}, "no image has the column 'z': there are y, split"),
            ({"label": "y", "where": {"z": "1"}}, "no image has the column 'z'"),
        ):
            with pytest.raises(InputError, match=message):
                Labelled(tmp_path, inputs, "columns", **options)


def test_columns_without_values(tmp_path: Path) -> None:
    some = from_object([("a", encoded(1), {"label": None}), ("b", encoded(2), {"label": "x"})])
    have = Labelled(tmp_path, [some], "columns")
    assert have.lines == ["1 of 2 images have no label (a): left out"]
    with pytest.raises(InputError, match="no image has a label from columns: no row of the first ones has one"):
        Labelled(tmp_path, [from_object([("a", encoded(1), {"label": None})])], "columns")


def test_looking_at_the_first_images_takes_none_from_a_generator(tmp_path: Path) -> None:
    def items() -> Any:
        return ((f"x{number}", encoded(number), "dog") for number in range(5))

    have = Labelled(tmp_path, [from_object(items())], "columns")
    assert have.labels == {f"x{number}": "dog" for number in range(5)}


# ----------------------------------------------------------------------------------------------------------------- CSV


def test_csv_rows_may_have_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = images(tmp_path / "images", "dog/b.png", "dog/a.png", "cat/deep/a.png")
    rows = ["file,label,place", "dog/b.png,hund,sea", "images/cat/deep/a.png,katze,wood", "dog/a.png,hund,wood"]
    file = table(tmp_path / "labels.csv", *rows)
    have = same_as_before(tmp_path, [folder], file, group="place")
    assert have.groups[f"{folder}/dog/b.png"] == "sea"
    assert not have.lines
    monkeypatch.chdir(tmp_path / "images")
    here = table(tmp_path / "images" / "here.csv", "file,label", "dog/b.png,x", "./dog/a.png,y")
    assert same_as_before(tmp_path, [Path("dog"), Path("cat")], here).labels["dog/b.png"] == "x"


def test_a_bare_name_labels_an_image_only_where_no_other_has_it(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", "dog/b.png", "dog/a.png", "cat/deep/a.png")
    have = same_as_before(tmp_path, [folder], table(tmp_path / "l.csv", "path,kind", "b.png,x"), label="kind")
    assert [value for value in have.labels.values() if value] == ["x"]
    assert have.lines == [f"2 of 3 images have no label ({folder}/cat/deep/a.png, {folder}/dog/a.png): left out"]
    both = table(tmp_path / "both.csv", "file,label", "a.png,x")
    with pytest.raises(
        InputError, match=r"no image has a label .*: its names are those of several images each \(a\.png\)"
    ):
        label(tmp_path, [folder], both)
    more = label(tmp_path, [folder], table(tmp_path / "more.csv", "file,label", "a.png,x", "b.png,y", "gone.png,z"))
    assert [value for value in more.labels.values() if value] == ["y"]
    assert more.lines[:2] == [
        f"1 rows of {tmp_path}/more.csv name no image here (gone.png)",
        f"1 rows of {tmp_path}/more.csv name several images each (a.png): they label none, name images by their paths",
    ]


def test_a_path_goes_before_a_bare_name(tmp_path: Path) -> None:
    """The file a.png beside the CSV is named by its path, so the row is its, not that of another a.png."""
    images(tmp_path, "a.png", "in/a.png")
    file = table(tmp_path / "labels.csv", "file,label", "a.png,x")
    for order in ([tmp_path / "a.png", tmp_path / "in"], [tmp_path / "in", tmp_path / "a.png"]):
        have = label(tmp_path, order, file)
        assert have.labels == {f"{tmp_path}/a.png": "x", f"{tmp_path}/in/a.png": None}


def test_names_in_two_folders_that_are_searched(tmp_path: Path) -> None:
    """Relative to the folder that was searched they are the same: neither gets a label by that."""
    images(tmp_path, "p/x/0.png", "q/x/0.png", "p/x/1.png")
    file = table(tmp_path / "labels.csv", "file,label", "x/0.png,a", "x/1.png,b")
    have = label(tmp_path, [tmp_path / "p", tmp_path / "q"], file)
    assert have.labels == {f"{tmp_path}/p/x/0.png": None, f"{tmp_path}/p/x/1.png": "b", f"{tmp_path}/q/x/0.png": None}


def test_keys_of_shards(tmp_path: Path) -> None:
    one = shard(tmp_path / "a.tar", {"0.png": encoded(1), "1.png": encoded(2), "d/5.png": encoded(3)})
    two = shard(tmp_path / "b.tar", {"0.png": encoded(4), "2.png": encoded(5)})
    rows = ["file,label", "1,x", "2.png,y", "5,z", f"{two}:0,w", "0,v"]
    have = label(tmp_path, [one, two], table(tmp_path / "labels.csv", *rows))
    assert have.labels == {
        f"{one}:0.png": None,
        f"{one}:1.png": "x",
        f"{one}:d/5.png": "z",
        f"{two}:0.png": "w",
        f"{two}:2.png": "y",
    }
    assert "1 rows of" in have.lines[0]


def test_one_file_under_two_names_is_one_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, "in/a.png")
    monkeypatch.chdir(tmp_path)
    listed = table(tmp_path / "list.txt", "in/a.png")
    have = label(tmp_path, ["in", listed], table(tmp_path / "labels.csv", "file,label", "a.png,x"))
    assert [sample.label for sample in have.kept] == ["x", "x"]


def test_the_file_column_is_found_or_named(tmp_path: Path) -> None:
    folder = images(tmp_path / "images", *(f"{number}.png" for number in range(12)))
    rows = [f"{n},images/{n}.png,{n % 2},{n % 3},{n // 2 % 2},x.png" for n in range(12)]
    file = table(tmp_path / "birds.csv", "img_id,img_filename,y,split,place,place_filename", *rows)
    for options in (
        {"label": "y", "group": ("y", "place")},
        {"label": "y", "group": "place", "where": {"split": "2"}},
        {"label": "y", "file_column": "img_filename"},
    ):
        same_as_before(tmp_path, [folder], file, **options)
    unusual = table(tmp_path / "u.csv", "id,where,kind", *(f"{n},images/{n}.png,{n}" for n in range(12)))
    assert same_as_before(tmp_path, [folder], unusual, label="kind").labeller.settings()["file_column"] == "where"
    two = table(tmp_path / "two.csv", "a,b,kind", *(f"images/{n}.png,{n}.png,{n}" for n in range(12)))
    for path, options, message in (
        (file, {"label": "y", "file_column": "img_id"}, "its column 'img_id' names none of these images"),
        (file, {"label": "y", "file_column": "file_name"}, "has no column 'file_name': its columns are img_id, img_fi"),
        (file, {"label": "y", "where": {"split": "7"}}, "no row that is kept has one"),
        (two, {"label": "kind"}, "names images in the columns a and b: name the file column"),
    ):
        for call in (label, lambda at, *more, **rest: read_labels(find_images(*more[:1]).sources, *more[1:], **rest)):
            with pytest.raises(InputError, match=message):
                call(tmp_path, [folder], path, **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["name,label", "a,b"], "has no column 'file': its columns are name, label"),
        (["file,kind", "a,b"], "has no column 'label'"),
        (["file,label", "a,b", "a,c"], "names a more than once"),
        (["file,label", "nothing.png,b"], "no image has a label from .*: its column 'file' names none of these images"),
        (["file,label", "a.png,"], "no image has a label from .*: no row that is kept has one"),
    ],
)
def test_tables_without_matching_columns_or_rows_are_refused(tmp_path: Path, rows: list[str], message: str) -> None:
    images(tmp_path / "in", "a.png")
    with pytest.raises(InputError, match=message):
        label(tmp_path, [tmp_path / "in"], table(tmp_path / "labels.csv", *rows))


def test_tables_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    images(tmp_path / "in", "a.png")
    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "bytes.csv").write_bytes(b"file,label\n\xff\xfe,x\n")
    for name, message in (
        ("gone.csv", "cannot read the labels in .*: No such file"),
        ("fifo.csv", "a FIFO, not a regular file"),
        ("bytes.csv", "not a CSV file in UTF-8"),
    ):
        with pytest.raises(InputError, match=message):
            label(tmp_path, [tmp_path / "in"], str(tmp_path / name))


def test_a_csv_of_the_ids_of_a_table(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encoded(1), encoded(2)], "key": ["a", "b"]}), tmp_path / "a.parquet")
    inputs = open_inputs([tmp_path / "a.parquet"], id_column="key")
    have = Labelled(tmp_path, inputs, table(tmp_path / "labels.csv", "file,label", "b,x"))
    assert have.labels == {"a": None, "b": "x"}


def test_looking_up_before_matching_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the labels in x\.csv are not matched with images"):
        Labeller("x.csv").apply(Sample("a", "/a"))


def test_an_image_that_was_not_there_when_the_pass_was_planned_gets_no_label_of_another(tmp_path: Path) -> None:
    one = shard(tmp_path / "a.tar", {"0.png": encoded(1)})
    inputs = open_inputs([f"{tmp_path}/{{a,b}}.tar"])
    plan = write_plan(tmp_path, inputs, 2)
    labeller = Labeller(table(tmp_path / "labels.csv", "file,label", "0,x"))
    labeller.prepare(all_names(inputs, plan))
    shard(tmp_path / "b.tar", {"0.png": encoded(2)})
    samples = [labeller.apply(sample) for unit in plan.units() for sample in inputs[0].read(unit)]
    assert {sample.id: sample.label for sample in samples if sample} == {
        f"{one}:0.png": "x",
        f"{tmp_path}/b.tar:0.png": None,
    }
    other = Labeller(labeller.origin)
    with pytest.raises(InputError, match="those of several images each"):
        other.prepare(all_names(inputs, plan))


def test_a_labeller_is_small_and_two_of_the_same_are_equal(tmp_path: Path) -> None:
    """Thirty bytes for an image, whatever its names and the other columns are."""
    count = 20_000
    (tmp_path / "list.txt").write_text("".join(f"/some/long/folder/name/{n:09}.png\n" for n in range(count)))
    rows = [f"/some/long/folder/name/{n:09}.png,class {n % 7},{'x' * 50}" for n in range(count)]
    file = table(tmp_path / "labels.csv", "file,label,note", *rows)
    inputs = open_inputs([tmp_path / "list.txt"])
    plan = write_plan(tmp_path, inputs, 1000)
    labellers = [Labeller(file), Labeller(file)]
    for labeller in labellers:
        labeller.prepare(all_names(inputs, plan))
    assert labellers[0].settings() == labellers[1].settings()
    assert len(pickle.dumps(labellers[0])) < 30 * count
    table(tmp_path / "labels.csv", "file,label,note", *rows[:-1], rows[-1].replace("class", "klass"))
    labellers[1].prepare(all_names(inputs, plan))
    assert labellers[0].settings() != labellers[1].settings()


def test_hashes_whose_first_halves_agree_are_told_apart() -> None:
    samples = [Sample(f"{n}", f"/{n}") for n in range(3)]
    pairs = [identity(sample) for sample in samples]
    high = pairs[0][0]
    hashes = np.array([[high] * 3, [pairs[1][1], pairs[0][1], pairs[2][1]]], np.uint64)
    numbers = np.arange(3, dtype=np.int32)
    found = LabelTable("file", hashes, numbers, -np.ones(3, np.int32), np.ones(3, np.bool_), ("a", "b", "c"))
    assert found.row(samples[0]) == ("b", None, True)
    assert found.row(samples[1]) is None


FOLDERS = st.sampled_from(["a", "b", "a/b", "a/c"])
FILES = st.sampled_from(["0.png", "1.png", "2.png"])


@settings(max_examples=100, deadline=None)
@cases(
    paths=st.sets(st.builds("{}/{}".format, FOLDERS, FILES), min_size=1, max_size=6),
    rows=st.lists(
        st.one_of(FILES, st.builds("{}/{}".format, st.sampled_from(["a", "b", "c", "a/b", "in/a"]), FILES)),
        min_size=1,
        max_size=6,
        unique=True,
    ),
)
def test_no_label_is_ever_a_guess(tmp_path_factory: pytest.TempPathFactory, paths: set[str], rows: list[str]) -> None:
    """A row labels an image only if no other image is called by its name as specifically; and then it does."""
    top = tmp_path_factory.mktemp("labels")
    images(top / "in", *paths)
    file = table(top / "labels.csv", "file,label", *(f"{row},{row}" for row in rows))
    samples = [
        sample for unit in open_inputs([top / "in"])[0].units(9) for sample in open_inputs([top / "in"])[0].read(unit)
    ]
    owned: dict[str, list[tuple[int, str]]] = {sample.id: [] for sample in samples}
    for row in rows:
        levels = {
            sample.id: min((level for level, name in names_of(sample, top, Path.cwd()) if name == row), default=99)
            for sample in samples
        }
        best = [name for name, level in levels.items() if level == min(levels.values()) < 99]
        if len(best) == 1:
            owned[best[0]].append((levels[best[0]], row))
    expected = {name: min(those)[1] if those else None for name, those in owned.items()}
    if not any(expected.values()):
        with pytest.raises(InputError, match="no image has a label"):
            label(top, [top / "in"], file)
        return
    assert label(top, [top / "in"], file).labels == expected
