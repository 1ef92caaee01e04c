"""Codes of many images on disk: how large, how fast to write, and what reading one head costs against everything.

``python -m benchmarks.store`` makes a collection with the codes of a ViT-L-14 in float16 in a temporary folder (2.1 GB
for 50,000 images), measures, and removes it. Every image's codes are those of a decomposed forward of one of eight
drawn photographs with random weights, each number times one from N(0, 1). So magnitudes are those of a real forward,
and signs are random: no image repeats another, and the compression finds less than in codes of real images. Reading is
measured with files in the page cache, and once after the system was told to drop them.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import clipfast
from benchmarks import cases, photographs
from benchmarks.results import FOLDER, Results
from clipfast.bench.measuring import Bar, Check, compare, seconds
from clipfast.dataset.arrays import ArrayWriter, files
from clipfast.dataset.images_table import ImageTable
from clipfast.dataset.manifest import Manifest, Record, Settings
from clipfast.dataset.merging import save_basis
from clipfast.dataset.opening import Dataset
from clipfast.dataset.plan import Unit, write_plan
from clipfast.dataset.samples import Sample, Status

QUESTION = "store"
SENTENCE = "What do the codes of an image take on disk, and what does reading one head cost?"
KB_PER_IMAGE, TIMES_FASTER = 50.0, 10.0
"""The most kB of an image of a ViT-L-14, and by how much one head is to be read faster than all."""
DRAWN, BATCH = 8, 512


class Units:
    """The input of the collection: shards that nobody reads.

    Args:
        images: of all.
        size: of each but the last.
    """

    def __init__(self, images: int, size: int) -> None:
        self.name = "store"
        self.sizes = [min(size, images - first) for first in range(0, images, size)]

    def units(self, size: int) -> Iterator[Unit]:
        """A unit per shard."""
        for number in range(len(self.sizes)):
            yield Unit("shard", f"/data/{number:05}.tar")

    def read(self, unit: Unit) -> Iterator[Sample]:
        """Nothing: the codes are not computed from images."""
        raise NotImplementedError

    names = read


def real_codes(model: clipfast.Model) -> clipfast.Contributions:
    """The contributions of some drawn photographs."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        return model.decompose(photographs.draw(Path(folder), DRAWN))


def batches(real: clipfast.Contributions, images: int, seed: int) -> Iterator[clipfast.Contributions]:
    """Codes of the sizes that those of real images have."""
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, images, BATCH):
        count = min(BATCH, images - first)
        batch = real.select([number % len(real) for number in range(count)])
        yield replace(batch, codes=torch.randn(batch.codes.shape, generator=generator).mul_(batch.codes))


def collection(
    folder: Path, model: clipfast.Model, real: clipfast.Contributions, units: Units
) -> tuple[Manifest, float]:
    """Writes the collection; returns it and how many seconds its arrays and tables took to write."""
    plan = write_plan(folder, [units], 0)
    save_basis(model.basis(), model.layers, folder)
    described = {"layers": model.layers, "heads": model.heads, "name": model.name, "weights": model.fingerprint()}
    images = {"names": [units.name], "digest": plan.digest, "units": plan.count}
    kept = {"codes": "float16", "class_codes": None, "terms": None, "embeddings": None}
    manifest = Manifest.create(folder, Settings(described, {}, kept, BATCH, 0, {}, images))
    spent = 0.0
    for number, size in enumerate(units.sizes):
        own, done = manifest.new_folder(number), 0
        writer, table = ArrayWriter(own, kept), ImageTable(own)
        for batch in batches(real, size, number):
            names = [f"{number:05}.tar/{done + place:09}.jpg" for place in range(len(batch))]
            samples = [Sample(f"/data/{name}", f"/data/{number:05}.tar", name[-13:], label="label") for name in names]
            started = time.perf_counter()
            writer.add(batch)
            table.add(samples, batch)
            spent += time.perf_counter() - started
            done += len(batch)
        started = time.perf_counter()
        writer.finish()
        table.finish()
        spent += time.perf_counter() - started
        manifest.write(Record(number, own.name, {Status.OK: size}, files(own)))
    return manifest, spent


def one_head(data: Dataset) -> np.ndarray:
    """The codes of the last layer's first head, ``[images, dim]``."""
    return data.read("codes", layers=[-1], heads=[0])[:, 0, 0]


