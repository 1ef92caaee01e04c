"""Exports hold the numbers of the collection in the layouts that others read, and are whole or not there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xarray
import zarr
from made_collections import EVERYTHING, EXACT, Pictures, decomposed, run, tiny_model

from clipfast import Contributions, InputError, Model, NotKept
from clipfast.dataset import exporting, opening
from clipfast.dataset.exporting import export

PICTURES = Pictures((9, 12, 10), bad=(1,))
GOOD = [*range(9), *range(9, 21, 3), *range(21, 31)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def contributions(model: Model) -> Contributions:
    return decomposed(model, PICTURES)


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exporting") / "collection"
    run(folder, model, PICTURES, EXACT)
    return folder


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(exporting, "IMAGES_PER_FILE", 7)


def clip_retrieval(out: Path) -> tuple[np.ndarray, Any]:
    """Embeddings and metadata as embedding-reader joins them: files in the order of their names."""
    arrays, tables = sorted((out / "img_emb").iterdir()), sorted((out / "metadata").iterdir())
    suffixes = [path.stem.removeprefix("img_emb_") for path in arrays]
    assert [path.name for path in arrays] == [f"img_emb_{suffix}.npy" for suffix in suffixes]
    assert [path.name for path in tables] == [f"metadata_{suffix}.parquet" for suffix in suffixes]
    loaded = [np.load(path, mmap_mode="r") for path in arrays]
    read = [pq.read_table(path) for path in tables]
    assert [len(array) for array in loaded] == [table.num_rows for table in read]
    return np.concatenate(loaded), read


def test_embeddings_for_clip_retrieval(folder: Path, tmp_path: Path, contributions: Contributions) -> None:
    written: list[int] = []
    out = tmp_path / "out"
    assert export(folder, out, "clip-retrieval", progress=written.append) == len(GOOD) == sum(written)
    values, tables = clip_retrieval(out)
    assert [table.num_rows for table in tables] == [7, 7, 7, 2]
    assert values.dtype == np.float16
    normalised = contributions.embedding / contributions.embedding.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(values, normalised.numpy(), atol=1e-3)
    images = [row for table in tables for row in table.to_pylist()]
    assert [image["id"] for image in images] == [f"picture {number}" for number in GOOD]
    assert [image["image_path"] for image in images] == [f"/pictures/{number}.png" for number in GOOD]
    assert [image["label"] for image in images] == [("cat", None, "dog")[number % 3] for number in GOOD]
    assert [image["norm"] for image in images] == contributions.norm.tolist()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_names_of_files_sort_as_their_numbers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "IMAGES_PER_FILE", 2)
    export(folder, tmp_path / "out", "clip-retrieval")
    _, tables = clip_retrieval(tmp_path / "out")
    assert len(tables) == 12
    assert [row for table in tables for row in table.column("id").to_pylist()] == [f"picture {n}" for n in GOOD]


def test_codes_of_heads_for_clip_retrieval(folder: Path, tmp_path: Path, contributions: Contributions) -> None:
    export(folder, tmp_path / "out", "clip-retrieval", heads=[(-1, 1), (0, 1), (1, 1)], dtype="float32")
    values, _ = clip_retrieval(tmp_path / "out")
    expected = torch.cat([contributions.codes[:, 1, 1], contributions.codes[:, 0, 1]], 1)
    assert values.dtype == np.float32
    assert (values == expected.numpy()).all()


def test_one_zarr_group(folder: Path, tmp_path: Path, contributions: Contributions) -> None:
    assert export(folder, tmp_path / "out", "zarr") == len(GOOD)
    data = xarray.open_zarr(tmp_path / "out" / "arrays.zarr", consolidated=False, chunks=None)
    codes = contributions.codes.numpy()
    assert (data.codes.sel(layer=1, head=0).values == codes[:, 1, 0]).all()
    assert (data.codes.values == codes).all()
    assert (data.class_codes.values == contributions.class_codes.numpy()).all()
    assert (data.terms.values[:, 1:-1] == contributions.mlps.numpy()).all()
    assert (data.embeddings.values == contributions.embedding.numpy()).all()
    group: Any = zarr.open_group(tmp_path / "out" / "arrays.zarr", mode="r")
    assert "clipfast_pieces" not in group["codes"].attrs
    table = pq.read_table(tmp_path / "out" / "images.parquet")
    assert table.column("id").to_pylist() == [f"picture {number}" for number in GOOD]
    assert table.column_names[:2] == ["id", "path"]


def test_some_arrays(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "out", "zarr", arrays=["embeddings"])
    assert {path.name for path in (tmp_path / "out" / "arrays.zarr").iterdir()} == {"embeddings", "zarr.json"}


def test_one_table(model: Model, tmp_path: Path, contributions: Contributions) -> None:
    run(tmp_path / "half", model, PICTURES, EVERYTHING)
    assert export(tmp_path / "half", tmp_path / "out.parquet", "parquet") == len(GOOD)
    table = pq.read_table(tmp_path / "out.parquet")
    for name, expected in (("codes", contributions.codes.half()), ("embeddings", contributions.embedding)):
        metadata = table.schema.field(name).metadata
        shape = json.loads(metadata[b"shape"])
        values = table.column(name).combine_chunks().flatten().to_numpy().reshape(-1, *shape)
        assert (values == expected.numpy()).all()
        assert values.dtype == expected.numpy().dtype
    assert json.loads(table.schema.field("codes").metadata[b"labels"]) == {"layer": [0, 1], "head": [0, 1]}
    assert table.column("label").to_pylist() == [("cat", None, "dog")[number % 3] for number in GOOD]
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3 + 1 + 3


def test_a_table_without_arrays(folder: Path, tmp_path: Path) -> None:
    export(folder, tmp_path / "out.parquet", "parquet", arrays=[])
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["id", "path", "label", "group", "mean", "std", "norm"]
    assert table.num_rows == len(GOOD)


@pytest.mark.parametrize("layout", ["clip-retrieval", "zarr", "parquet"])
def test_nothing_is_overwritten(folder: Path, tmp_path: Path, layout: Any) -> None:
    for make in (Path.mkdir, Path.touch):
        out = tmp_path / make.__name__
        make(out)
        with pytest.raises(InputError, match=f"{out} exists: give a new name"):
            export(folder, out, layout)
    with pytest.raises(InputError, match="no folder: make it first"):
        export(folder, tmp_path / "no" / "out", layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mkdir", "touch"]


@pytest.mark.parametrize("layout", ["clip-retrieval", "zarr", "parquet"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_export_that_stops_leaves_nothing(
    folder: Path, tmp_path: Path, layout: Any, error: type[BaseException]
) -> None:
    written: list[int] = []

    def stop(images: int) -> None:
        written.append(images)
        if len(written) == 5:
            raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        export(folder, tmp_path / "out", layout, progress=stop)
    assert len(written) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_meanwhile(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was made meanwhile: give a new name"):
        export(folder, tmp_path / "out", "zarr", progress=lambda _: (tmp_path / "out").mkdir(exist_ok=True))
    assert list((tmp_path / "out").iterdir()) == []


def test_damage_ends_an_export(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    [shard, *_] = sorted((tmp_path / "damaged" / "data").glob("000002-*/codes/c/0/0/0/0"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(InputError, match="codes/c/0/0/0/0 is damaged"):
        export(tmp_path / "damaged", tmp_path / "out", "zarr")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("numpy", {}, "layout is 'numpy': choose one of clip-retrieval, zarr, parquet"),
        ("zarr", {"heads": [(0, 0)]}, "heads are chosen for the layout clip-retrieval, not for zarr"),
        ("clip-retrieval", {"arrays": ["codes"]}, "leave out arrays"),
        ("clip-retrieval", {"dtype": "int8"}, "dtype is 'int8': choose one of float16, float32"),
        ("clip-retrieval", {"heads": [(5, 0)]}, "layer 5 does not exist"),
        ("clip-retrieval", {"heads": []}, "heads is empty"),
        ("parquet", {"arrays": ["heads"]}, "has no heads"),
        ("zarr", {"arrays": []}, "has no arrays: collect the images again"),
    ],
)
def test_options_that_do_not_fit(folder: Path, tmp_path: Path, layout: Any, options: Any, message: str) -> None:
    with pytest.raises((InputError, NotKept), match=message):
        export(folder, tmp_path / "out", layout, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_kept(model: Model, tmp_path: Path) -> None:
    run(tmp_path / "codes", model, PICTURES, {"codes": "float32"})
    with pytest.raises(NotKept, match="has no embeddings: collect the images again with --embeddings"):
        export(tmp_path / "codes", tmp_path / "out", "clip-retrieval")


def test_numbers_too_large_for_float16(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contributions: Contributions
) -> None:
    large = contributions.codes.numpy() * np.float32(1e7)
    monkeypatch.setattr(opening.Dataset, "read", lambda self, name, rows, *parts: large[rows][:, :1, :1])
    with pytest.raises(InputError, match=r"numbers up to .*e\+\d+ do not fit float16: export them in float32"):
        export(folder, tmp_path / "out", "clip-retrieval", heads=[(0, 0)])
