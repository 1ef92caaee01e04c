"""Folder trees and image files as inputs: what is found, in which order, under which name, and what is left out."""

import os
import pickle
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import fsspec
import numpy as np
import pytest
from input_files import encoded, everything, given, level, picture, read, shard
from PIL import Image

from clipfast.dataset.files import find_images
from clipfast.dataset.inputs import folders
from clipfast.dataset.inputs.files import FileInput
from clipfast.dataset.inputs.folders import FolderInput
from clipfast.dataset.inputs.locations import fetch
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.inputs.tars import ShardInput
from clipfast.dataset.plan import Input, write_plan
from clipfast.dataset.samples import Sample
from clipfast.errors import ImageError, InputError


def tree(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".tar"):
            shard(path, {f"{number}.png": encoded(number)})
        else:
            path.write_bytes(encoded(number))
    return folder


def samples(inputs: list[Input], size: int = 3) -> list[Sample]:
    return [sample for each in inputs for unit in each.units(size) for sample in each.read(unit)]


def one(*names: Path | str, **options: Path) -> FolderInput:
    (source,) = open_inputs(list(names), **options)
    assert isinstance(source, FolderInput)
    return source


def test_a_tree_is_walked_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(
        tmp_path / "in",
        "b.png",
        "a.PNG",
        "z/1.png",
        "z/0.jpeg",
        "c/d/e.tar",
        "c/x.png",
        "m.tar",
        ".hid/a.png",
        "c/.h.png",
    )
    monkeypatch.chdir(tmp_path)
    for name in ("in", "./in/", str(tmp_path / "in"), "."):
        have = samples(open_inputs([name]))
        assert sorted(each.id for each in have) == sorted(str(each) for each in find_images([Path(name)]).sources)
        assert {each.folder for each in have} == {str(tmp_path if name == "." else tmp_path / "in")}
        assert all(each.failure is None for each in have)
    order = [each.id for each in samples(open_inputs(["in"]), 2)]
    assert order == [
        "in/a.PNG",
        "in/b.png",
        "in/m.tar:6.png",
        "in/c/d/e.tar:4.png",
        "in/c/x.png",
        "in/z/0.jpeg",
        "in/z/1.png",
    ]


def test_a_folder_may_be_named_by_a_file_url(tmp_path: Path) -> None:
    tree(tmp_path, "a.png", "d/b.tar")
    have = everything(one(f"file://{tmp_path}"))
    assert {each.id: level(each) for each in have.good} == {
        f"file://{tmp_path}/a.png": 0,
        f"file://{tmp_path}/d/b.tar:1.png": 1,
    }


def test_units_are_ranges_and_shards(tmp_path: Path) -> None:
    tree(tmp_path / "in", *(f"{n}.png" for n in range(7)), "d/8.png", "d/x.tar")
    source = pickle.loads(pickle.dumps(one(tmp_path / "in")))
    plan = write_plan(tmp_path, [source], 3)
    units = list(plan.units())
    assert [(unit.kind, unit.start, unit.stop, len(unit.files)) for unit in units] == [
        ("files", 0, 3, 3),
        ("files", 3, 6, 3),
        ("shard", 0, 0, 0),
        ("files", 6, 8, 2),
    ]
    assert {(unit.folder) for unit in units} == {str(tmp_path / "in")}
    have = [sample for unit in units for sample in read(source, unit).samples]
    assert len({sample.id for sample in have}) == 9
    files = [sample for sample in have if not sample.member]
    assert all(sample.content is None and Path(sample.path).is_file() for sample in files)
    assert [sample.size for sample in files] == [Path(sample.path).stat().st_size for sample in files]
    assert [sample.modified_ns for sample in files] == [Path(sample.path).stat().st_mtime_ns for sample in files]
    names = [sample for unit in units for sample in given(source.names(unit)).samples]
    assert [(each.id, each.content) for each in names] == [(each.id, None) for each in have]
    assert plan.digest == write_plan(tmp_path, [source], 3).digest


