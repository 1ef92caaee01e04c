"""Options that several commands have in common."""

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from clipfast.commands.options import Collecting


class Dtype(StrEnum):
    """Precisions a model can be loaded in."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


class Centring(StrEnum):
    """How the mean of the final LayerNorm is split over the terms."""

    uniform = "uniform"
    termwise = "termwise"


_MODEL = "An open_clip name (see `clipfast models`), a model's folder, or hf-hub:REPOSITORY"
ModelOption = Annotated[str, typer.Option(help=f"{_MODEL}.")]
PretrainedOption = Annotated[str | None, typer.Option(help="A tag of open_clip, or a checkpoint's path.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images at once.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; CUDA when there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the weights.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the JSON instead of the table.")]
PoolOption = Annotated[
    str, typer.Option(help="general, classes, common_words, scenes, random, or a file with one text per line.")
]
SizeOption = Annotated[int, typer.Option("--size", "-m", min=1, help="Texts per head.")]


def _before(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, folders, tar shards; or one folder that `clipfast stats` wrote.")
    ],
    model: Annotated[
        str | None, typer.Option(help=f"{_MODEL}; the bundled one, or the one a folder was collected with.")
    ] = None,
    pretrained: PretrainedOption = None,
    labels: Annotated[
        str | None, typer.Option(help="Where labels are: folder, shard, or a CSV file with a column `file`.")
    ] = None,
    label_column: Annotated[str, typer.Option(help="The column with labels.")] = "label",
    group_column: Annotated[str | None, typer.Option(help="The column with groups.")] = None,
) -> None: ...


def _after(
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the weights; fp32.")] = None,
) -> None: ...


def over_images(function: Callable[..., int]) -> Callable[..., int]:
    """Gives a command the options of a pass over images, which it gets as one argument, ``collecting``."""
    first, last = (list(inspect.signature(each).parameters.values()) for each in (_before, _after))
    own = [each for each in inspect.signature(function).parameters.values() if each.name != "collecting"]
    shared = [each.name for each in (*first, *last)]

    @functools.wraps(function)
    def gathered(**arguments: Any) -> int:
        given = {name: arguments.pop(name) for name in shared}
        if given["dtype"] is not None:
            given["dtype"] = given["dtype"].value
        return function(collecting=Collecting(**given), **arguments)

    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*first, *own, *last)]
    gathered.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
    gathered.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": int}
    del gathered.__wrapped__  # type: ignore[attr-defined]  # the annotations are these, not the function's
    return gathered
