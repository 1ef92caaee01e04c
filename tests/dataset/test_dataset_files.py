"""Images in folders and tar shards: found, named, opened, and reported when they cannot be."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from builders import ROOT
from PIL import Image

from clipfast.dataset.files import find_images
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


def test_members_of_a_shard_are_opened_where_they_lie(tmp_path: Path) -> None:
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


def test_folders_hold_files_and_shards(tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    picture(1).save(tmp_path / "cats" / "one.png")
    shard(tmp_path / "more.tar", {"two.png": encoded(2)})
    sources, errors, _ = find_images([tmp_path])
    assert not errors
    assert [source.name for source in sources] == ["more__two", "cats__one"]
    assert all(source.folder == tmp_path for source in sources)


@pytest.mark.parametrize("cut", [512 * 6 + 100, 512 * 6, 512 * 7 + 5])
def test_a_shard_cut_short_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    """In the fourth header, between two members, and in the fourth member."""
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
def test_what_is_no_shard(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "a.tar"
    if data is not None:
        path.write_bytes(data)
    sources, errors, _ = find_images([path])
    assert not sources
    assert message in str(errors[0].error)


def test_a_shard_without_images(tmp_path: Path) -> None:
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


def test_real_photographs() -> None:
    folder = ROOT.parent / "shared" / "photos"
    if not folder.is_dir():
        pytest.skip("no photographs beside this checkout")
    sources, errors, _ = find_images([folder])
    assert not errors
    assert len(sources) == 160
    assert all(source.open().mode == "RGB" for source in sources[::20])
