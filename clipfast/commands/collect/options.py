"""Options of ``clipfast collect``, and those of other commands that run a pass."""

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from clipfast.commands.options import Flag, InputOptions, NonNegative, Positive, Texts
from clipfast.errors import InputError

StoreDtype = Literal["float16", "float32"]
Share = Annotated[float, Parameter(validator=validators.Number(gte=0, lte=1))]
Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0))]


@Parameter(name="*")
@dataclass(frozen=True)
class DataOptions(InputOptions):
    """Which data, by which model, with which labels.

    Attributes:
        images: Folders, image files, tar shards (.tar, compressed or not), Parquet and Arrow tables, lists of paths
            (.txt, .csv, .tsv, .jsonl), as paths or URLs (s3://, hf://, https://), with * and {000..099}.
        model: An open_clip name (see ``clipfast models``), a model's folder, hf-hub:REPOSITORY or hf:REPOSITORY.
            Default: the bundled model.
        dtype: Precision of the weights. Default: fp32.
        image_size: Height and width of the model's input in pixels, such as 336x672, or 336 for a square; positions are
            interpolated. Default: the model's own.
        labels: Where labels are: folder (the first folder below the one that was searched), parent (the folder that
            the image is in), shard (members of the tar shard), columns (of the table or list), or a CSV file with a
            column that names the images.
        image_column: The column of tables and lists with images, paths or URLs. Default: one with a usual name.
        id_column: The column of tables and lists that names the images. Default: the path, or the number of the row.
    """

    images: Annotated[Sequence[str], Parameter(show_default=False)] = ()  # type: ignore[assignment]
    _: KW_ONLY
    image_column: str | None = None
    id_column: str | None = None

    def check(self) -> None:
        """As :meth:`.InputOptions.check`."""
        if not self.images:
            raise InputError("no images were given: name folders, image files, tar shards, tables or lists of paths")
        super().check()


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class KeptOptions:
    """What is kept of every image.

    Attributes:
        codes: Keep every head's code, from which its contribution follows.
        class_codes: Keep the class token's own part of the codes, where the model has a class token.
        terms: Keep the contributions that are no head's: start, every MLP, rest.
        embeddings: Keep image embeddings, in float32.
        moments_only: Keep none of these: enough for naming heads.
        store_dtype: Precision of what is kept. Default: float16, or float32 with --upgrade, which keeps every bit.
    """

    codes: Annotated[bool, Parameter(negative="--no-codes")] = True
    class_codes: Annotated[bool, Parameter(negative="--no-class-codes")] = True
    terms: Annotated[bool, Parameter(negative="--no-terms")] = True
    embeddings: Annotated[bool, Parameter(negative="--no-embeddings")] = True
    moments_only: Flag = False
    store_dtype: StoreDtype | None = None

    def kept(self) -> dict[str, str | None]:
        """The dtype in which each array is kept; None for one that is not."""
        wanted = {name: getattr(self, name) and not self.moments_only for name in ("codes", "class_codes", "terms")}
        dtype = self.store_dtype or "float16"
        dtypes: dict[str, str | None] = {name: dtype if keep else None for name, keep in wanted.items()}
        return dtypes | {"embeddings": "float32" if self.embeddings and not self.moments_only else None}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Who computes, and what is seen of it.

    Attributes:
        engine: serial (in this process), local (processes of this machine) or ray (actors of a Ray cluster). Default:
            local for several workers or devices, else serial.
        workers: How many processes or actors compute. Default: one per CUDA device, or per group of cores.
        threads: Threads of each worker. Default: the cores divided by the workers.
        devices: Where workers compute, in turn, such as cuda:0,cuda:1; with commas or repeated. Default: all CUDA
            devices, or the CPU.
        ray_address: Address of a Ray cluster that runs already, such as auto or ray://HOST:10001.
        max_error_rate: End the pass when a larger share of images fails.
        interval: Seconds between two lines about the progress where stderr is no terminal.
        log_to: Write the progress for tensorboard, into the collection, or wandb, too.
    """

    engine: Literal["serial", "local", "ray"] | None = None
    workers: Positive | None = None
    threads: Positive | None = None
    devices: Texts = ()
    ray_address: str | None = None
    max_error_rate: Share = 1.0
    interval: Seconds = 10.0
    log_to: Literal["tensorboard", "wandb"] | None = None

    def check(self) -> None:
        """Checks what can be checked before anything is read.

        Raises:
            InputError: options that do not fit each other.
        """
        if self.ray_address is not None and self.engine not in (None, "ray"):
            raise InputError(f"--ray-address is for --engine ray, not {self.engine}: leave it out")
        if self.engine == "serial" and ((self.workers or 1) > 1 or len(self.places()) > 1):
            raise InputError("--engine serial is one worker in this process: take --engine local for several")
        if self.devices and not all(self.places()):
            raise InputError(f"--devices is {','.join(self.devices)!r}: give devices with commas between")

    def places(self) -> list[str]:
        """The devices that were named."""
        return [place.strip() for text in self.devices for place in text.split(",")]


@dataclass(frozen=True)
class Options:
    """Pass over images once and keep what the analyses need; continues where it was stopped.

    Attributes:
        data: The images and the model.
        out: Folder for the collection.
        kept: What is kept of every image.
        preprocess: exact, as the model's own package prepares images; or fast, which decodes JPEGs at a reduced size.
        unit_size: Images that are computed as one unit of work, where they are not in shards. Default: 1024.
        num_shards: Divide the pass into so many parts, for jobs that cannot talk to each other, each in a folder of its
            own in that of --out; ``clipfast collection merge`` joins them.
        shard_index: Compute this part, from 0.
        retry_failed: Compute units again in which images were missing or could not be read.
        upgrade: Rewrite a collection of an earlier version, given in place of images, into the folder of --out.
        run: Who computes.
        json: Print the JSON instead of the table.
    """

    data: DataOptions = DataOptions()
    _: KW_ONLY
    out: Path = Path("out/collection")
    kept: KeptOptions = KeptOptions()
    preprocess: Literal["exact", "fast"] = "exact"
    unit_size: Positive | None = None
    num_shards: Positive | None = None
    shard_index: NonNegative | None = None
    retry_failed: Flag = False
    upgrade: Flag = False
    run: RunOptions = RunOptions()
    json: Flag = False

    def check(self) -> None:
        """Checks what can be checked before anything is read.

        Raises:
            InputError: no images, or options that do not fit each other.
        """
        self.data.check()
        self.run.check()
        if (self.num_shards is None) != (self.shard_index is None):
            raise InputError("--num-shards and --shard-index belong together: give both or neither")
        index, count = self.shard()
        if index >= count:
            raise InputError(f"--shard-index is {index}: with --num-shards {count} give 0 to {count - 1}")
        if self.upgrade and len(self.data.images) != 1:
            raise InputError(f"--upgrade takes one collection of an earlier version, not {len(self.data.images)} paths")

    def shard(self) -> tuple[int, int]:
        """Index and number of the parts that the pass is divided into."""
        return self.shard_index or 0, self.num_shards or 1

    def collection(self) -> Path | None:
        """The one folder that was given, where there is only one name and it is a folder."""
        [name, *others] = self.data.images
        return Path(name) if not others and os.path.isdir(name) else None
