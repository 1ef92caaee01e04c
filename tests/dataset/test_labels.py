"""Labels from folders, CSV files and shards: looked up by name; images without one are reported."""

import os
import sys
from pathlib import Path

import pytest
from builders import ROOT
from PIL import Image
from test_dataset_files import encoded, shard

from clipfast.dataset.files import Source, find_images
from clipfast.dataset.labels import parse_where, read_labels
from clipfast.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dog/b.png", "dog/a.png", "cat/deep/a.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / name)
    return tmp_path / "images"


def images_in(folder: Path) -> list[Source]:
    return find_images([folder])[0]


def names(folder: Path) -> list[str]:
    return [source.path.relative_to(folder).as_posix() for source in images_in(folder)]


def table(path: Path, *rows: str) -> str:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return str(path)


def test_labels_from_folders(folder: Path) -> None:
    labels = read_labels(images_in(folder), "folder")
    assert dict(zip(names(folder), labels.values, strict=True)) == {
        "cat/deep/a.png": "cat",
        "dog/a.png": "dog",
        "dog/b.png": "dog",
    }
    assert labels.classes == ["cat", "dog"]
    assert labels.groups is None


def test_files_that_are_named_themselves_have_no_folder_label(folder: Path) -> None:
    sources = find_images([folder, folder.parent / "images" / "dog" / "a.png"])[0]
    assert all(read_labels(sources, "folder").values)
    Image.new("RGB", (4, 4)).save(folder.parent / "alone.png")
    labels = read_labels(find_images([folder / "dog" / "a.png", folder / "cat"])[0], "folder")
    assert labels.values == (None, "deep")
    assert "1 of 2 images have no label" in labels.notes[0]


def test_csv_rows_may_have_any_order(folder: Path) -> None:
    """Paths are relative to the folder, or to the CSV file itself."""
    rows = ["file,label,place", "dog/b.png,hund,sea", "images/cat/deep/a.png,katze,wood", "dog/a.png,hund,wood"]
    labels = read_labels(images_in(folder), table(folder.parent / "labels.csv", *rows), group="place")
    assert dict(zip(names(folder), zip(labels.values, labels.groups or (), strict=True), strict=True)) == {
        "cat/deep/a.png": ("katze", "wood"),
        "dog/a.png": ("hund", "wood"),
        "dog/b.png": ("hund", "sea"),
    }
    assert not labels.notes


def test_a_bare_name_of_one_image_matches(folder: Path) -> None:
    labels = read_labels(images_in(folder), table(folder.parent / "labels.csv", "path,kind", "b.png,x"), label="kind")
    assert [value for value in labels.values if value] == ["x"]
    assert "2 of 3 images have no label" in labels.notes[-1]


def test_a_bare_name_of_two_images_matches_neither(folder: Path) -> None:
    with pytest.raises(InputError, match="no image has a label"):
        read_labels(images_in(folder), table(folder.parent / "labels.csv", "file,label", "a.png,x"))


def test_rows_without_an_image_are_reported(folder: Path) -> None:
    labels = read_labels(
        images_in(folder), table(folder.parent / "labels.csv", "file,label", "dog/a.png,x", "gone.png,y")
    )
    assert "1 rows" in labels.notes[0]
    assert "gone.png" in labels.notes[0]


def test_labels_from_members_of_a_shard(tmp_path: Path) -> None:
    members = {"0.png": encoded(0), "0.cls": b"3\n", "1.png": encoded(1), "1.json": b'{"label": "dog", "place": "sea"}'}
    sources = find_images([shard(tmp_path / "a.tar", members | {"2.png": encoded(2)})])[0]
    labels = read_labels(sources, "shard", group="place")
    assert labels.values == ("3", "dog", None)
    assert labels.groups == (None, "sea", None)
    by_csv = read_labels(sources, table(tmp_path / "labels.csv", "file,label", "1,b", "0.png,a"))
    assert by_csv.values == ("a", "b", None)


def sidecars(tmp_path: Path, *documents: bytes | None, **more: bytes) -> list[Source]:
    """The images of a shard with the given JSON members; keywords are other members: ``_0_txt`` is ``0.txt``."""
    members: dict[str, bytes] = {}
    for number, document in enumerate(documents):
        members[f"{number}.png"] = encoded(number)
        if document is not None:
            members[f"{number}.json"] = document
    for name, data in more.items():
        members[f"{name[1:].replace('_', '.')}"] = data
    return find_images([shard(tmp_path / "a.tar", members)])[0]


def test_a_label_column_that_no_member_has_is_an_error_with_the_columns(tmp_path: Path) -> None:
    sources = sidecars(tmp_path, b'{"shape": "star"}', b'{"shape": "ring", "n": 1}', _0_txt=b"a star", _1_txt=b"a ring")
    assert read_labels(sources, "shard", label="shape").values == ("star", "ring")
    columns = r"there are shape, n, txt \(the \.txt members\)$"
    with pytest.raises(InputError, match=f"has the label column 'shap': {columns}"):
        read_labels(sources, "shard", label="shap")
    with pytest.raises(InputError, match=f"no .json member has the column 'palce': {columns}"):
        read_labels(sources, "shard", label="shape", group="palce")
    with pytest.raises(InputError, match=f"no .json member has the column 'splt': {columns}"):
        read_labels(sources, "shard", label="shape", where={"splt": "1"})


