"""Parquet, Arrow and Feather tables as inputs: images as bytes, structs, paths or URLs, in ranges of rows."""

import datetime
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from input_files import encoded, everything, given, level, read, shard

from clipfast.dataset.inputs import table_files
from clipfast.dataset.inputs.folders import FolderInput
from clipfast.dataset.inputs.locations import changed
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.inputs.tables import TableInput, _ranges
from clipfast.dataset.plan import write_plan
from clipfast.errors import InputError


def arrow_file(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def arrow_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


WRITERS: dict[str, tuple[str, Callable[[Any, Path], None]]] = {
    "parquet": ("a.parquet", lambda table, path: pq.write_table(table, path, row_group_size=7)),
    "one group": ("a.parquet", lambda table, path: pq.write_table(table, path)),
    "arrow file": ("a.arrow", arrow_file),
    "arrow stream": ("a.arrow", arrow_stream),
    "feather": ("a.feather", lambda table, path: pyarrow.feather.write_feather(table, str(path), chunksize=7)),
}


def of(path: Path | str, **options: Any) -> TableInput:
    (source,) = open_inputs([str(path)], **options)
    assert isinstance(source, TableInput)
    return source


def structs(count: int = 20) -> list[dict[str, Any]]:
    return [{"bytes": encoded(number), "path": f"{number}.png"} for number in range(count)]


@pytest.mark.parametrize("how", WRITERS)
def test_every_range_of_every_format(tmp_path: Path, how: str) -> None:
    name, write = WRITERS[how]
    path = tmp_path / name
    columns = {
        "n": list(range(20)),
        "img": [encoded(number) for number in range(20)],
        "name": [f"x{n}" for n in range(20)],
    }
    write(pa.table(columns), path)
    source = pickle.loads(pickle.dumps(of(path)))
    plan = write_plan(tmp_path, [source], 6)
    units = list(plan.units())
    assert [unit.start for unit in units] == [0, *(unit.stop for unit in units[:-1])]
    assert units[-1].stop == 20
    assert all(0 < unit.stop - unit.start <= 6 for unit in units)
    for unit in reversed(units):
        have = read(source, unit)
        assert have.ids == [f"{path}:{row}" for row in range(unit.start, unit.stop)]
        assert [level(each) for each in have.good] == list(range(unit.start, unit.stop))
        assert [dict(each.columns) for each in have.good] == [
            {"n": str(row), "name": f"x{row}"} for row in range(unit.start, unit.stop)
        ]
        assert [each.member for each in have.good] == [f"row {row}" for row in range(unit.start, unit.stop)]
        assert {(each.path, each.size) for each in have.good} == {(str(path), path.stat().st_size)}
        names = given(source.names(unit))
        assert [(each.id, each.content, dict(each.columns)) for each in names.samples] == [
            (x, None, {}) for x in have.ids
        ]
    assert changed(units[0]) is None
    assert have.reading.source()["version"] == str(path.stat().st_mtime_ns)


@settings(max_examples=200, deadline=None)
@cases(groups=st.lists(st.integers(0, 30), max_size=12), size=st.integers(1, 20))
def test_ranges_cover_every_row_once(groups: list[int], size: int) -> None:
    ranges = list(_ranges(iter(groups), size))
    rows = [row for start, stop in ranges for row in range(start, stop)]
    assert rows == list(range(sum(groups)))
    assert all(0 < stop - start <= size for start, stop in ranges)
    if groups and max(groups) <= size:  # then no group is cut
        ends = set(np.cumsum(groups).tolist())
        assert all(stop in ends for _, stop in ranges)


def test_hugging_face_images_with_bytes_or_paths(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encoded(77))
    values = [*structs(2), {"bytes": None, "path": "p.png"}, {"bytes": None, "path": None}, None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = (
        '{"info": {"features": {"image": {"_type": "Image"}, "y": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    )
    schema = pa.schema([("image", kind), ("y", pa.int64())], metadata={"huggingface": features})
    pq.write_table(pa.table({"image": values, "y": [0, 1, 0, -1, 7]}, schema=schema), tmp_path / "a.parquet")
    have = everything(of(tmp_path / "a.parquet"))
    assert [level(each) for each in have.good] == [0, 1, 77]
    assert have.good[2].path == str(tmp_path / "p.png")
    assert [each.columns["y"] for each in have.samples] == ["cat", "dog", "cat", "-1", "7"]
    assert have.failures == {f"{tmp_path}/a.parquet:{row}": "no_image" for row in (3, 4)}


def test_paths_and_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "data" / "beside.png").write_bytes(encoded(1))
    (tmp_path / "here" / "working.png").write_bytes(encoded(2))
    (tmp_path / "here" / "beside.png").write_bytes(encoded(9))
    with fsspec.open("memory://tables/remote.png", "wb") as file:
        file.write(encoded(3))
    monkeypatch.chdir(tmp_path / "here")
    names = [
        "beside.png",
        "working.png",
        "memory://tables/remote.png",
        str(tmp_path / "data" / "beside.png"),
        "gone.png",
        "",
    ]
    names += [f"file://{tmp_path}/here/working.png", "memory://tables/gone.png"]
    pq.write_table(pa.table({"text": ["x"] * 8, "file_name": names}), tmp_path / "data" / "a.parquet")
    source = of("../data/a.parquet")
    (unit,) = source.units(100)
    monkeypatch.chdir(tmp_path)  # a worker may have another working folder
    have = read(source, unit)
    assert have.failures == {"../data/a.parquet:5": "no_image", "../data/a.parquet:7": "missing"}
    assert [each.path for each in have.good] == [
        f"{tmp_path}/data/beside.png",
        f"{tmp_path}/here/working.png",
        "memory://tables/remote.png",
        f"{tmp_path}/data/beside.png",
        f"{tmp_path}/data/gone.png",
        f"{tmp_path}/here/working.png",
    ]
    assert [level(each) for each in (*have.good[:4], have.good[5])] == [1, 2, 3, 1, 2]
    assert have.good[2].content == encoded(3)
    assert [each.size for each in have.good[:2]] == [len(encoded(1)), len(encoded(2))]


def test_ids_from_a_column(tmp_path: Path) -> None:
    images = [encoded(number) for number in range(5)]
    pq.write_table(pa.table({"jpg": images, "key": ["a", "b", "b", None, "ü"]}), tmp_path / "a.parquet")
    have = everything(of(tmp_path / "a.parquet", id_column="key"))
    assert [each.id for each in have.samples] == ["a", "b", "b", f"{tmp_path}/a.parquet:3", "ü"]
    assert have.failures == {"b": "duplicate"}
    pq.write_table(pa.table({"jpg": images, "key": [5, 6, 7, 8, 9]}), tmp_path / "a.parquet")
    assert everything(of(tmp_path / "a.parquet", id_column="key")).ids == ["5", "6", "7", "8", "9"]


def test_values_become_text(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": [encoded(1)] * 2,
            "flag": [True, None],
            "score": [0.5, float("nan")],
            "day": [datetime.date(2024, 1, 2), None],
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "box": [[1, 2], None],
            "mask": [b"", b""],
            "bad": pa.array([b"\xff", b"ok"], pa.binary()).view(pa.string()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    have = everything(of(tmp_path / "a.parquet"))
    assert [dict(each.columns) for each in have.good] == [
        {"flag": "true", "score": "0.5", "day": "2024-01-02", "kind": "x", "bad": None},
        {"flag": None, "score": None, "day": None, "kind": "y", "bad": "ok"},
    ]
    few = everything(of(tmp_path / "a.parquet", columns=["kind"]))
    assert [dict(each.columns) for each in few.good] == [{"kind": "x"}, {"kind": "y"}]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"a": [1], "b": ["x"]},
            {},
            "has no column of images, paths or URLs: its columns are a, b; name the image column",
        ),
        ({"a": [b"x"], "b": [b"x"]}, {}, "has images in the columns a and b: name the image column"),
        ({"a": [b"x"]}, {"image_column": "b"}, "has no column 'b': its columns are a"),
        ({"a": [b"x"], "n": [1]}, {"image_column": "n"}, "the column 'n' holds no images, bytes or paths"),
        ({"a": [b"x"]}, {"id_column": "key"}, "has no column 'key': its columns are a"),
    ],
)
def test_columns_that_do_not_fit(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, str], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(InputError) as caught:
        list(of(tmp_path / "a.parquet", **options).units(10))
    assert str(caught.value).startswith(f"{tmp_path}/a.parquet")
    assert message in str(caught.value)


