"""Options of ``clipfast stats``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from clipfast.commands.options import Flag, InputOptions


@dataclass(frozen=True)
class Options:
    """Pass over images once and keep what the analyses need; continues where it was stopped.

    Attributes:
        inputs: The images and the model.
        out: Folder for the collection.
        moments_only: Keep no image's contributions: enough for naming heads.
        json: Print the JSON instead of the table.
    """

    inputs: InputOptions = InputOptions()
    _: KW_ONLY
    out: Path = Path("out/stats")
    moments_only: Flag = False
    json: Flag = False