def test_captions_are_labels_only_when_named(tmp_path: Path) -> None:
    captions = {"_0_txt": b"a red star above a blue ring", "_1_txt": b"two green squares beside a circle"}
    texts = tuple(text.decode() for text in captions.values())
    beside_json = sidecars(tmp_path, b'{"url": "x"}', b'{"url": "y"}', **captions)
    with pytest.raises(InputError, match="has the label column 'label': there are url, txt"):
        read_labels(beside_json, "shard")
    assert read_labels(beside_json, "shard", label="txt").values == texts
    alone = sidecars(tmp_path, None, None, **captions)
    with pytest.raises(InputError, match=r"the \.txt members look like captions, not labels \('a red star above"):
        read_labels(alone, "shard")
    assert read_labels(alone, "shard", label="txt").values == texts


def test_class_names_in_txt_members(tmp_path: Path) -> None:
    names = {"_0_txt": b"Gila monster\n", "_1_txt": b"curly-coated retriever"}
    assert read_labels(sidecars(tmp_path, None, None, **names), "shard").values == (
        "Gila monster",
        "curly-coated retriever",
    )


@pytest.mark.parametrize(
    ("document", "label"),
    [
        (b'{"label": null}', None),
        (b'{"label": ""}', None),
        (b'{"label": 3}', "3"),
        (b'{"label": 0}', "0"),
        (b'{"label": true}', "true"),
        (b'{"label": "None"}', "None"),
        (b'{"other": 1}', None),
    ],
)
def test_json_values_as_labels(tmp_path: Path, document: bytes, label: str | None) -> None:
    labels = read_labels(sidecars(tmp_path, document, b'{"label": "dog"}'), "shard")
    assert labels.values == (label, "dog")
    assert len(labels.notes) == (label is None)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (b'{"label": "\\ud800"}', "its 'label' is not valid Unicode: \\ud800"),
        (b'{"label": ["a"]}', "its 'label' is a list, not a text or a number"),
        (b'{"label": {"a": 1}}', "its 'label' is a dict, not a text or a number"),
        (b'{"label": "cat"', 'its .json member is not JSON: \'{"label": "cat"\''),
        (b"[1, 2]", "its .json member is no object with columns as keys"),
        (b"[" * 100_000, "its .json member is not JSON: '[[[[[[[[[["),
        (b"\xff\xfe", "a .json member is not UTF-8 text"),
    ],
)
def test_a_sidecar_that_cannot_be_read_affects_its_own_image_only(tmp_path: Path, document: bytes, reason: str) -> None:
    sources = sidecars(tmp_path, b'{"label": "dog"}', document, b'{"label": "cat"}')
    labels = read_labels(sources, "shard")
    assert labels.values == ("dog", None, "cat")
    assert labels.notes[0].startswith(f"{tmp_path}/a.tar:1.png: ")
    assert reason in labels.notes[0]
    assert "1 of 3 images have no label" in labels.notes[1]
    for text in labels.notes:
        assert "\n" not in text
        text.encode()


def test_many_unreadable_sidecars_are_counted(tmp_path: Path) -> None:
    labels = read_labels(sidecars(tmp_path, *[b"{"] * 9, b'{"label": "dog"}'), "shard")
    assert len(labels.notes) == 5
    assert labels.notes[3] == "6 more images have labels that cannot be read"


# ------------------------------------------------------------------------------------------------- columns and rows


