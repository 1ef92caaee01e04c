"""Options of ``clipfast collection validate``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import Flag


@dataclass(frozen=True)
class Options:
    """Check every file of a collection against its checksums; the exit code is 2 where one is damaged or missing.

    Attributes:
        collection: The folder.
        inputs: Read the shards, tables and files that the images came from, too: are they the same?
        json: Print JSON instead of lines.
    """

    collection: Annotated[Path, Parameter(name="COLLECTION")]
    _: KW_ONLY
    inputs: Flag = False
    json: Flag = False
