"""Options of ``clipfast stats``, the earlier name of ``clipfast collect``."""

from dataclasses import dataclass
from pathlib import Path

from clipfast.commands.collect.options import Options as CollectOptions


@dataclass(frozen=True)
class Options(CollectOptions):
    """The earlier name of ``clipfast collect``, for this version only.

    Attributes:
        out: Folder for the collection.
    """

    out: Path = Path("out/stats")
