"""Lists of paths as inputs: text, CSV, TSV and JSON lines, in ranges that are read from where they begin."""

import gzip
import json
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given as cases
from hypothesis import settings
from hypothesis import strategies as st
from input_files import encoded, everything, given, level, read

from clipfast.dataset.inputs import lists
from clipfast.dataset.inputs.lists import ListInput
from clipfast.dataset.inputs.locations import Naming, changed
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.inputs.rows import Selection
from clipfast.dataset.plan import write_plan
from clipfast.errors import InputError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "img").mkdir()
    for number in range(10):
        (tmp_path / "img" / f"{number}.png").write_bytes(encoded(number))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(path: Path | str, **options: Any) -> ListInput:
    (source,) = open_inputs([str(path)], **options)
    assert isinstance(source, ListInput)
    return source


CONTENTS = {
    "a.txt": "".join(f"img/{n}.png\n" for n in range(10)),
    "crlf.txt": "".join(f"img/{n}.png\r\n\r\n" for n in range(10)),
    "noend.txt": "\n".join(f"img/{n}.png" for n in range(10)),
    "bom.txt": "\ufeff" + "".join(f"img/{n}.png\n" for n in range(10)),
    "a.csv": "label,path,note\n" + "".join(f'l{n},img/{n}.png,"a\nb, {n}"\n' for n in range(10)),
    "bom.csv": "\ufefflabel,path,note\r\n" + "".join(f'l{n},img/{n}.png,"a\nb, {n}"\r\n\r\n' for n in range(10)),
    "bare.csv": "".join(f"img/{n}.png\n" for n in range(10)),
    "one.csv": "picture\n" + "".join(f"img/{n}.png\n" for n in range(10)),
    "a.tsv": "label\tfile_name\tnote\n" + "".join(f'l{n}\timg/{n}.png\t"a\nb, {n}"\n' for n in range(10)),
    "a.jsonl": "".join(
        json.dumps({"label": f"l{n}", "path": f"img/{n}.png", "note": f"a\nb, {n}"}) + "\n" for n in range(10)
    ),
    "bare.jsonl": "".join(json.dumps(f"img/{n}.png") + "\n\n" for n in range(10)),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_range_of_every_kind(folder: Path, name: str, zipped: bool) -> None:
    data = CONTENTS[name].encode()
    path = folder / (f"{name}.gz" if zipped else name)
    path.write_bytes(gzip.compress(data) if zipped else data)
    source = pickle.loads(pickle.dumps(of(path)))
    plan = write_plan(folder, [source], 4)
    units = list(plan.units())
    assert [(unit.start, unit.stop) for unit in units] == [(0, 4), (4, 8), (8, 10)]
    for unit in reversed(units):
        have = read(source, unit)
        rows = range(unit.start, unit.stop)
        assert have.error is None
        assert have.ids == [f"img/{row}.png" for row in rows]
        assert [level(each) for each in have.good] == list(rows)
        assert [each.path for each in have.good] == [f"{folder}/img/{row}.png" for row in rows]
        if name in ("a.csv", "bom.csv", "a.tsv", "a.jsonl"):
            assert [dict(each.columns) for each in have.good] == [
                {"label": f"l{row}", "note": f"a\nb, {row}"} for row in rows
            ]
        names = given(source.names(unit))
        assert [(each.id, dict(each.columns)) for each in names.samples] == [(x, {}) for x in have.ids]


def test_the_digest_of_a_plan_depends_on_the_rows(folder: Path) -> None:
    digests = set()
    for text in ("img/0.png\nimg/1.png\n", "img/0.png\nimg/2.png\n"):
        (folder / "a.txt").write_text(text)
        digests.add(write_plan(folder, [of("a.txt")], 4).digest)
    assert len(digests) == 2


def test_a_list_that_was_changed_is_not_read(folder: Path) -> None:
    path = folder / "a.txt"
    path.write_text(CONTENTS["a.txt"])
    source = of(path)
    units = list(source.units(4))
    os.utime(path, ns=(0, 0))
    assert changed(units[1]) is None
    assert len(read(source, units[1]).good) == 4
    for text, others in (
        (CONTENTS["a.txt"].replace("5.png", "6.png"), [0, 2]),
        ("img/0.png\n" + CONTENTS["a.txt"], []),
        (CONTENTS["a.txt"][:60], [0]),
        ("", []),
    ):
        path.write_text(text)
        for number, unit in enumerate(units):
            have = read(source, unit)
            if number in others:
                assert have.error is None
            else:
                assert not have.samples
                assert have.error is not None
                assert "it was changed after the pass was planned" in str(have.error)
    assert "bytes, not 100" in str(changed(units[0]))
    path.unlink()
    error = read(source, units[0]).error
    assert error is not None
    assert error.kind == "missing"


def test_names_that_are_no_text(folder: Path) -> None:
    with open(b"img/\xff\xfe.png", "wb") as file:
        file.write(encoded(33))
    (folder / "a.txt").write_bytes(b"img/\xff\xfe.png\n")
    (folder / "a.csv").write_bytes(b"path,label\nimg/\xff\xfe.png,\xff\n")
    for name in ("a.txt", "a.csv"):
        have = everything(of(name))
        assert have.ids == ["img/\udcff\udcfe.png"]
        assert [level(each) for each in have.good] == [33]
    assert dict(have.good[0].columns) == {"label": None}


def test_rows_without_an_image_and_names_that_occur_twice(folder: Path) -> None:
    rows = ['{"path": "img/1.png", "id": "x"}', "{", "[1]", '{"path": null}', '{"path": "img/2.png"}', '{"path": 3}']
    (folder / "a.jsonl").write_text("\n".join([*rows, '{"path": "img/1.png", "id": "y"}', '{"path": "img/0.png"}']))
    have = everything(of("a.jsonl"))
    assert have.ids == ["img/1.png", "img/2.png", "img/0.png"]
    assert have.failures == {
        "a.jsonl:1": "no_image",
        "a.jsonl:2": "no_image",
        "a.jsonl:3": "no_image",
        "a.jsonl:5": "no_image",
        "img/1.png": "duplicate",
    }
    assert everything(of("a.jsonl", id_column="id")).ids == ["x", "img/2.png", "y", "img/0.png"]
    (folder / "a.csv").write_text("path,label\nimg/1.png\n,x\nimg/2.png,a,b\n")
    have = everything(of("a.csv"))
    assert [dict(each.columns) for each in have.samples] == [{"label": None}, {"label": "x"}, {"label": "a"}]
    assert have.failures == {"a.csv:1": "no_image"}


def test_urls_in_lists_and_lists_at_urls(folder: Path) -> None:
    for name, data in (("x/0.png", encoded(50)), ("x/a.txt", b"0.png\nmemory://lists/x/0.png\ngone.png\n")):
        with fsspec.open(f"memory://lists/{name}", "wb") as file:
            file.write(data)
    have = everything(of("memory://lists/x/a.txt"))
    assert have.ids == ["0.png", "memory://lists/x/0.png"]
    assert [level(each) for each in have.good] == [50, 50]
    assert have.failures == {"gone.png": "missing"}
    (folder / "a.txt").write_text("memory://lists/x/0.png\nimg/3.png\nmemory://lists/x/1.png\nimg/4.png\n")
    have = everything(of("a.txt"))
    assert [level(each) for each in have.good] == [50, 3, 4]
    assert [each.id for each in have.samples] == [
        "memory://lists/x/0.png",
        "img/3.png",
        "memory://lists/x/1.png",
        "img/4.png",
    ]


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("a.csv", b"a,b\n1,2\n", {}, "has no column of images, paths or URLs: its columns are a, b"),
        ("a.csv", b"a,path\n1,2\n", {"image_column": "c"}, "has no column 'c': its columns are a, path"),
        ("a.csv", b"a,path\n1,2\n", {"id_column": "c"}, "has no column 'c'"),
        ("a.csv", b'path,b\n"' + b"x" * 200_000, {}, "not a CSV file (field larger than field limit"),
        ("a.csv", "path\na.png\n".encode("utf-16"), {}, "not UTF-8 text (UTF-16?)"),
        ("a.txt", b"x" * (3 << 20), {}, "a line of more than 1048576 bytes: is it a list of paths?"),
        ("a.jsonl", b'{"n": 1}\n', {}, "has no column of images, paths or URLs: its columns are n"),
    ],
)
def test_lists_that_cannot_be_read(folder: Path, name: str, data: bytes, options: dict[str, str], message: str) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        list(of(name, **options).units(4))
    assert str(caught.value).startswith(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_special_files_and_missing_lists(folder: Path) -> None:
    os.mkfifo(folder / "fifo.csv")
    with pytest.raises(InputError, match=r"fifo\.csv: a FIFO, not a regular file"):
        list(of("fifo.csv").units(4))
    with pytest.raises(InputError, match=r"gone\.csv: no such file"):
        list(of("gone.csv").units(4))
    (folder / "empty.csv").touch()
    assert list(of("empty.csv").units(4)) == []
    with pytest.raises(InputError, match=r"no images in empty\.csv"):
        write_plan(folder, [of("empty.csv")], 4)


def test_a_late_range_reads_neither_the_list_into_memory_nor_its_beginning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 100_000
    (folder / "a.csv").write_text("path,label\n" + "".join(f"{'x' * 90}/{n:07}.png,{n}\n" for n in range(count)))
    source = of("a.csv")
    tracemalloc.start()
    units = list(source.units(1000))
    _, planning = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    lines = 0
    original = lists._Lines.next

    def counted(self: lists._Lines) -> bytes | None:
        nonlocal lines
        lines += 1
        return original(self)

    monkeypatch.setattr(lists._Lines, "next", counted)
    have = given(source.names(units[-1]))
    _, reading = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert have.ids[-1].endswith(f"{count - 1:07}.png")
    assert lines < 1100
    assert max(planning, reading) < 6 << 20  # the list has 11 MB


@settings(max_examples=150, deadline=None)
@cases(
    rows=st.lists(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=6),
            min_size=2,
            max_size=2,
        ),
        min_size=1,
        max_size=12,
    ),
    size=st.integers(1, 5),
)
def test_any_csv_is_read_in_ranges_as_in_one(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], size: int
) -> None:
    import csv

    path = tmp_path_factory.mktemp("lists") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["path", "label"], *rows])
    source = ListInput("a.csv", str(path), "/", Selection())
    have = [sample for unit in source.units(size) for sample in read(source, unit).samples]
    assert [each.columns["label"] for each in have] == [label for _, label in rows]
    assert [each.id for each in have] == [name or f"a.csv:{at}" for at, (name, _) in enumerate(rows)]
    assert Naming() == Naming("", "")
