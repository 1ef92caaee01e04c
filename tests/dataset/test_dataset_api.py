"""Collecting from Python: names and data sets in memory give the same collection as files do."""

import io
from pathlib import Path

import datasets
import pytest
import torch
from made import contents, encoded, small_model
from PIL import Image
from torch.utils.data import Dataset

import clipfast
from clipfast.dataset.api import collect, kept_of
from clipfast.dataset.collection import Collection
from clipfast.errors import InputError

COUNT = 7


@pytest.fixture(scope="module")
def model() -> clipfast.Model:
    return small_model()


@pytest.fixture(scope="module")
def expected(model: clipfast.Model) -> torch.Tensor:
    return model.decompose([_picture(number) for number in range(COUNT)]).codes


def _picture(number: int) -> Image.Image:
    return Image.open(io.BytesIO(encoded(number)))


class Pictures(Dataset):
    """A torch data set of pairs."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return _picture(number), number % 2


def _hugging_face() -> datasets.Dataset:
    rows = {"image": [{"bytes": encoded(number)} for number in range(COUNT)], "label": [n % 2 for n in range(COUNT)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize(
    ("make", "label"),
    [
        (_hugging_face, "odd"),
        (Pictures, "1"),
        (lambda: [(f"id{n}", _picture(n), {"label": "ab"[n % 2]}) for n in range(COUNT)], "b"),
    ],
    ids=["datasets", "torch", "pairs"],
)
def test_data_sets_in_memory(
    make: type, label: str, model: clipfast.Model, expected: torch.Tensor, tmp_path: Path
) -> None:
    for _ in range(2):  # the second time there is nothing to do
        summary = collect(make(), tmp_path, model, keep="float32", labels="columns", unit_size=3)
        assert summary.failed == summary.left == 0
    assert summary.units == 0
    collection = Collection(tmp_path)
    assert [entry.label for entry in collection.entries][1::2] == [label] * 3
    codes = torch.cat([contributions.codes for _, contributions in collection.batches()])
    assert torch.allclose(codes, expected, rtol=0, atol=2e-6)


def test_names_and_what_is_kept(model: clipfast.Model, expected: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(COUNT):
        _picture(number).save(tmp_path / "in" / f"{number}.png")
    collect(tmp_path / "in", tmp_path / "half", model)
    ((_, contributions),) = Collection(tmp_path / "half").batches()
    assert (contributions.codes - expected).abs().max() <= 2**-11 * expected.abs().max()
    collect([tmp_path / "in"], tmp_path / "moments", model, keep=None)
    assert Collection(tmp_path / "moments").moments.count == COUNT
    assert contents(tmp_path / "moments")[0] != contents(tmp_path / "half")[0]
    collect(str(tmp_path / "in"), tmp_path / "codes", model, keep={"codes": "float32", "embeddings": "float32"})
    ((_, contributions),) = Collection(tmp_path / "codes").batches(without_terms=True)
    assert contributions.max_error() < 1e-6
    with pytest.raises(InputError, match="does not hold every image's terms"):
        next(Collection(tmp_path / "codes").batches())
    with pytest.raises(InputError, match="keep names 'heads'"):
        kept_of({"heads": "float16"})
    with pytest.raises(InputError, match="engine is 'spark'"):
        collect(tmp_path / "in", tmp_path / "x", model, engine="spark")  # type: ignore[arg-type]


def test_something_else_is_refused(model: clipfast.Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no data set"):
        collect(3, tmp_path / "c", model)
    with pytest.raises(InputError, match="gone: no such file"):
        collect(tmp_path / "gone", tmp_path / "c", model)
