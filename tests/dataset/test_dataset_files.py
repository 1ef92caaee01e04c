"""Images in folders and tar shards: finding, naming, identifying, opening and reporting them."""

import io
import os
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from builders import ROOT
from PIL import Image

from clipfast.dataset.files import Identity, Listing, Source, find_images, found_again
from clipfast.dataset.shards import read_sidecars
from clipfast.errors import ImageError


def picture(level: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (level, level, level))


def encoded(level: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    picture(level).save(file, kind)
    return file.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def test_members_of_a_shard_are_opened(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        {"000.png": encoded(10), "000.txt": b"dog", "deep/001.JPG": encoded(200, "jpeg"), "002.txt": b"no image"},
    )
    sources, errors, _ = find_images([path])
    assert not errors
    assert [str(source) for source in sources] == [f"{path}:000.png", f"{path}:deep/001.jpg"]
    assert [source.name for source in sources] == ["a__000", "a__deep__001"]
    assert np.asarray(sources[0].open()).tolist() == np.asarray(picture(10)).tolist()
    assert abs(int(np.asarray(sources[1].open()).mean()) - 200) <= 2


def test_folders_are_searched_for_files_and_shards(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    picture(1).save(tmp_path / "cats" / "one.png")
    shard(tmp_path / "more.tar", {"two.png": encoded(2)})
    sources, errors, _ = find_images([tmp_path])
    assert not errors
    assert [source.name for source in sources] == ["more__two", "cats__one"]
    assert all(source.folder == tmp_path for source in sources)


@pytest.mark.parametrize("cut", [512 * 6 + 100, 512 * 6, 512 * 7 + 5])
def test_whole_samples_of_a_shard_that_is_cut_are_read(tmp_path: Path, cut: int) -> None:
    """Cut in the fourth header, between two members, and in the fourth member."""
    path = shard(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(5)})
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])  # a header and a block each
    sources, errors, _ = find_images([path])
    assert [source.key for source in sources][:3] == ["0", "1", "2"]
    assert [source.open().size for source in sources[:3]] == [(8, 6)] * 3
    assert len(errors) == 1
    assert "not a whole tar file" in str(errors[0].error)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "not a whole tar file"), (b"x" * 600, "only uncompressed tar files"), (None, "no such file")],
)
def test_files_that_are_no_shards_are_reported(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "a.tar"
    if data is not None:
        path.write_bytes(data)
    sources, errors, _ = find_images([path])
    assert not sources
    assert message in str(errors[0].error)


def test_a_shard_without_images_is_reported(tmp_path: Path) -> None:
    _, errors, _ = find_images([shard(tmp_path / "a.tar", {"0.txt": b"dog"})])
    assert "no images in this shard" in str(errors[0].error)


def test_a_damaged_member_is_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(file, "png")
    path = shard(tmp_path / "a.tar", {"0.png": file.getvalue()[:2000], "1.jpg": b"<html>"})
    sources, _, _ = find_images([path])
    with pytest.raises(ImageError, match=r"a\.tar:0\.png: damaged or truncated"):
        sources[0].open()
    with pytest.raises(ImageError, match=r"a\.tar:1\.jpg: an HTML page"):
        sources[1].open()


# ------------------------------------------------------------------------------------------------------------ identity


def test_an_image_is_identified_by_its_path_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "images").mkdir(parents=True)
        picture(1).save(tmp_path / folder / "images" / "0.png")
    identities = []
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path / folder)
        identities.append(find_images([Path("images")]).sources[0].identity())
    assert identities[0] != identities[1]
    file = tmp_path / "b" / "images" / "0.png"
    assert identities[1] == Identity(str(file), "", file.stat().st_size, file.stat().st_mtime_ns)
    source = find_images([file]).sources[0]
    assert source.identity() == identities[1]
    os.utime(file, ns=(0, 1_700_000_000_000_000_000))
    assert source.identity() == identities[1]._replace(modified_ns=1_700_000_000_000_000_000)
    file.unlink()
    assert source.identity() == Identity(str(file), "", None, None)


def test_members_of_a_shard_are_identified_by_shard_and_name(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"0.png": encoded(1), "d/1.v2.png": encoded(2)})
    identities = [source.identity() for source in find_images([path]).sources]
    assert [identity.member for identity in identities] == ["0.png", "d/1.v2.png"]
    assert {identity.path for identity in identities} == {str(path)}
    assert {identity.size for identity in identities} == {path.stat().st_size}