@pytest.fixture
def birds(tmp_path: Path) -> tuple[list[Source], str]:
    """Twelve images and a table with the columns of Waterbirds, whose groups are y × place."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(number))
    rows = [f"{n},images/{n}.png,{n % 2},{n % 3},{n // 2 % 2},x.png" for n in range(12)]
    header = "img_id,img_filename,y,split,place,place_filename"
    return images_in(tmp_path / "images"), table(tmp_path / "metadata.csv", header, *rows)


def number(source: Source) -> int:
    return int(source.path.stem)


def test_several_group_columns_are_combined(birds: tuple[list[Source], str]) -> None:
    sources, file = birds
    labels = read_labels(sources, file, label="y", group=("y", "place"))
    numbers = [number(source) for source in sources]
    assert labels.values == tuple(str(n % 2) for n in numbers)
    assert labels.groups == tuple(f"y={n % 2}, place={n // 2 % 2}" for n in numbers)
    assert not labels.notes
    assert labels.selected is None
    assert read_labels(sources, file, label="y", group=["place"]).groups == tuple(str(n // 2 % 2) for n in numbers)


def test_rows_are_filtered_by_the_values_of_columns(birds: tuple[list[Source], str]) -> None:
    sources, file = birds
    labels = read_labels(sources, file, label="y", group="place", where={"split": "2"})
    kept = [number(source) % 3 == 2 for source in sources]
    assert labels.selected == tuple(kept)
    assert [value is not None for value in labels.values] == kept
    assert [group is not None for group in labels.groups or ()] == kept
    assert labels.notes == ("8 of 12 images are left out by the row filter",)
    both = read_labels(sources, file, label="y", where={"split": "2", "place": "1"}).selected
    assert both == tuple(number(source) % 3 == 2 and number(source) // 2 % 2 == 1 for source in sources)
    with pytest.raises(InputError, match="no row that is kept has one"):
        read_labels(sources, file, label="y", where={"split": "7"})


def test_the_file_column_is_found_or_named(birds: tuple[list[Source], str], tmp_path: Path) -> None:
    sources, file = birds
    assert read_labels(sources, file, label="y", file_column="img_filename").values.count("1") == 6
    with pytest.raises(InputError, match="its column 'img_id' names none of these images"):
        read_labels(sources, file, label="y", file_column="img_id")
    with pytest.raises(InputError, match="has no column 'file_name': its columns are img_id, img_filename"):
        read_labels(sources, file, label="y", file_column="file_name")
    unusual = table(tmp_path / "u.csv", "id,where,kind", *(f"{n},images/{n}.png,{n}" for n in range(12)))
    assert read_labels(sources, unusual, label="kind").values == tuple(str(number(source)) for source in sources)
    two = table(tmp_path / "two.csv", "a,b,kind", *(f"images/{n}.png,{n}.png,{n}" for n in range(12)))
    with pytest.raises(InputError, match="names images in the columns a and b: name the file column"):
        read_labels(sources, two, label="kind")
    assert read_labels(sources, two, label="kind", file_column="b").values[0] is not None


def test_group_and_filter_columns_of_shards(tmp_path: Path) -> None:
    documents = [f'{{"y": {n % 2}, "place": "p{n % 3}", "split": {n % 2}}}'.encode() for n in range(6)]
    labels = read_labels(sidecars(tmp_path, *documents), "shard", label="y", group=("y", "place"), where={"split": "1"})
    assert labels.values == (None, "1", None, "1", None, "1")
    assert labels.groups == (None, "y=1, place=p1", None, "y=1, place=p0", None, "y=1, place=p2")
    assert labels.selected == (False, True, False, True, False, True)


def test_labels_from_the_images_own_folder(tmp_path: Path) -> None:
    for name in ("a/abbey/0.png", "a/airfield/0.png", "b/bank/0.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(encoded(1))
    own = read_labels(images_in(tmp_path / "images"), "parent")
    assert own.values == ("abbey", "airfield", "bank")
    assert not own.notes
    first = read_labels(images_in(tmp_path / "images"), "folder")
    assert first.values == ("a", "a", "b")
    assert "3 images lie in folders inside the first one" in first.notes[0]
    with pytest.raises(InputError, match="labels from folders have no column 'place'"):
        read_labels(images_in(tmp_path / "images"), "parent", group="place")


def test_row_filters_as_texts() -> None:
    assert parse_where(["split=2", "name=a=b", "empty="]) == {"split": "2", "name": "a=b", "empty": ""}
    for conditions, message in (
        (["split"], "expected column=value"),
        (["=2"], "expected"),
        (["a=1", "a=2"], "two row"),
    ):
        with pytest.raises(InputError, match=message):
            parse_where(conditions)


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
def test_a_table_that_is_a_fifo_is_refused(folder: Path) -> None:
    os.mkfifo(folder / "labels.csv")
    with pytest.raises(InputError, match="a FIFO, not a regular file"):
        read_labels(images_in(folder), str(folder / "labels.csv"))


def test_photographs_have_labels_in_txt_members() -> None:
    folder = ROOT.parent / "shared" / "photos"
    if not folder.is_dir():
        pytest.skip("no photographs beside this checkout")
    labels = read_labels(find_images([folder])[0], "shard")
    assert None not in labels.values


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["name,label", "a,b"], "has no column 'file': its columns are name, label"),
        (["file,kind", "a,b"], "has no column 'label'"),
        (["file,label", "a,b", "a,c"], "names a more than once"),
        (["file,label", "nothing.png,b"], "no image has a label from"),
    ],
)
def test_tables_without_matching_columns_or_rows_are_refused(folder: Path, rows: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_labels(images_in(folder), table(folder.parent / "labels.csv", *rows))


def test_tables_that_cannot_be_read_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_labels(images_in(folder), str(folder / "gone.csv"))
    (folder / "bytes.csv").write_bytes(b"file,label\n\xff\xfe,x\n")
    with pytest.raises(InputError, match="not a CSV file in UTF-8"):
        read_labels(images_in(folder), str(folder / "bytes.csv"))
