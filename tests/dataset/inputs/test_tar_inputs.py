"""Tar shards as inputs: read once, forward, from anywhere, compressed or not, damaged or not."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import sys
import tarfile
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import example, settings
from hypothesis import given as cases
from hypothesis import strategies as st
from input_files import Given, encoded, everything, given, level, read, shard, tar_bytes

from clipfast.dataset.files import find_images
from clipfast.dataset.inputs import tars
from clipfast.dataset.inputs.locations import Naming, changed
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.inputs.tars import ShardInput
from clipfast.dataset.plan import UnitError, write_plan
from clipfast.dataset.shards import read_index

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tgz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


def of(*paths: Path | str) -> ShardInput:
    (source,) = open_inputs([str(path) for path in paths])
    assert isinstance(source, ShardInput)
    return source


def reading(path: Path | str) -> Given:
    return everything(of(path))


MEMBERS = {
    "000.png": encoded(10),
    "000.txt": b"dog\n",
    "deep/001.JPG": encoded(200, "jpeg"),
    "deep/001.json": b'{"label": "cat", "n": 3, "bad": false, "box": [1, 2], "none": null}',
    "deep/001.cls": b"7",
}


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_members_are_samples_in_any_compression(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(COMPRESSIONS[ending](tar_bytes(MEMBERS)))
    have = reading(path)
    assert have.error is None
    assert have.ids == [f"{path}:000.png", f"{path}:deep/001.jpg"]
    assert [(sample.member, sample.key, sample.path) for sample in have.samples] == [
        ("000.png", "000", str(path)),
        ("deep/001.jpg", "deep/001", str(path)),
    ]
    assert level(have.samples[0]) == 10
    assert abs(level(have.samples[1]) - 200) <= 2
    assert have.samples[0].columns == {"txt": "dog"}
    assert have.samples[1].columns == {
        "label": "cat",
        "n": "3",
        "bad": "false",
        "box": None,
        "none": None,
        "cls": "7",
    }
    status = path.stat()
    assert {(sample.size, sample.modified_ns) for sample in have.samples} == {(status.st_size, status.st_mtime_ns)}
    assert have.reading.source() == {
        "path": str(path),
        "size": status.st_size,
        "version": str(status.st_mtime_ns),
        "checksum": xxhash.xxh3_128_hexdigest(path.read_bytes()),
    }


def test_the_content_decides_on_the_compression(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_bytes(MEMBERS)))
    (tmp_path / "b.tar.gz").write_bytes(tar_bytes(MEMBERS))
    have = everything(of(tmp_path / "a.tar", tmp_path / "b.tar.gz"))
    assert have.error is None
    assert len(have.good) == 4


def test_units_of_shards_have_size_and_version_and_go_through_a_plan(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"s-{number}.tar", {f"{number}.png": encoded(number)})
    source = pickle.loads(pickle.dumps(of(f"{tmp_path}/s-{{0..3}}.tar")))
    plan = write_plan(tmp_path, [source], 10)
    units = list(plan.units())
    assert [Path(unit.path).name for unit in units] == [f"s-{number}.tar" for number in range(4)]
    status = (tmp_path / "s-1.tar").stat()
    assert (units[1].size, units[1].version) == (status.st_size, str(status.st_mtime_ns))
    assert (units[3].size, units[3].version) == (None, None)
    assert [read(source, unit).ids for unit in units[:2]] == [[f"{tmp_path}/s-{n}.tar:{n}.png"] for n in range(2)]
    error = read(source, units[3]).error
    assert error is not None
    assert (error.kind, str(error)) == ("missing", f"{tmp_path}/s-3.tar: no such file")


def test_a_shard_that_was_changed_after_planning_is_noticed(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", MEMBERS)
    (unit,) = of(path).units(1)
    assert changed(unit) is None
    os.utime(path, ns=(0, 1))
    assert "another time of modification" in str(changed(unit))
    shard(path, {**MEMBERS, "z.npy": bytes(10240)})
    assert f"bytes, not {unit.size}" in str(changed(unit))


@pytest.mark.parametrize("name", ["a.tar", "./a.tar", "../here/a.tar"])
def test_ids_begin_with_the_name_that_the_user_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    shard(tmp_path / "here" / "a.tar", {"0.png": encoded(1)})
    monkeypatch.chdir(tmp_path / "here")
    source = of(name)
    units = list(source.units(1))
    monkeypatch.chdir(tmp_path)  # a worker may have another working folder
    sample = read(source, units[0]).samples[0]
    monkeypatch.chdir(tmp_path / "here")
    if name.startswith(".."):
        assert sample.id in ("../here/a.tar:0.png", "a.tar:0.png")
    else:
        assert sample.id == str(find_images([Path(name)]).sources[0])
    assert sample.path == str(tmp_path / "here" / "a.tar")


# ------------------------------------------------------------------------------------------------------------- remote


def test_shards_at_urls(tmp_path: Path) -> None:
    data = tar_bytes(MEMBERS)
    zipped = gzip.compress(data)
    for name, content in (("a-0.tar", data), ("a-1.tar.gz", zipped)):
        with fsspec.open(f"memory://tars/{name}", "wb") as file:
            file.write(content)
    braces = everything(of("memory://tars/a-{0.tar,1.tar.gz}"))
    assert braces.error is None
    assert braces.ids == [
        f"memory://tars/{name}:{member}" for name in ("a-0.tar", "a-1.tar.gz") for member in ("000.png", "deep/001.jpg")
    ]
    assert braces.reading.source()["checksum"] == xxhash.xxh3_128_hexdigest(zipped)
    stars = everything(of("memory://tars/a-*.tar*"))
    assert [sample.member for sample in stars.good] == ["000.png", "deep/001.jpg"] * 2
    gone = reading("memory://tars/gone.tar")
    assert gone.error is not None
    assert (gone.error.kind, str(gone.error)) == ("missing", "memory://tars/gone.tar: no such file")
    units = list(of("memory://tars/a-0.tar").units(1))
    assert units[0].size == len(data)
    assert units[0].version
    with fsspec.open("memory://tars/a-0.tar", "wb") as file:
        file.write(data)
    assert "another version" in str(changed(units[0]))


def test_file_urls_are_local_files(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {"0.png": encoded(1)})
    os.mkfifo(tmp_path / "b.tar")
    have = everything(of(f"file://{tmp_path}/{{a,b}}.tar"))
    assert have.ids == [f"file://{tmp_path}/a.tar:0.png"]
    assert have.samples[0].path == f"{tmp_path}/a.tar"
    assert "a FIFO, not a regular file" in str(have.error)


# ------------------------------------------------------------------------------------------------------------- samples


def test_dotted_names_masks_and_endings() -> None:
    assert [tars.split_name(name) for name in ("a.png", "d.x/b.v2.PNG", "c", "./e.jpg")] == [
        ("a", "png"),
        ("d.x/b", "v2.PNG"),
        ("c", ""),
        ("e", "jpg"),
    ]


def test_members_with_dots_in_their_names_are_images_of_their_own(tmp_path: Path) -> None:
    members = {
        "img.v2.png": encoded(1),
        "img.v3.png": encoded(2),
        "img.cls": b"both",
        "img.v3.cls": b"third",
        "IMG_1.JPG.png": encoded(3),
        "1.ppm": encoded(4, "ppm"),
        "2024.01.02.png": encoded(5),
        "0.mask.png": encoded(6),
        "0.jpg": encoded(7, "jpeg"),
        "0.depth.png": encoded(8),
    }
    path = shard(tmp_path / "a.tar", members)
    have = reading(path)
    assert have.error is None
    assert [sample.key for sample in have.good] == ["img.v2", "img.v3", "IMG_1.JPG", "1", "2024.01.02", "0"]
    assert [level(sample) for sample in have.good] == [1, 2, 3, 4, 5, 7]
    assert [sample.columns.get("cls") for sample in have.good[:3]] == ["both", "third", None]
    assert have.reading.notes.lines() == [
        f"left out: images beside another image of the same sample: 1 ({path}:0.depth.png)"
    ]


def test_many_images_of_one_key_are_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``frame.0001.png``: the part before the first dot is the same for a whole shard."""
    path = shard(tmp_path / "a.tar", {f"frame.{number:04}.png": encoded(number % 256) for number in range(300)})
    expected = [f"{path}:{sample.key}.{sample.image}" for sample in read_index(path).samples]
    monkeypatch.setattr(tars, "_HELD_BYTES", 7 * len(encoded(1)))
    source = of(path)
    (unit,) = source.units(1)
    held = 0
    original = tars._Shard._dotted

    def counted(self: tars._Shard, key: str, members: dict[str, tars._Member], images: list[str]) -> object:
        nonlocal held
        held = max(held, len(members))
        return original(self, key, members, images)

    monkeypatch.setattr(tars._Shard, "_dotted", counted)
    have = read(source, unit)
    assert have.ids == expected
    assert [level(sample) for sample in have.good] == [number % 256 for number in range(300)]
    assert held <= 8
    assert not have.reading.notes.lines()


