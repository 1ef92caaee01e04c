"""Options of ``clipfast models``."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from clipfast.commands.options import Flag


@dataclass(frozen=True)
class Options:
    """List the models that can be decomposed, say why others cannot, and describe one.

    Attributes:
        name: A name, or a model's folder, to describe; or part of names, to list those.
        package: Only models of this package; repeat.
        search: Only names that contain this text.
        all: List models that are refused, too, with the reasons.
        json: Print JSON instead of the table.
    """

    name: Annotated[str | None, Parameter(name="NAME")] = None
    _: KW_ONLY
    package: Annotated[
        Sequence[Literal["open_clip", "openai", "timm", "transformers"]], Parameter(show_default=False)
    ] = ()
    search: str | None = None
    all: Flag = False
    json: Flag = False
