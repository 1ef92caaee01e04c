"""Options of ``clipfast collection retry``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.collect.options import RunOptions
from clipfast.commands.options import Flag


@dataclass(frozen=True)
class Options:
    """Compute units of a collection again in which images were missing or could not be read, with its own settings.

    Units that are not computed yet are computed, too.

    Attributes:
        collection: The folder.
        changed: Compute units again whose shard, table or files have changed since, too.
        device: cpu, cuda or cuda:N. Default: CUDA where there is a device.
        run: Who computes.
        json: Print the JSON instead of the table.
    """

    collection: Annotated[Path, Parameter(name="COLLECTION")]
    _: KW_ONLY
    changed: Flag = False
    device: str | None = None
    run: RunOptions = RunOptions()
    json: Flag = False