NAMES = [
    "a\u2028b.jpg",
    "a\x85b.jpg",
    "a\nb.jpg",
    "-x.jpg",
    "x" * 246 + ".jpg",
    "\udcff\udcfe.jpg",
    " .jpg",
    "größe.jpg",
]


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names that this system's files cannot have")
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_files_of_any_name_are_found_and_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(encoded(7))
    (tmp_path / "in" / "plain.jpg").write_bytes(encoded(8))
    source = one(tmp_path / "in")
    plan = write_plan(tmp_path, [source], 10)
    have = read(source, plan.unit(0)).samples
    assert sorted(map(level, have)) == [7, 8]
    assert {each.id for each in have} == {f"{tmp_path}/in/{name}", f"{tmp_path}/in/plain.jpg"}


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    tree(tmp_path, "a.png", "out/b.png", "sub/c.png")
    for number in range(5):
        (tmp_path / f"raw{number}.nef").write_bytes(b"raw")
    (tmp_path / ".hidden.nef").write_bytes(b"")
    (tmp_path / "link").symlink_to("sub")
    (tmp_path / "loop").symlink_to(".")
    (tmp_path / "result.png").symlink_to("out/b.png")
    source = one(tmp_path, skip=tmp_path / "out")
    for _ in range(2):  # listing again counts again from the start
        have = everything(source)
        assert have.ids == [f"{tmp_path}/a.png", f"{tmp_path}/sub/c.png"]
        names = ", ".join(f"{tmp_path}/raw{number}.nef" for number in range(3))
        assert source.notes() == [
            f"left out: links to folders: 2 ({tmp_path}/link, {tmp_path}/loop)",
            f"left out: files with other endings than images and shards have: 5 ({names}, …)",
        ]
        assert not source.problems()


def test_folders_without_images_and_folders_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    source = one(tmp_path / "empty")
    assert list(source.units(3)) == []
    assert source.problems()[0].startswith(f"{tmp_path}/empty: no images in this folder (looked for .apng .arrow .avif")
    with pytest.raises(InputError, match="no images in"):
        write_plan(tmp_path, [source], 3)
    tree(tmp_path / "some", "a.png", "secret/b.png")
    scandir = os.scandir

    def refusing(path: str) -> Iterator[os.DirEntry[str]]:
        if path.endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", refusing)
    source = one(tmp_path / "some")
    assert everything(source).ids == [f"{tmp_path}/some/a.png"]
    assert source.problems() == [f"{tmp_path}/some/secret: Permission denied"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs and devices as POSIX has them")
def test_special_files_and_links_never_wait(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "plain.png")
    for name in ("fifo.jpg", "fifo.tar"):
        os.mkfifo(tmp_path / name)
    for name, target in {"self.jpg": "self.jpg", "gone.jpg": "nowhere", "zero.jpg": "/dev/zero"}.items():
        (tmp_path / name).symlink_to(target)
    done: list[list[str]] = []

    def run() -> None:
        have = everything(one(tmp_path))
        done.append([*have.ids, str(have.error)])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30.0)
    assert done, "a search waits"
    assert done[0] == [
        *(f"{tmp_path}/{name}" for name in ("fifo.jpg", "gone.jpg", "plain.png", "self.jpg", "zero.jpg")),
        f"{tmp_path}/fifo.tar: a FIFO, not a regular file",
    ]


def test_memory_of_the_walk_is_that_of_one_folder(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        top = tmp_path / str(count)
        for number in range(count):
            folder = top / f"{number // 10:02}" / f"{number % 10}"
            folder.mkdir(parents=True)
            for name in range(200):
                (folder / f"{name:060}.png").touch()
        source = one(top)
        tracemalloc.start()
        assert sum(len(unit.files) for unit in source.units(50)) == 200 * count
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    assert peak(100) < 1.3 * peak(10)


# ------------------------------------------------------------------------------------------------------- named things


def test_what_is_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "p/a.png", "p/q/b.png", "p/q/c.png", "p/.h/d.png", "e.png", "s.tar")
    monkeypatch.chdir(tmp_path)
    every = {"p/a.png", "p/q/b.png", "p/q/c.png"}

    def ids(*names: str) -> list[str]:
        return [each.id for each in samples(open_inputs(names))]

    assert ids("e.png", "./e.png", str(tmp_path / "e.png"), "s.tar", "s.tar") == ["e.png", "s.tar:5.png"]
    for names in (
        ("p", "p/q"),
        ("p/q", "p"),
        ("p", "p/a.png"),
        ("p/a.png", "p"),
        ("p/q/b.png", "p/q", "p"),
        ("p", "p"),
    ):
        have = ids(*names)
        assert len(have) == 3
        assert set(have) == every
    assert set(ids("p", "p/.h")) == every | {"p/.h/d.png"}
    assert set(ids("p/.h/d.png", "p")) == every | {"p/.h/d.png"}
    (tmp_path / "p" / "link").symlink_to("q")
    assert len(ids("p", "p/link")) == 5


