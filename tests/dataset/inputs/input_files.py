"""Files for the tests of inputs: encoded images, tar shards, and what a reading gives."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from clipfast.dataset.inputs.reading import Reading
from clipfast.dataset.plan import Input, Unit, UnitError
from clipfast.dataset.samples import Sample
from clipfast.images import decode_image, open_image


def picture(level: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (level, level, level))


def encoded(level: int, kind: str = "png") -> bytes:
    file = io.BytesIO()
    picture(level).save(file, kind)
    return file.getvalue()


Members = Mapping[str, bytes] | Iterable[tuple[str, bytes]]


def tar_bytes(members: Members, form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def shard(path: Path, members: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members, form))
    return path


class Given(NamedTuple):
    """What a reading gave."""

    samples: list[Sample]
    error: UnitError | None
    reading: Reading

    @property
    def good(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.failure is None]

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self.good]

    @property
    def failures(self) -> dict[str, str]:
        return {sample.id: str(sample.failure.status) for sample in self.samples if sample.failure is not None}


def given(reading: Reading) -> Given:
    samples: list[Sample] = []
    problem: UnitError | None = None
    try:
        for sample in reading:
            samples.append(sample)
    except UnitError as error:
        problem = error
    assert "\n" not in str(problem)
    return Given(samples, problem, reading)


def everything(source: Input, size: int = 100) -> Given:
    """All samples of an input, the first error, and the last reading."""
    samples: list[Sample] = []
    first: UnitError | None = None
    last: Given | None = None
    for unit in source.units(size):
        last = read(source, unit)
        samples += last.samples
        first = first or last.error
    assert last is not None
    return Given(samples, first, last.reading)


def read(source: Input, unit: Unit) -> Given:
    reading = source.read(unit)
    assert isinstance(reading, Reading)
    return given(reading)


def level(sample: Sample) -> int:
    """The grey value of a sample's image."""
    if isinstance(sample.content, Image.Image):
        return max(extreme for _, extreme in sample.content.convert("RGB").getextrema())
    image = open_image(sample.path) if sample.content is None else decode_image(io.BytesIO(sample.content), sample.id)
    return max(extreme for _, extreme in image.getextrema())