# --------------------------------------------------------------------------------------------------------------- names

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
    name += ".jpg"
    (tmp_path / name).write_bytes(encoded(7))
    (tmp_path / "plain.jpg").write_bytes(encoded(8))
    sources, errors, notes = find_images([tmp_path])
    assert not errors
    assert not notes
    assert {source.path.name for source in sources} == {name, "plain.jpg"}
    assert sorted(int(np.asarray(source.open()).max()) for source in sources) == [7, 8]
    for source in sources:
        assert source.name.isprintable()
        (tmp_path / f"{source.name}.json").write_text("a result of this name can be written")


@pytest.mark.parametrize(
    "name", ["a\nb.png", "\udcff.png", "größe.png", "-x.png", "d/" + "x" * 200 + ".png"], ids=ascii
)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_members_of_any_name_are_found_and_read(tmp_path: Path, name: str, form: int) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=form, errors="surrogateescape") as tar:
        header = tarfile.TarInfo(f"{name}.png")
        header.size = len(encoded(7))
        tar.addfile(header, io.BytesIO(encoded(7)))
    (source,), errors, _ = find_images([tmp_path / "a.tar"])
    assert not errors
    assert int(np.asarray(source.open()).max()) == 7
    assert source.name.isprintable()


# ------------------------------------------------------------------------------------------------- special files, links


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs and devices as POSIX has them")
def test_special_files_and_links_are_reported_and_never_wait(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "plain.png")
    for name in ("fifo.jpg", "fifo.tar"):
        os.mkfifo(tmp_path / name)
    links = {
        "loop": ".",
        "self.jpg": "self.jpg",
        "gone.jpg": "nowhere",
        "zero.jpg": "/dev/zero",
        "zero.tar": "/dev/zero",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    listings: list[Listing] = []
    thread = threading.Thread(target=lambda: listings.append(find_images([tmp_path])), daemon=True)
    thread.start()
    thread.join(30.0)
    assert listings, "finding images waits"
    sources, errors, notes = listings[0]
    reasons = [str(each.error).removeprefix(f"{tmp_path}/") for each in errors]
    assert reasons == ["fifo.tar: a FIFO, not a regular file", "zero.tar: a device, not a regular file"]
    assert notes == [f"left out: links to folders: 1 ({tmp_path}/loop)"]
    messages = {}
    for source in sources:
        try:
            source.open()
        except ImageError as error:
            messages[source.path.name] = str(error).removeprefix(f"{tmp_path}/{source.path.name}: ")
    assert len(sources) == 5
    assert messages.pop("self.jpg").startswith("Too many levels of symbolic links")
    assert messages == {
        "fifo.jpg": "a FIFO, not a regular file",
        "gone.jpg": "no such file",
        "zero.jpg": "a device, not a regular file",
    }


# ------------------------------------------------------------------------------------------------------ left-out files


def test_files_with_other_endings_are_counted_and_named(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    for number in range(5):
        (tmp_path / f"raw{number}.nef").write_bytes(b"raw")
    (tmp_path / ".hidden.nef").write_bytes(b"")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "result.json").write_bytes(b"")
    sources, errors, notes = find_images([tmp_path], skip=tmp_path / "out")
    assert len(sources) == 1
    assert not errors
    names = ", ".join(f"{tmp_path}/raw{number}.nef" for number in range(3))
    assert notes == [f"left out: files with other endings than images and shards have: 5 ({names}, …)"]


def test_members_with_dots_in_their_names_are_images_of_their_own(tmp_path: Path) -> None:
    members = {
        "img.v2.png": encoded(1),
        "img.v3.png": encoded(2),
        "img.cls": b"both",
        "img.v3.cls": b"third",
        "IMG_1.JPG.png": encoded(3),
        "1.ppm": encoded(4, "ppm"),
        "2024.01.02.png": encoded(5),
    }
    sources, errors, notes = find_images([shard(tmp_path / "a.tar", members)])
    assert not errors
    assert not notes
    assert [source.key for source in sources] == ["img.v2", "img.v3", "IMG_1.JPG", "1", "2024.01.02"]
    assert [int(np.asarray(source.open()).max()) for source in sources] == [1, 2, 3, 4, 5]
    texts = [read_sidecars(source.path, source.members).get("cls") for source in sources]
    assert texts == ["both", "third", None, None, None]
    places = [Source(source.path, source.name, source.folder, source.key) for source in sources]
    assert found_again(places) == sources


def test_masks_in_shards_are_not_taken_as_images(tmp_path: Path) -> None:
    members = {"0.jpg": encoded(1, "jpeg"), "0.mask.png": encoded(2), "1.seg.png": encoded(3), "2.mask.png": encoded(3)}
    sources, _, notes = find_images([shard(tmp_path / "a.tar", members)])
    assert [source.key for source in sources] == ["0"]
    assert notes == [f"left out: samples without an image: 2 ({tmp_path}/a.tar:1, {tmp_path}/a.tar:2)"]


def test_members_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, level in (("a.png", 1), ("a.png", 2), ("b.jpg", 3), ("b.png", 4), ("c.PNG", 5), ("c.png", 6)):
            header = tarfile.TarInfo(name)
            header.size = len(encoded(level))
            tar.addfile(header, io.BytesIO(encoded(level)))
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
    sources, errors, notes = find_images([path])
    assert not errors
    assert [int(np.asarray(source.open()).max()) for source in sources] == [2, 3, 6]
    assert notes == [
        f"left out: tar members whose name occurs again (the last is read): 2 ({path}:a.png, {path}:c.png)",
        f"left out: tar members that are no regular files: 1 ({path}:d.png)",
        f"left out: images beside another image of the same sample: 1 ({path}:b.png)",
    ]


# ------------------------------------------------------------------------------------------------------ damaged shards


@pytest.mark.parametrize("claimed", [10**12, 1 << 42, 1 << 62, (1 << 63) + 5, -5])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_members_that_claim_more_than_the_shard_holds(tmp_path: Path, claimed: int, kind: bytes) -> None:
    """Their size is compared with the shard's before anything of that size is allocated."""
    path = shard(tmp_path / "a.tar", {"0.png": encoded(9)})
    whole = path.read_bytes()
    header = tarfile.TarInfo("1.png")
    header.size, header.type = claimed, kind
    path.write_bytes(whole[:1024] + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    sources, errors, _ = find_images([path])
    assert [source.key for source in sources] == ["0"]
    assert int(np.asarray(sources[0].open()).max()) == 9
    assert "not a whole tar file after 1 samples" in str(errors[0].error)


def test_a_shard_that_shrinks_after_it_was_listed(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"0.png": encoded(1), "1.png": encoded(2)})
    sources = find_images([path]).sources
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ImageError, match="the file ends in the middle of a member"):
        sources[1].open()


