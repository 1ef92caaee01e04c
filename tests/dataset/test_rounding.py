"""The error of statistics from float16 codes, measured on a collection, against the same statistics in float64."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import vision_tower
from PIL import Image
from torch import Tensor

import clipfast
from clipfast.contributions import Contributions
from clipfast.dataset.collecting import collect
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.passes import PassOptions
from clipfast.dataset.plan import Unit
from clipfast.dataset.rounding import rounding_error
from clipfast.dataset.samples import Sample

COUNTS = (6, 1, 7)


@dataclass(frozen=True)
class Pictures:
    """Random pictures in units of so many."""

    counts: tuple[int, ...] = COUNTS
    name: str = "pictures"

    def units(self, size: int) -> Iterator[Unit]:
        for number, count in enumerate(self.counts):
            yield Unit("items", "", 1000 * number, 1000 * number + count)

    def read(self, unit: Unit) -> Iterator[Sample]:
        for number in range(unit.start, unit.stop):
            yield Sample(f"{number}", "", content=picture(number))


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def model() -> clipfast.Model:
    return clipfast.wrap(vision_tower())


def collected(model: clipfast.Model, folder: Path, **kept: str | None) -> Manifest:
    collect([Pictures()], folder, model, PassOptions(kept=kept, batch_size=4))
    return Manifest(folder)


def contributions(model: clipfast.Model, units: tuple[int, ...]) -> Contributions:
    numbers = [1000 * unit + number for unit in units for number in range(COUNTS[unit])]
    return model.decompose([picture(number) for number in numbers])


def variances(made: Contributions, codes: Tensor) -> Tensor:
    """Of what every head adds, from codes, by the definition in float64: ``[L, H]``."""
    exact = Contributions(
        embedding=made.embedding.double(),
        norm=made.norm.double(),
        mean=made.mean.double(),
        std=made.std.double(),
        codes=codes.double(),
        start=made.start.double(),
        mlps=made.mlps.double(),
        rest=made.rest.double(),
        layers=made.layers,
        grid=made.grid,
        basis=made.basis.to(torch.device("cpu"), torch.float64),
        prefix_tokens=made.prefix_tokens,
    )
    return exact.heads().var(0).sum(2)


def test_the_error_is_that_of_the_definition(model: clipfast.Model, tmp_path: Path) -> None:
    """Of units with two images at least; and it is well above what float64 sums leave."""
    measured = rounding_error(collected(model, tmp_path / "c", codes="float16"))
    assert measured is not None
    made = contributions(model, (0, 2))
    exact = variances(made, made.codes)
    expected = (variances(made, made.codes.half()) - exact).abs() / exact
    assert measured.images == COUNTS[0] + COUNTS[2]
    assert measured.largest == pytest.approx(float(expected.max()), rel=0.01)
    assert (measured.layer, measured.head) == divmod(int(expected.argmax()), 2)
    assert 1e-6 < measured.largest < 1e-2
    assert str(measured) == f"codes in float16: heads' variances differ by at most {100 * measured.largest:.2g} %"


def test_codes_in_float32_have_none_but_rounding(model: clipfast.Model, tmp_path: Path) -> None:
    measured = rounding_error(collected(model, tmp_path / "c", codes="float32"))
    assert measured is not None
    assert measured.largest < 1e-6


def test_whole_units_until_there_are_enough(model: clipfast.Model, tmp_path: Path) -> None:
    manifest = collected(model, tmp_path / "c", codes="float16")
    measured = rounding_error(manifest, images=5)
    assert measured is not None
    assert measured.images == COUNTS[0]


def test_without_codes_there_is_nothing_to_compare(model: clipfast.Model, tmp_path: Path) -> None:
    assert rounding_error(collected(model, tmp_path / "c", embeddings="float32")) is None


def test_a_damaged_file_is_an_error(model: clipfast.Model, tmp_path: Path) -> None:
    manifest = collected(model, tmp_path / "c", codes="float16")
    path = manifest.data / manifest.record(0).folder / "moments.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(clipfast.InputError, match="damaged"):
        rounding_error(manifest)
