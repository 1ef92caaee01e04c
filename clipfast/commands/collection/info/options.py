"""Options of ``clipfast collection info``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import Flag


@dataclass(frozen=True)
class Options:
    """Say what a collection holds: settings, images by status, units, bytes on disk, what is left to do.

    Attributes:
        collection: The folder.
        json: Print JSON instead of the table.
    """

    collection: Annotated[Path, Parameter(name="COLLECTION")]
    _: KW_ONLY
    json: Flag = False
