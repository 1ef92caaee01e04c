"""Options of ``clipfast plan``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from clipfast.commands.collect.options import KeptOptions
from clipfast.commands.options import Dtype, Flag, Positive, Texts
from clipfast.errors import InputError

Amount = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Time = Annotated[float, Parameter(validator=validators.Number(gte=0))]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compute how long a pass over many images takes, and what it reads and writes, from a measured rate.

    The rate is that of ``--like``, a collection, or ``--rate``; without either it is measured here, on drawn images.

    Attributes:
        images: How many images, such as 100M or 5B; repeat. Default: 1M, 100M and 5B.
        like: A collection of the same model and data: its last run gives the rate, its files the bytes per image.
        model: An open_clip name (see ``clipfast models``), "scenes", or a model's folder. Default: the bundled model.
        rate: Images per second of one worker, reading and writing included.
        machines: How many machines compute.
        workers: Workers of each machine: one per GPU, or per group of cores.
        image_bytes: Mean size of an encoded image in bytes. Default: 100 kB, or that of the shards of --like.
        unit_images: Images of a tar shard, or of a range of files. Default: 10,000, or as in --like.
        start: Seconds until a worker has loaded the model.
        disk: Megabytes per second that one process reads, for merging the moments at the end.
        kept: What is kept of every image; with --like as there.
        batch_size: Images at once, where the rate is measured.
        device: Where the rate is measured: cpu, cuda or cuda:N. Default: CUDA where there is a device.
        dtype: Precision of the weights, where the rate is measured.
        seconds: How long the rate is measured, about.
        json: Print JSON instead of the table.
    """

    images: Texts = ()
    like: Path | None = None
    model: str | None = None
    rate: Amount | None = None
    machines: Positive = 1
    workers: Positive = 1
    image_bytes: Amount | None = None
    unit_images: Positive | None = None
    start: Time = 30.0
    disk: Amount = 500.0
    kept: KeptOptions = KeptOptions()
    batch_size: Positive = 8
    device: str | None = None
    dtype: Dtype = "fp32"
    seconds: Amount = 10.0
    json: Flag = False

    def check(self) -> None:
        """Checks what can be checked before anything is read.

        Raises:
            InputError: options that do not fit each other.
        """
        if self.like is not None and self.model is not None:
            raise InputError(f"--like {self.like} has a model already: leave --model out")
        if self.like is not None and self.kept != KeptOptions():
            raise InputError(f"--like {self.like} says what is kept: leave the options about that out")