def test_the_usual_columns_are_found(tmp_path: Path) -> None:
    for columns, wanted in (
        ({"thumb": [b"x"], "Image": [b"y"], "url": ["u"]}, b"y"),
        ({"blob": [b"z"], "path": ["u"]}, b"z"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        assert [each.content for each in everything(of(tmp_path / "a.parquet")).good] == [wanted]


def test_memory_is_that_of_some_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row group of 48 MB: neither it nor a column of it is in memory as a whole."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, 100_000, dtype=np.uint8).tobytes() for _ in range(480)]
    table = pa.table({"image": images})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=480, write_batch_size=8, use_dictionary=False)
    del images, table
    monkeypatch.setattr(table_files, "_BATCH_BYTES", 1 << 20)
    source = of(tmp_path / "a.parquet")
    units = list(source.units(200))
    assert [(unit.start, unit.stop) for unit in units] == [(0, 200), (200, 400), (400, 480)]
    before, most = pa.total_allocated_bytes(), 0
    count = 0
    for _ in source.read(units[1]):
        count += 1
        most = max(most, pa.total_allocated_bytes() - before)
    assert count == 200
    assert most < 8 << 20


@pytest.mark.parametrize("how", WRITERS)
def test_damaged_tables(tmp_path: Path, how: str) -> None:
    """60 copies that are cut or have changed bytes: read, or one line."""
    name, write = WRITERS[how]
    path = tmp_path / name
    write(pa.table({"img": [encoded(number) for number in range(20)], "label": [str(n) for n in range(20)]}), path)
    data = path.read_bytes()
    source = of(path)
    units = list(source.units(6))
    rng = np.random.default_rng(0)
    reported = 0
    for number in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), 4):
            damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged[: None if number % 2 else rng.integers(0, len(data))])
        errors = [read(source, unit).error for unit in units]
        reported += any(error is not None for error in errors)
        try:
            list(source.units(6))
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
    assert reported >= 30


