"""Photographs in tar shards with bad files of every kind among them: good ones are in, each bad one has its reason."""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders import ROOT
from made import small_model
from PIL import Image

from clipfast.dataset.api import collect
from clipfast.dataset.collection import Collection

PHOTOS = ROOT.parent / "shared" / "photos"
COUNT = 160


def _jpeg(number: int) -> bytes:
    """A smooth picture with some noise, of another size for each number."""
    rng = np.random.default_rng(number)
    height, width = 60 + number % 7 * 16, 80 + number % 5 * 24
    ramp = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    pixels = (ramp + rng.integers(0, 55, (height, width, 3))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def _good(source: str) -> Iterator[tuple[str, bytes]]:
    if source == "made":
        yield from ((f"good-{number:04}.jpg", _jpeg(number)) for number in range(COUNT))
        return
    for shard in sorted(PHOTOS.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if not member.name.endswith(".txt"):
                    yield f"good-{shard.stem}-{member.name}", file.read()


def _png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with a row of data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BAD = {
    "empty.jpg": (b"", "no_image", "an empty file"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "no_image", "an HTML page"),
    "eps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n%%EOF\n", "no_image", "PostScript"),
    "text.png": (b"hello", "no_image", "not an image"),
    "cut.jpg": (_jpeg(3)[: len(_jpeg(3)) // 2], "decode_error", "damaged or truncated"),
    "cut.png": (_png_header(40, 40), "decode_error", "damaged or truncated"),
    "bomb.png": (_png_header(30_000, 30_000), "too_large", "too large"),
    "long.png": (_png_header(10_000_000, 1), None, "."),
    "zero.png": (_png_header(0, 0), None, "."),
}
"""Content, status (None for one of several) and part of the reason."""


@pytest.fixture(params=["made", "photographs"])
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Four shards with everything mixed, one of them cut in its last member, and one that is no tar file."""
    if request.param == "photographs" and not PHOTOS.is_dir():
        pytest.skip("the photographs are not here")
    good = list(_good(request.param))
    assert len(good) == COUNT
    bad = [(f"bad-{number}-{name}", content) for number in range(4) for name, (content, _, _) in BAD.items()]
    rng = np.random.default_rng(1)
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(4):
        members = [*good[shard::4], *bad[shard::4]]
        members = [members[place] for place in rng.permutation(len(members))]
        with tarfile.open(folder / f"{shard:04}.tar", "w") as tar:
            for name, content in [*members, *([("cut.jpg", _jpeg(0))] if shard == 2 else [])]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        if shard == 2:
            path = folder / f"{shard:04}.tar"
            with tarfile.open(path) as tar:
                last = tar.getmembers()[-1]
            path.write_bytes(path.read_bytes()[: last.offset_data + 100])
    (folder / "9999.tar").write_bytes(b"no tar file at all" * 100)
    return folder


def test_all_good_images_are_in_and_every_bad_one_has_its_reason(shards: Path, tmp_path: Path) -> None:
    summary = collect(f"{shards}/*.tar", tmp_path / "c", small_model(), batch_size=16)
    collection = Collection(tmp_path / "c")
    assert summary.statuses["ok"] == collection.count == COUNT
    assert all("good-" in entry.file for entry in collection.entries)
    failures = list(collection.failures())
    images = [failure for failure in failures if "bad-" in failure["file"]]
    assert len(images) == 4 * len(BAD)
    for failure in images:
        name = failure["file"].rpartition(":")[2].split("-", 2)[2]
        _, status, reason = BAD[name]
        assert status in (None, failure["status"]), failure
        assert reason in failure["error"], failure
        assert "\n" not in failure["error"]
    problems = "\n".join(summary.problems)
    assert len(summary.problems) == 2
    assert "0002.tar" in problems
    assert "9999.tar" in problems
    # nothing else is reported
    assert len(failures) == len(images) + 2
