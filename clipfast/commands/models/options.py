"""Options of ``clipfast models``."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import Flag


@dataclass(frozen=True)
class Options:
    """List the models that can be decomposed, and say why others cannot.

    Attributes:
        filter: Part of a name.
        all: List models that are refused, too, with the reasons.
        json: Print JSON instead of the table.
    """

    filter: Annotated[str | None, Parameter(name="FILTER")] = None
    _: KW_ONLY
    all: Flag = False
    json: Flag = False