def test_what_is_not_read_is_given_as_a_failure_or_noted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("a.png", encoded(1)),
            ("a.png", encoded(2)),
            ("b.jpg", encoded(3)),
            ("b.png", encoded(4)),
            ("c.PNG", encoded(5)),
            ("c.png", encoded(6)),
            ("e.txt", b"no image"),
            ("f.png", encoded(7)),
            ("f.cls", b"1"),
            ("f.cls", b"2"),
            ("a.cls", b"late"),
        ):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
        for name in ("d.png", "f.txt"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, "a.png"
            tar.addfile(link)
    have = reading(path)
    assert have.error is None
    assert [level(sample) for sample in have.good] == [1, 3, 5, 7]
    failures = [(sample.id, str(sample.failure.status)) for sample in have.samples if sample.failure is not None]
    assert sorted(failures) == [
        (f"{path}:a", "no_image"),
        (f"{path}:a.png", "duplicate"),
        (f"{path}:c.png", "duplicate"),
        (f"{path}:d.png", "unreadable"),
        (f"{path}:e", "no_image"),
    ]
    assert sorted(have.reading.notes.lines()) == [
        f"left out: images beside another image of the same sample: 1 ({path}:b.png)",
        f"left out: samples whose members lie apart (sort the archive by name): 1 ({path}:a)",
        f"left out: tar members that are no regular files: 1 ({path}:f.txt)",
        f"left out: tar members whose name occurs again (the first is read): 1 ({path}:f.cls)",
    ]
    assert have.good[-1].columns == {"cls": "1"}


def test_an_image_that_comes_back_is_a_duplicate(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [("a.png", encoded(1)), ("b.png", encoded(2)), ("a.png", encoded(3))])
    have = reading(path)
    assert [level(sample) for sample in have.good] == [1, 2]
    assert have.failures == {f"{path}:a.png": "duplicate"}


def test_problems_of_sidecars_do_not_lose_the_image(tmp_path: Path) -> None:
    members = {}
    for number, text in enumerate((b"{", b"[1]", b"\xff", b'{"label": "\\ud800", "x": "y"}', b"[" * 100_000)):
        members |= {f"{number}.png": encoded(number), f"{number}.json": text, f"{number}.cls": b"k"}
    path = shard(tmp_path / "a.tar", members)
    have = reading(path)
    assert [level(sample) for sample in have.good] == [0, 1, 2, 3, 4]
    assert [dict(sample.columns) for sample in have.good] == [
        {"cls": "k"},
        {"cls": "k"},
        {"cls": "k"},
        {"cls": "k", "label": None, "x": "y"},
        {"cls": "k"},
    ]
    assert have.reading.notes.counts == {
        ".json members that are not JSON": 2,
        ".json members that are no object with columns as keys": 1,
        ".json members that are not UTF-8 text": 1,
    }


def test_members_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_IMAGE_BYTES", 1000)
    monkeypatch.setattr(tars, "MAX_SIDECAR_BYTES", 10)
    members = {"0.png": bytes(1001), "1.png": encoded(1), "1.txt": b"x" * 11, "2.png": encoded(2)}
    path = shard(tmp_path / "a.tar", members)
    have = reading(path)
    assert have.error is None
    assert [sample.key for sample in have.good] == ["1", "2"]
    assert have.failures == {f"{path}:0.png": "too_large"}
    assert have.reading.notes.lines() == [f"left out: sidecars of more than 16 MiB: 1 ({path}:1.txt)"]


# ---------------------------------------------------------------------------------------------- the same keys as before

PARTS = st.sampled_from(["a", "b", "0", "img", "A", "ü", "\udcff", "x y", "__", "-", "mask"])
ENDINGS = st.sampled_from(
    ["png", "jpg", "PNG", "v2.png", "v3.JPG", "mask.png", "seg.PNG", "cls", "txt", "json", "v2.cls", "npy", "", "tar"]
)
NAMES = st.builds(
    lambda folder, stem, ending: f"{folder}{stem}{'.' if ending else ''}{ending}",
    st.sampled_from(["", "d/", "./", "d/e.f/", "d//", ".h/"]),
    st.builds("".join, st.lists(PARTS, min_size=1, max_size=2)),
    ENDINGS,
)


@settings(max_examples=300, deadline=None)
@cases(names=st.lists(NAMES, max_size=12), form=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
@example(names=["img.v2.png", "img.png", "img.v3.png"], form=tarfile.GNU_FORMAT)
@example(names=["x.mask.png", "x.v2.PNG", "x.V2.png"], form=tarfile.GNU_FORMAT)
def test_random_members_have_the_keys_of_the_index(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], form: int
) -> None:
    """For members whose samples lie together, the stream gives what a pass over all headers gives."""
    together = sorted(dict.fromkeys(names), key=lambda name: tars.split_name(name)[0])
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    path.write_bytes(tar_bytes(((name, encoded(at)) for at, name in enumerate(together)), form))
    index = read_index(path)
    expected = [(each.key, each.image) for each in index.samples if each.image is not None]
    source = ShardInput("a", (str(path),), Naming())
    (unit,) = source.units(1)
    for have in (read(source, unit), given(source.names(unit))):
        assert have.error is None
        assert [(each.key, each.member.rpartition(".")[2]) for each in have.good] == expected
        assert have.ids == [str(each) for each in find_images([path]).sources]
        without = [each.key for each in index.samples if each.image is None]
        assert [each.key for each in have.samples if each.failure and each.failure.status == "no_image"] == without
    assert all(sample.content is None for sample in have.samples)


# ------------------------------------------------------------------------------------------------------ damaged shards


@pytest.mark.parametrize("cut", [512 * 6 + 100, 512 * 6, 512 * 7 + 5, 512 * 5 + 300])
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_whole_samples_of_a_shard_that_is_cut_count(tmp_path: Path, cut: int, ending: str) -> None:
    """Cut in the fourth header, between two members, in the fourth member, and in the third one's padding."""
    path = tmp_path / f"a.{ending}"
    path.write_bytes(COMPRESSIONS[ending](tar_bytes({f"{i}.png": encoded(i) for i in range(5)})[:cut]))
    have = reading(path)
    assert [sample.key for sample in have.good] == ["0", "1", "2"]
    assert have.error is not None
    assert have.error.kind == "damaged"
    assert "not a whole tar file after 3 samples" in str(have.error)
    assert not have.reading.source()


@pytest.mark.parametrize("ending", ["tar.gz", "tar.bz2", "tar.xz", "tar.zst"])
def test_compressed_data_that_are_cut(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    path = tmp_path / f"a.{ending}"
    data = COMPRESSIONS[ending](tar_bytes({"0.png": encoded(1), "1.png": encoded(2), "2.bin": noise}))
    path.write_bytes(data[: len(data) // 2])
    have = reading(path)
    assert {sample.key for sample in have.good} <= {"0", "1"}
    assert have.error is not None
    assert have.error.kind == "damaged"


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (b"", "damaged", "not a whole tar file after 0 samples: empty file (is it a tar file?)"),
        (b"x" * 600, "damaged", "(is it a tar file?)"),
        (None, "missing", "no such file"),
    ],
)
def test_files_that_are_no_shards_are_reported(tmp_path: Path, data: bytes | None, kind: str, message: str) -> None:
    path = tmp_path / "a.tar"
    if data is not None:
        path.write_bytes(data)
    have = reading(path)
    assert not have.samples
    assert have.error is not None
    assert have.error.kind == kind
    assert str(have.error).startswith(f"{path}: ")
    assert message in str(have.error)


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs and devices as POSIX has them")
def test_special_files_are_reported_and_never_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.tar")
    (tmp_path / "zero.tar").symlink_to("/dev/zero")
    (tmp_path / "self.tar").symlink_to("self.tar")
    outcomes: list[Given] = []

    def run() -> None:
        outcomes.extend(reading(tmp_path / f"{name}.tar") for name in ("fifo", "zero", "self"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30.0)
    assert len(outcomes) == 3, "a reading waits"
    for have, reason in zip(outcomes, ("a FIFO, not", "a device, not", "Too many levels"), strict=True):
        assert have.error is not None
        assert have.error.kind == "unreadable"
        assert reason in str(have.error)


@pytest.mark.parametrize("claimed", [10**12, 1 << 42, 1 << 62, (1 << 63) + 5, -5])
@pytest.mark.parametrize(
    "kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE, tarfile.SYMTYPE]
)
@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_members_that_claim_more_than_the_shard_holds(tmp_path: Path, claimed: int, kind: bytes, ending: str) -> None:
    whole = tar_bytes({"0.png": encoded(9)})
    header = tarfile.TarInfo("1.png")
    header.size, header.type, header.linkname = claimed, kind, "x"
    path = tmp_path / f"a.{ending}"
    path.write_bytes(COMPRESSIONS[ending](whole[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    tracemalloc.start()
    have = reading(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20
    assert [sample.key for sample in have.good] == ["0"]
    assert level(have.good[0]) == 9
    if kind != tarfile.SYMTYPE or claimed < 0:
        assert have.error is not None
        assert "not a whole tar file after 1 samples" in str(have.error)


def test_a_sample_with_a_cut_member_is_left_out(tmp_path: Path) -> None:
    members = {"0.png": encoded(1), "0.json": b"{}", "1.png": encoded(2), "1.json": b'{"label": "' + b"x" * 900 + b'"}'}
    path = shard(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: 7 * 512 + 512 + 100])
    have = reading(path)
    assert [sample.key for sample in have.samples] == ["0"]
    assert str(have.error) == (
        f"{path}: not a whole tar file after 1 samples: the file ends in the member 1.json, which claims 913 bytes"
    )


def test_several_archives_in_one_file_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes({"0.png": encoded(1)}) + tar_bytes({"1.png": encoded(2)}))
    have = reading(path)
    assert [sample.key for sample in have.good] == ["0"]
    assert "are there several archives in it?" in str(have.error)


def test_many_long_name_headers_in_a_row_are_reported_as_damage(tmp_path: Path) -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.size, header.type = 4, tarfile.GNUTYPE_LONGNAME
    block = header.tobuf(tarfile.GNU_FORMAT) + b"abc".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(block * 3000)
    have = reading(tmp_path / "a.tar")
    assert not have.samples
    assert "not a whole tar file" in str(have.error)


def test_a_file_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5 << 20, dtype=np.uint8).tobytes()
    path = shard(tmp_path / "a.tar", {"0.png": encoded(1), "1.bin": noise, "2.png": encoded(2)})

    class Failing:
        def __init__(self) -> None:
            self.file, self.count = path.open("rb"), 0

        def read(self, size: int) -> bytes:
            self.count += size
            if self.count > 3 << 20:
                raise OSError(5, "Input/output error")
            return self.file.read(size)

        def close(self) -> None:
            self.file.close()

    monkeypatch.setattr(tars, "open_unit", lambda *_: Failing())
    have = reading(path)
    assert [sample.key for sample in have.good] == ["0"]
    assert have.error is not None
    assert (have.error.kind, str(have.error)) == ("unreadable", f"{path}: Input/output error, after 1 samples")


def test_damaged_shards_are_read_or_reported_but_raise_nothing_else(tmp_path: Path) -> None:
    """600 copies with a few bytes changed or their end cut, the same ones in every run."""
    rng = np.random.default_rng(2)
    members = {f"{n}.png": encoded(n) for n in range(4)} | {"ü" * 90 + ".png": encoded(9)}
    data = tar_bytes(members)
    reported = 0
    for number in range(600):
        damaged = bytearray(data if number < 300 else gzip.compress(data, mtime=0))
        for place in rng.integers(0, min(len(damaged), 512 * 12), rng.integers(1, 6)):
            damaged[place] = rng.integers(0, 256)
        path = tmp_path / "a.tar"
        path.write_bytes(damaged[: None if number % 2 else rng.integers(1, len(damaged))])
        have = reading(path)
        reported += have.error is not None
    assert reported > 300


def test_a_reading_can_be_closed_early(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {f"{n}.png": encoded(n) for n in range(9)})
    source = of(path)
    (unit,) = source.units(1)
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    opened = source.read(unit)
    assert next(opened).key == "0"
    opened.close()
    assert next(opened, None) is None
    if open_files:
        assert len(os.listdir("/proc/self/fd")) == open_files


def test_unit_errors_are_one_line(tmp_path: Path) -> None:
    have = reading(tmp_path / "a\nb.tar")
    assert isinstance(have.error, UnitError)
    assert str(have.error) == f"{tmp_path}/a\\nb.tar: no such file"
