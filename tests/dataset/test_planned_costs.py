"""The arithmetic of planning against examples computed by hand, and against files that a pass writes."""

from pathlib import Path

import pytest
import torch
from builders import pixels, vision_tower

import clipfast
from clipfast.dataset.costs import RECORD_BYTES, TABLE_BYTES, Machines, Shape, Sizes, estimate

# ViT-L-14 of CLIP: 24 layers of 16 heads of 64 numbers; start, 24 MLPs and rest; embeddings of 768 numbers.
LARGE = Shape(layers=24, heads=16, code=64, terms=26, embed=768)
EVERYTHING = {"codes": "float16", "class_codes": "float16", "terms": "float16", "embeddings": "float32"}


def test_bytes_per_image_of_a_large_model() -> None:
    """24 · 16 · 64 = 24,576 numbers of 2 bytes are 49,152 bytes: the codes of an image."""
    sizes = Sizes.of(LARGE, EVERYTHING)
    assert dict(sizes.per_image) == {
        "codes": 49_152,
        "class_codes": 49_152,
        "terms": 26 * 768 * 2,
        "embeddings": 3072,
        "table": TABLE_BYTES,
    }
    assert Sizes.of(LARGE, {"codes": "float32"}).per_image == {"codes": 98_304, "table": TABLE_BYTES}
    assert Sizes.of(LARGE, {"codes": None, "embeddings": None}).per_image == {"table": TABLE_BYTES}


def test_moments_of_a_unit() -> None:
    """384 heads: centre, total and class sum of 67 numbers each, and 67 · 67 products; 26 · 768 sums of terms."""
    assert LARGE.moments() == 8 * (384 * (3 * 67 + 67 * 67) + 26 * 768) == 14_567_424
    without = Shape(layers=24, heads=16, code=64, terms=26, embed=768, class_token=False)
    assert without.moments() == 8 * (384 * (2 * 67 + 67 * 67) + 26 * 768)
    assert without.numbers()["class_codes"] == 0


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    """Moments and basis as they are written, without the header of the file."""
    model = clipfast.wrap(vision_tower())
    contributions = model.decompose(pixels(model.module), class_token=True)
    shape = Shape(*contributions.codes.shape[1:], len(contributions.start_and_mlps()[0]) + 1, 20)
    moments = clipfast.Moments(model)
    moments.update(contributions)
    moments.save(tmp_path / "moments.safetensors", with_basis=False)
    content = (tmp_path / "moments.safetensors").read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == shape.moments()
    tensors = model.basis().tensors(contributions.layers)
    assert sum(tensor.numel() for tensor in tensors.values()) * 4 == shape.basis()
    arrays = {
        "codes": contributions.codes,
        "class_codes": contributions.class_codes,
        "terms": torch.cat([contributions.start_and_mlps(), contributions.rest[:, None]], 1),
        "embeddings": contributions.embedding,
    }
    assert shape.numbers() == {name: array[0].numel() for name, array in arrays.items()}


def test_a_pass_by_hand() -> None:
    """1,000,000 images in units of 1,000, on 3 machines with 4 workers that each compute 50 images per second.

    1,000 units over 12 workers are 84 rounds of 20 s: 1,680 s. With 10 s to start: 1,690 s.
    """
    sizes = Sizes({"codes": 100, "table": 20}, {"moments": 5000, "records": 1000}, once=7)
    plan = estimate(1_000_000, 1000, 30_000, sizes, Machines(50, 3, 4, start=10, disk=1e6))
    assert (plan.units, plan.seconds) == (1000, 1690)
    assert plan.merge_seconds == 1000 * 5000 / 1e6
    assert plan.hours == (1690 + 5) / 3600
    assert plan.read == 30e9
    assert plan.written == {"codes": 1e8, "table": 2e7, "moments": 5e6, "records": 1e6, "once": 7}
    assert plan.disk == 1e8 + 2e7 + 5e6 + 1e6 + 7
    assert plan.reading == 4 * 50 * 30_000  # bytes per second of one machine
    assert plan.writing == 4 * 50 * (120 + 6)


def test_five_billion_images() -> None:
    """500,000 shards of 10,000 on 100 machines with 8 GPUs of 1,000 images per second: 625 rounds of 10 s."""
    sizes = Sizes.of(LARGE, {"codes": "float16"})
    plan = estimate(5_000_000_000, 10_000, 25_000, sizes, Machines(1000, 100, 8))
    assert (plan.units, plan.seconds) == (500_000, 6250)
    assert plan.read == 125e12
    assert plan.written["codes"] == 49_152 * 5e9
    assert plan.written["moments"] == 14_567_424 * 500_000
    assert plan.written["records"] == RECORD_BYTES * 500_000
    assert plan.merge_seconds == pytest.approx(14_567_424 * 500_000 / 500e6)


def test_fewer_images_than_a_unit_has() -> None:
    sizes = Sizes({"table": 10}, {"moments": 100})
    plan = estimate(30, 1000, 5, sizes, Machines(10, 2, 4))
    assert (plan.units, plan.seconds) == (1, 3)
    assert plan.reading == 10 * 5  # a single worker has something to do
    assert plan.writing == pytest.approx(10 * (10 + 100 / 30))
