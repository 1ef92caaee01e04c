"""What a pass over many images takes: hours, bytes and network, by arithmetic alone, from a rate that was measured.

Everything here is a count, or a count times the rate: no part of it is fitted. Two parts are bounds. Arrays are counted
before compression, so they take at most as much on the disk. And the pass takes as long as its slowest worker, which
computes one unit more than others where the units cannot be divided evenly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

_FLOAT64 = 8
_SHARED = 3  # numbers of a code in the moments that every head has: 1, μ and σ
_ITEM = {"float16": 2, "float32": 4}

TABLE_BYTES = 48
"""Bytes of an image's row in ``images.parquet``, compressed: 32 where names are numbers, more where they are random."""
RECORD_BYTES = 10_000
"""Bytes of a unit's record and of the metadata of its arrays."""


@dataclass(frozen=True)
class Shape:
    """How many numbers a decomposition has.

    Attributes:
        layers: with heads.
        heads: of each layer.
        code: numbers of a head's code.
        terms: that are no heads: start, every MLP, rest.
        embed: numbers of an embedding.
        class_token: whether the class token's part of the codes is there, too.
    """

    layers: int
    heads: int
    code: int
    terms: int
    embed: int
    class_token: bool = True

    def numbers(self) -> dict[str, int]:
        """Numbers of each array that can be kept, per image."""
        codes = self.layers * self.heads * self.code
        return {
            "codes": codes,
            "class_codes": codes if self.class_token else 0,
            "terms": self.terms * self.embed,
            "embeddings": self.embed,
        }

    def moments(self) -> int:
        """Bytes of the moments of a unit, whatever the number of its images."""
        groups, columns = self.layers * self.heads, self.code + _SHARED
        sums = groups * columns * (2 + columns + (1 if self.class_token else 0))
        return _FLOAT64 * (sums + self.terms * self.embed)

    def basis(self) -> int:
        """Bytes of the model's part of every contribution, in float32; written once."""
        return _ITEM["float32"] * (self.layers * (self.heads * self.code + 1) + 2) * self.embed


@dataclass(frozen=True)
class Sizes:
    """Bytes that a pass writes.

    Attributes:
        per_image: by kind.
        per_unit: by kind.
        once: whatever the number of images.
    """

    per_image: Mapping[str, float]
    per_unit: Mapping[str, float]
    once: float = 0

    @classmethod
    def of(cls, shape: Shape, kept: Mapping[str, str | None]) -> "Sizes":
        """From the numbers of a model and the dtype of what is kept, before compression."""
        numbers = shape.numbers()
        arrays = {name: numbers[name] * _ITEM[dtype] for name, dtype in kept.items() if dtype and numbers[name]}
        return cls(
            {**arrays, "table": TABLE_BYTES},
            {"moments": shape.moments(), "records": RECORD_BYTES},
            shape.basis() + shape.moments(),
        )

    def written(self, images: int, units: int) -> dict[str, float]:
        """Bytes on the disk by kind, ``once`` left out."""
        return {name: size * images for name, size in self.per_image.items()} | {
            name: size * units for name, size in self.per_unit.items()
        }


@dataclass(frozen=True)
class Machines:
    """What computes.

    Attributes:
        count: how many machines.
        workers: of each: one per GPU, or per group of cores.
        rate: images per second of one worker, reading and writing included.
        start: seconds until a worker has loaded the model.
        disk: bytes per second that one process reads, for merging the moments at the end.
    """

    rate: float
    count: int = 1
    workers: int = 1
    start: float = 0
    disk: float = 500e6

    @property
    def all_workers(self) -> int:
        """Workers of all machines."""
        return self.count * self.workers


@dataclass(frozen=True)
class Estimate:
    """What a pass takes.

    Attributes:
        images: of the pass.
        units: of work.
        seconds: until every unit is computed.
        merge_seconds: for merging the moments of all units afterwards, by one process.
        read: bytes of images.
        written: bytes on the disk by kind.
        reading: bytes per second that one machine reads: over the network, where the images are elsewhere.
        writing: bytes per second that one machine writes: over the network, where the collection is elsewhere.
    """

    images: int
    units: int
    seconds: float
    merge_seconds: float
    read: float
    written: Mapping[str, float] = field(default_factory=dict)
    reading: float = 0
    writing: float = 0

    @property
    def disk(self) -> float:
        """Bytes of the collection."""
        return sum(self.written.values())

    @property
    def hours(self) -> float:
        """Until the pass is done, merging included."""
        return (self.seconds + self.merge_seconds) / 3600


def estimate(images: int, unit_images: int, image_bytes: float, sizes: Sizes, machines: Machines) -> Estimate:
    """What a pass takes.

    Args:
        images: of the pass.
        unit_images: images of a unit: of a tar shard, or of a range.
        image_bytes: mean size of an encoded image.
        sizes: of what it writes.
        machines: that compute.
    """
    units = -(-images // unit_images)
    rounds = -(-units // machines.all_workers)
    seconds = machines.start + rounds * min(unit_images, images) / machines.rate
    written = {**sizes.written(images, units), "once": sizes.once}
    made = Estimate(
        images=images,
        units=units,
        seconds=seconds,
        merge_seconds=units * sizes.per_unit.get("moments", 0) / machines.disk,
        read=images * image_bytes,
        written=written,
    )
    at_once = min(machines.workers, units) * machines.rate  # images per second of one machine
    per_image = sum(sizes.per_image.values()) + sum(sizes.per_unit.values()) / min(unit_images, images)
    return replace(made, reading=at_once * image_bytes, writing=at_once * per_image)
