"""Options of ``clipfast collection merge``."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import Flag


@dataclass(frozen=True)
class Options:
    """Make one collection of the parts of a pass (``--num-shards``), or of passes over different images.

    Attributes:
        parts: The folders of the parts. Default: those in the folder of --out.
        out: Folder for the whole collection.
        allow_duplicates: Join data sets that have images of the same name.
        json: Print the JSON of the heads instead of the table.
    """

    parts: Annotated[Sequence[Path], Parameter(name="PART", show_default=False)] = ()
    _: KW_ONLY
    out: Path = Path("out/collection")
    allow_duplicates: Flag = False
    json: Flag = False