def test_a_sample_with_a_cut_member_is_left_out(tmp_path: Path) -> None:
    members = {"0.png": encoded(1), "0.json": b"{}", "1.png": encoded(2), "1.json": b'{"label": "' + b"x" * 900 + b'"}'}
    path = shard(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: 7 * 512 + 512 + 100])
    sources, errors, _ = find_images([path])
    assert [source.key for source in sources] == ["0"]
    assert str(errors[0].error) == (
        f"{path}: not a whole tar file after 1 samples: the file ends in the member 1.json, which claims 913 bytes"
    )


def test_many_long_name_headers_in_a_row_are_reported_as_damage(tmp_path: Path) -> None:
    """tarfile reads such headers recursively."""
    header = tarfile.TarInfo("././@LongLink")
    header.size, header.type = 4, tarfile.GNUTYPE_LONGNAME
    block = header.tobuf(tarfile.GNU_FORMAT) + b"abc".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(block * 3000)
    sources, errors, _ = find_images([tmp_path / "a.tar"])
    assert not sources
    assert "not a whole tar file" in str(errors[0].error)


def test_damaged_shards_are_read_or_reported_but_raise_nothing_else(tmp_path: Path) -> None:
    """300 copies with a few bytes changed or their end cut, the same ones in every run."""
    rng = np.random.default_rng(2)
    whole = shard(tmp_path / "whole.tar", {f"{n}.png": encoded(n) for n in range(4)} | {"ü" * 90 + ".png": encoded(9)})
    data = whole.read_bytes()
    outcomes = set()
    for number in range(300):
        damaged = bytearray(data)
        for place in rng.integers(0, 512 * 12, rng.integers(1, 6)):
            damaged[place] = rng.integers(0, 256)
        path = tmp_path / "a.tar"
        path.write_bytes(damaged[: None if number % 2 else rng.integers(1, len(data))])
        sources, errors, _ = find_images([path])
        for source in sources:
            try:
                outcomes.add(source.open().mode)
            except ImageError as error:
                outcomes.add("reported" if "\n" not in str(error) else str(error))
        outcomes |= {"reported" if "\n" not in str(each.error) else str(each.error) for each in errors}
    assert outcomes == {"RGB", "reported"}


def test_photographs_are_found_and_opened() -> None:
    folder = ROOT.parent / "shared" / "photos"
    if not folder.is_dir():
        pytest.skip("no photographs beside this checkout")
    sources, errors, _ = find_images([folder])
    assert not errors
    assert len(sources) == 160
    assert all(source.open().mode == "RGB" for source in sources[::20])