def test_tables_that_are_not_there_or_no_tables(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.parquet")
    (tmp_path / "text.parquet").write_text("file,label\n")
    (tmp_path / "old.feather").write_bytes(b"FEA1" + bytes(20))
    (tmp_path / "empty.arrow").touch()
    for name, message in (
        ("gone.parquet", "no such file"),
        ("fifo.parquet", "a FIFO, not a regular file"),
        ("text.parquet", "no table, or a damaged one"),
        ("old.feather", "a Feather file of version 1"),
        ("empty.arrow", "an empty file"),
    ):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            list(of(tmp_path / name).units(10))


def test_a_table_that_shrank_after_planning(tmp_path: Path) -> None:
    for name, write in WRITERS.values():
        write(pa.table({"img": [encoded(number) for number in range(20)]}), tmp_path / name)
        source = of(tmp_path / name)
        unit = list(source.units(10))[-1]
        write(pa.table({"img": [encoded(number) for number in range(13)]}), tmp_path / name)
        error = read(source, unit).error
        assert error is not None
        assert error.kind == "damaged"
        assert "it has 13 rows, not 20 or more" in str(error)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names that this system's files cannot have")
@pytest.mark.parametrize("how", WRITERS)
def test_tables_of_any_name(tmp_path: Path, how: str) -> None:
    name, write = WRITERS[how]
    write(pa.table({"img": [encoded(3)]}), tmp_path / name)
    odd = f"{tmp_path}/\udcff{name}"
    (tmp_path / name).rename(odd)
    have = everything(of(odd))
    assert (have.ids, [level(each) for each in have.good]) == ([f"{odd}:0"], [3])


def test_remote_tables(tmp_path: Path) -> None:
    for name, write in (("r.parquet", pq.write_table), ("r.arrow", arrow_file)):
        local = tmp_path / name
        write(pa.table({"img": [encoded(number) for number in range(20)]}), local)
        with fsspec.open(f"memory://tables/{name}", "wb") as file:
            file.write(local.read_bytes())
        have = everything(of(f"memory://tables/{name}"), 7)
        assert [level(each) for each in have.good] == list(range(20))
        assert have.ids[17] == f"memory://tables/{name}:17"


def test_tables_in_folders(tmp_path: Path) -> None:
    """Those that hold images are read. Those that name files of the folder would count them twice."""
    (tmp_path / "a.png").write_bytes(encoded(1))
    shard(tmp_path / "00000.tar", {"0.png": encoded(2)})
    pq.write_table(pa.table({"image": structs(3)}), tmp_path / "z.parquet")
    pq.write_table(pa.table({"url": ["http://127.0.0.1:9/x.png"]}), tmp_path / "00000.parquet")
    pq.write_table(pa.table({"file_name": ["a.png"]}), tmp_path / "metadata.parquet")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1xx")
    (source,) = open_inputs([tmp_path])
    assert isinstance(source, FolderInput)
    have = everything(source, 2)
    assert sorted(have.ids) == [
        f"{tmp_path}/{name}" for name in ("00000.tar:0.png", "a.png", "z.parquet:0", "z.parquet:1", "z.parquet:2")
    ]
    assert {each.folder for each in have.samples} == {str(tmp_path)}
    assert sorted(source.notes()) == [
        f"left out: tables beside a shard of the same name: 1 ({tmp_path}/00000.parquet)",
        f"left out: tables of paths (they are read when they are named themselves): 1 ({tmp_path}/metadata.parquet)",
        f"left out: tables without a column of images: 1 ({tmp_path}/numbers.parquet)",
    ]
    assert [line.partition(" (")[0] for line in source.problems()] == [
        f"{tmp_path}/broken.parquet: no table, or a damaged one"
    ]