def test_names_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a.png", "b.jpg", "s-0.tar", "s-1.tar", "f/c.png", "odd{1,2}.png", "photo")
    monkeypatch.chdir(tmp_path)
    kinds = [type(each) for each in open_inputs(["a.png", "b.jpg", "s-{0..1}.tar", "f", "photo"])]
    assert kinds == [FileInput, ShardInput, FolderInput, FileInput]
    inputs = open_inputs(["[ab].*g", "s-*.tar", "odd{1,2}.png", "**/c.png"])
    assert [each.name for each in inputs] == ["[ab].*g", "s-*.tar", "odd{1,2}.png, **/c.png"]
    assert [each.id for each in samples(inputs)] == [
        "a.png",
        "b.jpg",
        "s-0.tar:2.png",
        "s-1.tar:3.png",
        "odd{1,2}.png",
        "f/c.png",
    ]
    assert samples(open_inputs(["gone.png"]))[0].id == "gone.png"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phtos", "phtos: no such file or folder"),
        ("notes.docx", "notes.docx: no input by its name: give image files, folders, tar shards, tables"),
        ("s-{0..3.tar", "s-{0..3.tar: a brace without its other one"),
        ("*.tar", "*.tar: no file has such a name"),
        ("", "an input without a name"),
        ("xyz://a/b.tar", "xyz://a/b.tar: fsspec cannot open it (Protocol not known: xyz)"),
        pytest.param(
            "s3://a/b.tar",
            "s3://a/b.tar: fsspec cannot open it (Install s3fs to access S3)",
            marks=pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed"),
        ),
        ("memory://nowhere/*.tar", "memory://nowhere/*.tar: no file has such a name"),
        ("memory://nowhere/", "memory://nowhere/: no input by its name"),
        ("a\nb.docx", "a\\nb.docx: no such file or folder"),
    ],
)
def test_names_that_are_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    (tmp_path / "notes.docx").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        open_inputs([name])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- remote


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_images_and_shards_over_http(tmp_path: Path, server: str) -> None:
    tree(tmp_path, "0.png", "1.png", "a.tar")
    inputs = open_inputs([f"{server}/{{0,1}}.png", f"{server}/gone.png?size=3", f"{server}/a.tar", f"{server}/b.tar"])
    have = everything(inputs[0])
    assert have.ids == [f"{server}/0.png", f"{server}/1.png"]
    assert [level(each) for each in have.good] == [0, 1]
    assert have.failures == {f"{server}/gone.png?size=3": "missing"}
    (whole, gone) = inputs[1].units(1)
    assert whole.size == (tmp_path / "a.tar").stat().st_size
    assert read(inputs[1], whole).ids == [f"{server}/a.tar:2.png"]
    assert str(read(inputs[1], gone).error) == f"{server}/b.tar: no such file"
    dead = everything(open_inputs(["http://127.0.0.1:9/a.png"])[0])
    assert dead.failures == {"http://127.0.0.1:9/a.png": "unreadable"}


def test_large_files_over_http_come_as_a_whole(tmp_path: Path, server: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.bmp")
    data = (tmp_path / "a.bmp").read_bytes()
    shard(tmp_path / "a.tar", {"0.bmp": data, "1.bmp": data})
    for name, count in (("a.bmp", 1), ("a.tar", 2)):
        have = everything(open_inputs([f"{server}/{name}"])[0])
        assert have.error is None
        assert [each.content == data for each in have.samples] == [True] * count
    with pytest.raises(ImageError, match=r"a\.bmp: more than 1000 bytes") as caught:
        fetch(f"{server}/a.bmp", 1000)
    assert caught.value.status == "too_large"


def test_many_remote_images_keep_their_order() -> None:
    for number in range(100):
        with fsspec.open(f"memory://many/{number:03}.png", "wb") as file:
            file.write(encoded(number))
    (source,) = open_inputs(["memory://many/*.png"])
    have = everything(source, 1000)
    assert [level(each) for each in have.good] == list(range(100))
    assert have.ids == [f"memory:///many/{number:03}.png" for number in range(100)] or have.ids == [
        f"memory://many/{number:03}.png" for number in range(100)
    ]
