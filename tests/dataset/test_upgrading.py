"""Collections of version 4, written by clipfast 0.2.0, become collections of today's version."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from builders import ROOT

from clipfast.analyses.moments import Moments
from clipfast.contributions import Contributions
from clipfast.dataset.collection import Collection
from clipfast.dataset.upgrading import is_old_collection, upgrade
from clipfast.dataset.validating import validate
from clipfast.errors import InputError

OLD = ROOT / "tests" / "saved" / "collections"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contributions_and_labels_are_those_of_the_old_collection(dtype: str, tmp_path: Path) -> None:
    old = OLD / "collection-4"
    expected = Contributions.load(old / "contributions-00000.safetensors")
    entries = [json.loads(line) for line in (old / "images.jsonl").read_text().splitlines()]
    assert is_old_collection(old)
    assert upgrade(old, tmp_path / "new", store_dtype=dtype) == 7
    collection = Collection(tmp_path / "new")
    assert not is_old_collection(tmp_path / "new")
    assert [entry.file for entry in collection.entries] == [entry["file"] for entry in entries]
    assert [entry.label for entry in collection.entries] == [entry["label"] for entry in entries]
    ((_, contributions),) = collection.batches()
    for name, tensor in expected._tensors().items():
        have = contributions._tensors()[name]
        if dtype == "float32":
            assert torch.equal(have, tensor), name
        else:
            assert (have - tensor).abs().max() <= 2**-11 * tensor.abs().max(), name
    old_moments = Moments.load(old / "moments-00001.safetensors")
    assert collection.moments.count == old_moments.count
    assert torch.allclose(collection.moments.means(), old_moments.means(), rtol=0, atol=1e-7)
    assert [each["file"] for each in collection.failures()] == ["images/a/bad.png"]
    assert collection.header["model"] == "model"
    assert collection.header["dtype"] == "fp32"
    assert validate(tmp_path / "new") == []


def test_moments_alone_keep_every_bit(tmp_path: Path) -> None:
    old = OLD / "moments-4"
    upgrade(old, tmp_path / "new")
    collection = Collection(tmp_path / "new")
    expected = Moments.load(old / "moments-00001.safetensors")
    assert all(torch.equal(collection.moments._sums[name], tensor) for name, tensor in expected._sums.items())
    assert len(collection.entries) == 7
    with pytest.raises(InputError, match="holds moments only"):
        next(collection.batches())


def test_damaged_and_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing to upgrade|cannot be read"):
        upgrade(tmp_path, tmp_path / "new")
    for name in ("images.jsonl", "collection.json", "contributions-00000.safetensors", "moments-00001.safetensors"):
        old = tmp_path / name
        shutil.copytree(OLD / "collection-4", old)
        data = bytearray((old / name).read_bytes())
        data[len(data) // 2] ^= 1
        (old / name).write_bytes(data)
        with pytest.raises(InputError, match="damaged"):
            upgrade(old, tmp_path / f"new {name}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="not empty"):
        upgrade(OLD / "collection-4", tmp_path / "full")


def test_opening_an_old_collection_names_the_way_on() -> None:
    with pytest.raises(InputError, match="clipfast collect --upgrade"):
        Collection(OLD / "collection-4")
