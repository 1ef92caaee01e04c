"""Images of a collection are opened again wherever they were read from, or one line says why not."""

import io
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made import EVERYTHING, Made, encoded, small_model
from PIL import Image

from clipfast.dataset.collecting import collect
from clipfast.dataset.collection import Collection
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.errors import ImageError

COUNT = 5


def _written(kind: str, folder: Path) -> list[str]:
    """Images in a place of some kind, under the name that a user would give."""
    if kind == "files":
        for number in range(COUNT):
            (folder / f"{number}.png").write_bytes(encoded(number))
        return [str(folder)]
    if kind == "table":
        rows = {"id": [f"a{number}" for number in range(COUNT)], "image": [encoded(number) for number in range(COUNT)]}
        pq.write_table(pa.table(rows), folder / "t.parquet", row_group_size=2)
        return [str(folder / "t.parquet")]
    if kind == "url":
        for number in range(COUNT):
            with fsspec.open(f"memory://reopened/{number}.png", "wb") as file:
                file.write(encoded(number))
        return [f"memory://reopened/{number}.png" for number in range(COUNT)]
    mode = {"tar": "w", "tar.gz": "w:gz"}[kind]
    with tarfile.open(folder / f"s.{kind}", mode) as tar:
        for number in range(COUNT):
            info = tarfile.TarInfo(f"{number:03}.png")
            info.size = len(encoded(number))
            tar.addfile(info, io.BytesIO(encoded(number)))
    return [str(folder / f"s.{kind}")]


@pytest.mark.parametrize("kind", ["files", "table", "url", "tar", "tar.gz"])
def test_images_are_opened_again(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    collect(open_inputs(_written(kind, tmp_path / "in")), tmp_path / "c", small_model(), EVERYTHING)
    sources = Collection(tmp_path / "c").sources()
    assert len(sources) == COUNT
    assert len({str(source) for source in sources}) == COUNT
    for number, source in enumerate(sources):
        expected = np.asarray(Image.open(io.BytesIO(encoded(number))))
        assert (np.asarray(source.open()) == expected).all()
    for path in (tmp_path / "in").iterdir():
        path.unlink()
    if kind != "url":
        with pytest.raises(ImageError, match=r"no such file|No such file|any more"):
            Collection(tmp_path / "c").sources()[0].open()


def test_images_of_memory_cannot_be_opened_again(tmp_path: Path) -> None:
    collection_of = Made()
    collect([collection_of], tmp_path, small_model(), EVERYTHING)
    entry = Collection(tmp_path).entries[0]
    assert entry.member == "row 0"
    with pytest.raises(ImageError, match=r"no such file|data set in memory"):
        Collection(tmp_path).sources()[0].open()
