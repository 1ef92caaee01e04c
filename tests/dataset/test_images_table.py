"""The table of a unit's images: every image has a row, and those in the statistics a row of the arrays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import clip_model, pixels

from clipfast import Contributions, InputError, Model, wrap
from clipfast.dataset import images_table
from clipfast.dataset.images_table import IMAGES, SCHEMA, ImageTable, fine, read_images
from clipfast.dataset.manifest import Record
from clipfast.dataset.pieces import files
from clipfast.dataset.samples import Failure, Sample, Status


@pytest.fixture(scope="module")
def model() -> Model:
    return wrap(clip_model())


@pytest.fixture(scope="module")
def contributions(model: Model) -> Contributions:
    return model.decompose(pixels(model.module.visual, 5))


def samples(count: int, failed: int = 0) -> list[Sample]:
    """Good images, with failed ones between them."""
    good = [Sample(f"good {number}", f"/images/{number}.png", label="cat") for number in range(count)]
    bad = [
        Sample(f"bad {number}", "/s.tar", f"{number}.png", failure=Failure(Status.DECODE_ERROR, "cut short"))
        for number in range(failed)
    ]
    return [sample for pair in zip(good, bad, strict=False) for sample in pair] + good[failed:]


def record(folder: Path, **statuses: int) -> Record:
    return Record(3, folder.name, statuses, files(folder))


def test_what_comes_back(tmp_path: Path, contributions: Contributions) -> None:
    first = Sample(
        id="a\udcff",
        path="/photos/\udcffname.tar",
        member="x.png",
        key="x",
        folder="/photos",
        size=17,
        modified_ns=1_700_000_000_123_456_789,
        label="cat",
        group="b\x85c",
    )
    failure = Failure(Status.TOO_LARGE, "too many pixels in \udc80")
    table = ImageTable(tmp_path)
    table.add([first, Sample("2", "2.png", failure=failure), Sample("3", "3.png")], contributions[:2])
    table.add([Sample("4", "4.png", failure=failure)])
    table.add([Sample("5", "5.png")], contributions[2])
    table.finish()
    read = read_images(tmp_path, record(tmp_path, ok=3, too_large=2))
    assert read.schema.equals(SCHEMA)
    one, two, three, four, five = read.to_pylist()
    numbers = [contributions.mean, contributions.std, contributions.norm]
    assert one == {
        "id": "a\\udcff",
        "path": b"/photos/\xffname.tar",
        "key": b"x",
        "member": b"x.png",
        "folder": b"/photos",
        "size": 17,
        "modified_ns": 1_700_000_000_123_456_789,
        "label": "cat",
        "group": "b\x85c",
        "status": "ok",
        "reason": None,
        "mean": float(numbers[0][0]),
        "std": float(numbers[1][0]),
        "norm": float(numbers[2][0]),
        "row": 0,
    }
    assert two["reason"] == four["reason"] == "too many pixels in \\udc80"
    assert {two[name] for name in ("mean", "std", "norm", "row", "folder", "size", "label")} == {None}
    assert [row["status"] for row in (two, three, four, five)] == ["too_large", "ok", "too_large", "ok"]
    assert (three["row"], five["row"]) == (1, 2)
    assert (three["norm"], five["norm"]) == (float(numbers[2][1]), float(numbers[2][2]))
    assert fine(read).column("id").to_pylist() == ["a\\udcff", "3", "5"]


def test_columns_are_chosen(tmp_path: Path, contributions: Contributions) -> None:
    table = ImageTable(tmp_path)
    table.add(samples(5, 2), contributions)
    table.finish()
    own = record(tmp_path, ok=5, decode_error=2)
    assert read_images(tmp_path, own, ["row", "id"]).column_names == ["row", "id"]
    with pytest.raises(InputError, match="there is no column 'sigma': choose from id, path"):
        read_images(tmp_path, own, ["sigma"])


def test_row_groups_are_written_as_rows_come(
    tmp_path: Path, contributions: Contributions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_table, "ROWS_AT_ONCE", 4)
    table = ImageTable(tmp_path)
    for _ in range(3):
        table.add(samples(5, 2), contributions)
        assert len(table._waiting) < 4
    table.finish()
    metadata = pq.ParquetFile(tmp_path / IMAGES).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [4] * 5 + [1]
    read = read_images(tmp_path, record(tmp_path, ok=15, decode_error=6))
    assert fine(read).column("row").to_pylist() == list(range(15))


def test_a_unit_without_images(tmp_path: Path) -> None:
    ImageTable(tmp_path).finish()
    assert read_images(tmp_path, record(tmp_path)).num_rows == 0


def test_the_bytes_do_not_depend_on_the_run(tmp_path: Path, contributions: Contributions) -> None:
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        table = ImageTable(tmp_path / name)
        table.add(samples(5, 3), contributions)
        table.finish()
        found.append(files(tmp_path / name))
    assert found[0] == found[1]


@pytest.mark.parametrize(("count", "given"), [(4, slice(None)), (1, None)])
def test_contributions_of_other_images(
    tmp_path: Path, contributions: Contributions, count: int, given: slice | None
) -> None:
    table = ImageTable(tmp_path)
    with pytest.raises(InputError, match="images did not fail, but"):
        table.add(samples(count), None if given is None else contributions[given])


@pytest.fixture
def unit(tmp_path: Path, contributions: Contributions) -> tuple[Path, Record]:
    folder = tmp_path / "data" / "unit"
    folder.mkdir(parents=True)
    table = ImageTable(folder)
    table.add(samples(5, 3), contributions)
    table.finish()
    return folder, record(folder, ok=5, decode_error=3)


def test_every_byte_is_checked(unit: tuple[Path, Record]) -> None:
    folder, own = unit
    content = (folder / IMAGES).read_bytes()
    for place in range(0, len(content), 11):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        (folder / IMAGES).write_bytes(changed)
        with pytest.raises(InputError, match=r"images\.parquet is damaged: its checksum is not that of the record"):
            read_images(folder, own)


def test_files_that_are_not_whole(unit: tuple[Path, Record]) -> None:
    folder, own = unit
    content = (folder / IMAGES).read_bytes()
    (folder / IMAGES).write_bytes(content[:-1])
    with pytest.raises(
        InputError, match=rf"it has {len(content) - 1} bytes, the record says {len(content)}; `clipfast"
    ):
        read_images(folder, own)
    (folder / IMAGES).unlink()
    with pytest.raises(InputError, match=r"images\.parquet is gone; `clipfast collection validate"):
        read_images(folder, own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"statuses": {"ok": 5}}, "it has 8 rows, its record says otherwise"),
        ({"files": {}}, "the record of the unit does not name it"),
    ],
)
def test_a_record_that_does_not_fit(unit: tuple[Path, Record], changes: dict[str, Any], message: str) -> None:
    folder, own = unit
    with pytest.raises(InputError, match=message):
        read_images(folder, replace(own, **changes))


def test_a_file_that_is_no_table(unit: tuple[Path, Record]) -> None:
    folder, own = unit
    (folder / IMAGES).write_bytes(b"no table")
    with pytest.raises(InputError, match=r"images\.parquet is damaged: .*Parquet"):
        read_images(folder, replace(own, files=files(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_keep_their_bits(tmp_path: Path, contributions: Contributions, dtype: torch.dtype) -> None:
    scaled = {name: getattr(contributions, name).to(dtype) / 3 for name in ("mean", "std", "norm")}
    table = ImageTable(tmp_path)
    table.add(samples(5), replace(contributions, **scaled))
    table.finish()
    read = read_images(tmp_path, record(tmp_path, ok=5))
    for name, expected in scaled.items():
        assert (read.column(name).to_numpy() == expected.numpy()).all()
