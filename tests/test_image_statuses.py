"""Every error about an image says of which kind it is."""

import copy
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipfast.dataset.samples import Failure, Status
from clipfast.errors import ImageError
from clipfast.images import decode_image, open_image, with_memory
from clipfast.preprocessing import Prepare


def failure(path: Path) -> Failure:
    with pytest.raises(ImageError) as caught:
        open_image(path)
    return Failure.of(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "self.png").symlink_to("self.png")
    statuses = {name: failure(tmp_path / name).status for name in ("gone.png", "fifo.png", "self.png", ".", "a\0b")}
    assert statuses == {
        "gone.png": Status.MISSING,
        "fifo.png": Status.UNREADABLE,
        "self.png": Status.UNREADABLE,
        ".": Status.UNREADABLE,
        "a\0b": Status.UNREADABLE,
    }


def test_contents_that_cannot_be_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "png")
    contents = {
        "half.png": file.getvalue()[:4000],
        "page.png": b"<html>",
        "empty.png": b"",
        "whole.png": file.getvalue(),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    assert failure(tmp_path / "half.png").status == Status.DECODE_ERROR
    assert failure(tmp_path / "page.png").status == Status.NO_IMAGE
    assert failure(tmp_path / "empty.png").status == Status.NO_IMAGE
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    assert failure(tmp_path / "nan.tiff").status == Status.DECODE_ERROR
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert failure(tmp_path / "whole.png").status == Status.TOO_LARGE


def test_memory_that_runs_out(tmp_path: Path) -> None:
    def read() -> None:
        raise MemoryError

    with pytest.raises(ImageError) as caught:
        with_memory(read, "x.png")
    assert Failure.of(caught.value).status == Status.OUT_OF_MEMORY


def test_an_image_that_is_too_narrow_to_resize() -> None:
    from open_clip import image_transform

    prepare = Prepare(image_transform(224, is_train=False))
    with pytest.raises(ImageError) as caught:
        prepare(Image.new("RGB", (1, 1_000_000)))
    assert caught.value.status == Status.TOO_LARGE


def test_a_status_survives_pickling_and_copying() -> None:
    error = ImageError("x: gone", "missing")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (str(other), other.status) == ("x: gone", "missing")
    assert decode_image(io.BytesIO(encoded()), "x").size == (2, 2)


def encoded() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "png")
    return file.getvalue()
