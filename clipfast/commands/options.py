"""Options that several commands share, and the types that options are written with; nothing heavy is imported here.

Every command has a dataclass ``Options`` in its folder's ``options.py``. It is the only definition of the command's
options: the command line parses into it (``Attributes`` of its docstring are the help texts), Python code makes one
and calls the command's ``run``.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from clipfast.errors import InputError

MODEL = "scenes"
DTYPE: "Dtype" = "fp32"

Dtype = Literal["fp32", "bf16", "fp16", "fp64"]
Flag = Annotated[bool, Parameter(show_default=False)]
Texts = Annotated[Sequence[str], Parameter(show_default=False)]
Paths = Annotated[Sequence[Path], Parameter(show_default=False)]
Positive = Annotated[int, Parameter(validator=validators.Number(gte=1))]
NonNegative = Annotated[int, Parameter(validator=validators.Number(gte=0))]
Dashed = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
"""Text that may begin with a hyphen, such as ``-4,-3``."""


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width that ``--image-size`` names.

    Raises:
        InputError: anything else than one or two whole numbers above zero.
    """
    if text is None:
        return None
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and int(side) for side in sides):
        raise InputError(f"--image-size is {text!r}: give HEIGHTxWIDTH in pixels, such as 336x672, or one side")
    return int(sides[0]), int(sides[-1])


def size_text(size: Sequence[int]) -> str:
    """Height and width as :func:`parse_size` takes them."""
    return "x".join(map(str, size))


@Parameter(name="*")
@dataclass(frozen=True)
class ImageOptions:
    """Which images, by which model.

    Attributes:
        images: Image files, folders, tar shards.
        model: An open_clip name (see ``clipfast models``), a model's folder, hf-hub:REPOSITORY or hf:REPOSITORY.
            Default: the bundled model.
        pretrained: A tag of open_clip, or a checkpoint's path.
        batch_size: Images at once.
        device: cpu, cuda or cuda:N. Default: CUDA where there is a device.
        dtype: Precision of the weights. Default: fp32.
        image_size: Height and width of the model's input in pixels, such as 336x672, or 336 for a square; positions are
            interpolated. Default: the model's own.
    """

    images: Paths = ()
    _: KW_ONLY
    model: str | None = None
    pretrained: str | None = None
    batch_size: Positive = 8
    device: str | None = None
    dtype: Dtype | None = None
    image_size: str | None = None

    def check(self) -> None:
        """Checks what can be checked before anything is read.

        Raises:
            InputError: no images.
        """
        if not self.images:
            raise InputError("no images were given: name image files, folders or tar shards")


@Parameter(name="*")
@dataclass(frozen=True)
class InputOptions(ImageOptions):
    """Which images, by which model, with which labels.

    Attributes:
        images: Image files, folders, tar shards; or one folder that ``clipfast collect`` wrote, a collection.
        model: An open_clip name (see ``clipfast models``), a model's folder, hf-hub:REPOSITORY or hf:REPOSITORY.
            Default: the bundled model, or the model that the collection was made with.
        dtype: Precision of the weights. Default: fp32, or that of the collection.
        image_size: Height and width of the model's input in pixels, such as 336x672, or 336 for a square; positions are
            interpolated. Default: the model's own, or that of the collection.
        labels: Where labels are: folder (the first folder below the one that was searched), parent (the folder that
            the image is in), shard (members of the tar shard), or a CSV file with a column that names the images.
        label_column: The column with labels.
        group_column: The column with groups, or several with commas (y,place), whose combinations are the groups.
        file_column: The column that names the images. Default: file, path, image, filename or another that does.
        where: Keep only the images whose row has this value, such as split=2; repeat.
    """

    _: KW_ONLY
    labels: str | None = None
    label_column: str = "label"
    group_column: str | None = None
    file_column: str | None = None
    where: Texts = ()

    def check(self) -> None:
        """Checks what can be checked before anything is read.

        Raises:
            InputError: no images, or a column is named without ``labels``.
        """
        super().check()
        columns = {
            "--label-column": self.label_column != InputOptions.label_column,
            "--group-column": self.group_column is not None,
            "--file-column": self.file_column is not None,
            "--where": bool(self.where),
        }
        for option, is_set in columns.items():
            if is_set and self.labels is None:
                raise InputError(f"{option} names a column of --labels, which is not given")
        if self.group_column is not None and not all(self.group_columns()):
            raise InputError(
                f"--group-column is {self.group_column!r}: give columns with commas between, such as y,place"
            )

    def group_columns(self) -> list[str]:
        """The columns whose combinations are the groups; none without groups."""
        return [] if self.group_column is None else [column.strip() for column in self.group_column.split(",")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ClassOptions:
    """The texts that stand for the classes of labelled images.

    Attributes:
        classes: A CSV file with columns ``label`` and ``text``, several texts per label allowed. Default: the labels
            that occur.
        prompt: A template such as "a photo of a {}.", into which every text of a class is put; repeat.
        templates: A set of templates by name (plain, simple, imagenet), or a file with one per line; repeat. The
            features of all texts of a class are averaged.
    """

    classes: Path | None = None
    prompt: Texts = ()
    templates: Texts = ()

    def is_set(self) -> bool:
        """Whether any of these options is set."""
        return self.classes is not None or bool(self.prompt) or bool(self.templates)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """The texts that heads are named by.

    Attributes:
        pool: general, classes, common_words, scenes, random, or a file with one text per line.
        seed: Seed of the pool of random vectors.
    """

    pool: str = "general"
    seed: NonNegative = 0
