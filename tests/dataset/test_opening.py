"""A collection opened for analysis gives the numbers that were decomposed, reads little, and says what is damaged."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_collections import EVERYTHING, Pictures, decomposed, run, tiny_model

import clipfast.dataset
from clipfast import Contributions, InputError, MissingExtra, Model, NotKept
from clipfast.dataset.opening import Dataset
from clipfast.dataset.samples import Status

PICTURES = Pictures((9, 5, 12, 3, 10), bad=(2, 3), lost=(1,))
GOOD = [*range(9), *range(14, 26, 3), 26, *range(29, 39)]
"""Pictures that are in, in order."""


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opening") / "collection"
    run(folder, model, PICTURES)
    return folder


@pytest.fixture(scope="module")
def contributions(model: Model) -> Contributions:
    return decomposed(model, PICTURES)


@pytest.fixture
def data(folder: Path) -> Dataset:
    return clipfast.dataset.open(folder)


def test_what_it_is(data: Dataset) -> None:
    assert len(data) == len(GOOD) == 24
    assert repr(data).endswith("24 images, 15 failed, 5 units, kept codes, class_codes, terms, embeddings)")


def test_numbers_are_those_that_were_decomposed(data: Dataset, contributions: Contributions) -> None:
    terms = torch.cat([contributions.start_and_mlps(), contributions.rest[:, None]], 1)
    for array, expected in (
        (data.codes, contributions.codes),
        (data.class_codes, contributions.class_codes),
        (data.terms, terms),
        (data.embeddings, contributions.embedding),
    ):
        assert array.values.dtype == np.float32
        assert (array.values == expected.numpy()).all()
        assert (data.read(str(array.name)) == expected.numpy()).all()


def test_axes_have_names_and_coordinates(data: Dataset, contributions: Contributions) -> None:
    assert data.codes.dims == data.class_codes.dims == ("image", "layer", "head", "dim")
    assert data.terms.dims == ("image", "term", "embed")
    assert data.terms.term.values.tolist() == ["start", "L0.mlp", "L1.mlp", "rest"]
    assert data.embeddings.dims == ("image", "embed")
    codes = data.codes
    assert codes.id.values.tolist() == [f"picture {number}" for number in GOOD]
    assert codes.label.values.tolist() == [("cat", None, "dog")[number % 3] for number in GOOD]
    assert codes.group.values.tolist() == [f"g{number % 2}" for number in GOOD]
    assert set(codes.status.values) == {Status.OK}
    for name in ("mean", "std", "norm"):
        assert (codes[name].values == getattr(contributions, name).numpy()).all()
    assert codes.attrs["units"] == "1"


def test_parts_by_name(data: Dataset, contributions: Contributions) -> None:
    codes = contributions.codes.numpy()
    array = data.codes
    assert (array.sel(layer=1, head=0).values == codes[:, 1, 0]).all()
    assert (array.sel(layer=[1, 0]).isel(image=slice(20, 3, -4)).values == codes[20:3:-4, ::-1]).all()
    assert (array.isel(image=[23, 0, 9, 10, 9], head=1).values == codes[[23, 0, 9, 10, 9]][:, :, 1]).all()
    assert (array[5].values == codes[5]).all()
    assert array[5].id == f"picture {GOOD[5]}"
    cats = array.isel(image=array.label.values == "cat")
    assert (cats.values == codes[[number % 3 == 0 for number in GOOD]]).all()
    assert (array.set_xindex("id").sel(id="picture 31").values == codes[GOOD.index(31)]).all()
    assert (array.mean("image").values == codes.mean(0)).all()


@pytest.mark.parametrize(
    "rows",
    [
        slice(None),
        slice(7, 12),
        slice(3, 3),
        slice(30, None),
        slice(-5, None),
        slice(None, None, -1),
        [],
        [0],
        [-1, 3],
        [13, 8, 9, 8],
        np.arange(0, 24, 5, dtype=np.uint8),
        np.arange(24) % 3 == 0,
    ],
    ids=str,
)
def test_rows(data: Dataset, contributions: Contributions, rows: Any) -> None:
    picked = rows if not isinstance(rows, list) else np.array(rows, int)
    assert (data.read("codes", rows, heads=[1]) == contributions.codes.numpy()[picked][:, :, 1:]).all()
    assert (data.column("norm", rows) == contributions.norm.numpy()[picked]).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([24], "image 24 does not exist: there are 24"),
        ([1.5], r"rows of shape \[1\] and dtype float64: give a list of integers"),
        ([[1]], r"rows of shape \[1, 1\]"),
        (np.ones(3, bool), r"a mask of rows has shape \[3\], expected \[24\]"),
    ],
)
def test_rows_that_are_not_there(data: Dataset, rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.read("codes", rows)


def test_layers_count_from_the_end_too(data: Dataset, contributions: Contributions) -> None:
    assert (data.read("codes", layers=[-1, 0]) == contributions.codes.numpy()[:, ::-1]).all()
    with pytest.raises(InputError, match="layer 2 does not exist"):
        data.read("codes", layers=[2])


def test_a_selection_reads_its_own_chunks(data: Dataset) -> None:
    def read() -> int:
        return sum(data._arrays(unit).bytes_read for unit in (0, 2, 3, 4))

    head = data.codes.sel(layer=1, head=1)
    before = read()  # the attributes of one unit alone
    assert before < 5000
    _ = head.isel(image=slice(0, 9)).values
    one_unit = read()
    record = data.records[0]
    shard = record.files["codes/c/0/0/0/0"][0]
    metadata, index = record.files["codes/zarr.json"][0], 4 * 16 + 4
    assert one_unit - metadata - index == pytest.approx((shard - index) / 4, rel=0.1)


def test_tables_hold_every_image(data: Dataset) -> None:
    frame = data.images.to_pandas()
    assert frame.id.tolist() == [f"picture {number}" for number in range(39)]
    assert frame.unit.tolist() == [0] * 9 + [1] * 5 + [2] * 12 + [3] * 3 + [4] * 10
    good = frame[frame.status == "ok"]
    assert good.row.tolist() == list(range(24))
    assert good.id.tolist() == data.codes.id.values.tolist()
    assert frame[frame.status != "ok"].row.isna().all()
    assert set(frame.status) == {"ok", "missing", "decode_error"}
    first = next(data.tables(["label"]))
    assert first.column_names == ["unit", "label"]


def test_what_one_head_writes(data: Dataset, contributions: Contributions) -> None:
    for layer, head in ((-1, 1), (0, 0)):
        blocks = list(data.head(layer, head))
        assert torch.cat(blocks).dtype == torch.float32
        torch.testing.assert_close(torch.cat(blocks), contributions.head(layer, head), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match="head 2 does not exist"):
        next(data.head(0, 2))


def test_blocks_are_of_one_unit(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipfast.dataset.opening.ROWS_AT_ONCE", 4)
    blocks = list(data.blocks())
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(24))
    assert [block.stop - block.start for block in blocks] == [4, 4, 1, 4, 1, 4, 4, 2]


def test_moments_are_of_all_images(data: Dataset, contributions: Contributions) -> None:
    assert data.moments.count == 24
    torch.testing.assert_close(data.moments.means(), contributions.heads().double().mean(0), rtol=1e-5, atol=1e-7)


def test_float16_is_what_was_kept(model: Model, contributions: Contributions, tmp_path: Path) -> None:
    run(tmp_path / "half", model, PICTURES, EVERYTHING)
    data = clipfast.dataset.open(tmp_path / "half")
    assert data.codes.dtype == data.codes.values.dtype == np.float16
    assert (data.codes.values == contributions.codes.half().numpy()).all()
    head = torch.cat(list(data.head(1, 0)))
    torch.testing.assert_close(head, contributions.head(1, 0), rtol=2e-3, atol=1e-4)


def test_what_was_not_kept(model: Model, tmp_path: Path) -> None:
    run(tmp_path / "moments", model, PICTURES, {})
    data = clipfast.dataset.open(tmp_path / "moments")
    assert repr(data).endswith("kept moments alone)")
    assert data.moments.count == len(data) == 24
    assert data.images.num_rows == 39
    for read in (lambda: data.codes, lambda: data.read("codes"), lambda: next(data.head(0, 0))):
        with pytest.raises(NotKept, match="has no codes: collect the images again with --codes"):
            read()
    with pytest.raises(NotKept, match="has no embeddings: collect the images again with --embeddings"):
        _ = data.embeddings


def test_other_processes_and_copies(data: Dataset, contributions: Contributions) -> None:
    again = pickle.loads(pickle.dumps(data.codes.sel(head=1)))
    assert (again.values == contributions.codes[:, :, 1].numpy()).all()
    copied = data.codes.copy(deep=True)
    assert (copied.sel(layer=0).values == contributions.codes[:, 0].numpy()).all()
    assert len(copy.deepcopy(data)) == len(data)


def test_an_unfinished_pass(folder: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    subprocess.run(["cp", "-r", str(folder), str(part)], check=True)
    (part / "units" / "000002.json").unlink()
    with pytest.raises(
        InputError, match=r"unfinished pass \(4 of 5 units\): finish it .* open it with unfinished=True"
    ):
        clipfast.dataset.open(part)
    data = clipfast.dataset.open(part, unfinished=True)
    assert len(data) == 20
    assert (data.read("codes") == clipfast.dataset.open(folder).read("codes")[[*range(9), *range(13, 24)]]).all()


def test_folders_without_images(model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no collection"):
        clipfast.dataset.open(tmp_path)
    run(tmp_path / "none", model, Pictures((3, 3), lost=(0, 1)))
    with pytest.raises(InputError, match="holds no image: none was collected, or none could be read"):
        clipfast.dataset.open(tmp_path / "none")


def test_damage_is_an_error(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(folder), str(damaged)], check=True)
    data = clipfast.dataset.open(damaged)
    unit = damaged / "data" / data.records[2].folder
    (unit / "codes" / "c" / "0" / "0" / "0" / "0").unlink()
    array = data.codes
    assert array.isel(image=slice(0, 9)).values.shape == (9, 2, 2, 16)
    with pytest.raises(InputError, match=r"codes/c/0/0/0/0 is gone; `clipfast collection validate "):
        _ = array.sel(layer=0, head=0).values
    content = bytearray((unit / "images.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (unit / "images.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"images\.parquet is damaged"):
        _ = clipfast.dataset.open(damaged).images


def test_without_xarray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    monkeypatch.delitem(sys.modules, "clipfast.dataset.labelled", raising=False)
    data = clipfast.dataset.open(folder)
    with pytest.raises(MissingExtra, match=r"needs the package xarray: pip install 'clipfast\[data\]'"):
        _ = data.codes
    assert data.read("codes").shape == (24, 2, 2, 16)
    assert data.images.num_rows == 39


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, clipfast.dataset\n"
        "heavy = ('torch', 'numpy', 'pyarrow', 'zarr', 'xarray', 'pandas')\n"
        "print([name for name in heavy if name in sys.modules], sorted(clipfast.dataset.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] ['Dataset', 'collect', 'export', 'open', 'validate']"
    with pytest.raises(AttributeError, match=r"module 'clipfast\.dataset' has no attribute 'close'"):
        _ = clipfast.dataset.close
    for name in clipfast.dataset.__all__:
        assert name in dir(clipfast.dataset)
        assert (getattr(clipfast.dataset, name).__doc__ or "").strip()