def everything(data: Dataset) -> np.ndarray:
    """Reads all codes block by block; returns those of :func:`one_head`."""
    return np.concatenate([data.read("codes", rows)[:, -1, 0] for rows in data.blocks()])


def cold(folder: Path) -> None:
    """Has the system drop a folder's files from the page cache, as far as it does that."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def expected_head(real: clipfast.Contributions, units: Units) -> Tensor:
    """What :func:`one_head` is to give, from the numbers that were written."""
    codes = [
        batch.codes[:, -1, 0].half() for number, size in enumerate(units.sizes) for batch in batches(real, size, number)
    ]
    return torch.cat(codes)


def measure(model_name: str, images: int, unit_size: int, pairs: int, temporary: Path | None, out: Path) -> list[Bar]:
    """Makes and measures a collection, writes the result, and removes the collection.

    Args:
        model_name: whose codes.
        images: how many.
        unit_size: images of a unit, as of a shard.
        pairs: how often one head and everything are read.
        temporary: where the collection is made.
        out: the folder of the result.
    """
    model = clipfast.wrap(cases.module(model_name, "cpu"))
    real, units = real_codes(model), Units(images, unit_size)
    with tempfile.TemporaryDirectory(dir=temporary) as place:
        manifest, spent = collection(Path(place), model, real, units)
        size = sum(size for record in manifest.records() for size, _ in record.files.values())
        codes = sum(size for record in manifest.records() for name, (size, _) in record.files.items() if "/" in name)
        raw = images * real.codes[0].numel() * 2
        expected = expected_head(real, units).numpy()

        def verify() -> list[Check]:
            data = Dataset(Path(place))
            return [
                Check(name, float(np.abs(read(data).astype(np.float32) - expected.astype(np.float32)).max()), 0.0)
                for name, read in (("one head against what was written", one_head), ("everything", everything))
            ]

        comparison = compare(
            lambda: one_head(Dataset(Path(place))),
            lambda: everything(Dataset(Path(place))),
            verify,
            count=pairs,
            warmup=1,
        )
        dropped = []
        for read in (one_head, everything):
            cold(Path(place))
            dropped.append(seconds(lambda read=read: read(Dataset(Path(place)))))  # type: ignore[misc]
    bars = (
        Bar(f"{model_name}: kB per image, table of images included", size / images / 1e3, KB_PER_IMAGE, at_least=False),
        Bar("one head: times as fast as everything", comparison.ratio, TIMES_FASTER, at_least=True),
    )
    figures = {
        "bytes_per_image": {"all": size / images, "codes": codes / images, "raw": raw / images},
        "share_of_raw": codes / raw,
        "written_mb_per_s": raw / spent / 1e6,
        "everything_read_mb_per_s": raw / min(comparison.seconds_b) / 1e6,
        "not_in_the_page_cache": {
            "one_head_s": dropped[0],
            "everything_s": dropped[1],
            "ratio": dropped[1] / dropped[0],
        },
    }
    shape = "×".join(map(str, real.codes.shape[1:]))
    settings = {"model": model_name, "images": images, "unit_size": unit_size, "dtype": "float16", "codes": shape}
    settings |= {"real_images": len(real), "noise": "each number times one from N(0, 1)", "device": "cpu"}
    results = Results(QUESTION, SENTENCE, folder=out)
    case = f"{model_name}, {images} images"
    results.compared(case, comparison, a="one head", b="everything", settings=settings, bars=bars, figures=figures)
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    return list(bars)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints and writes the result; returns 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="benchmarks.store", description="Size and speed of codes on disk.")
    parser.add_argument("--model", default="ViT-L-14", help="whose codes (ViT-L-14)")
    parser.add_argument("--images", type=int, default=50_000, help="number of images (50000)")
    parser.add_argument("--unit-size", type=int, default=10_000, help="images of a unit (10000)")
    parser.add_argument("--pairs", type=int, default=7, help="how often each side is read (7)")
    parser.add_argument("--temporary", type=Path, default=None, help="where the collection is made")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the result")
    options = parser.parse_args(arguments)
    bars = measure(options.model, options.images, options.unit_size, options.pairs, options.temporary, options.out)
    for bar in bars:
        print(bar)
    return 0 if all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
