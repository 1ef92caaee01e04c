"""Options of ``clipfast textspan``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import Flag, InputOptions, PoolOptions, Positive


@dataclass(frozen=True)
class Options:
    """Name heads by the texts that span what they write (TEXTSPAN).

    Attributes:
        inputs: The images and the model.
        naming: The texts.
        size: Texts per head.
        heads: Heads to name, such as L10-L11 or L11.H3. Default: those of the last four layers.
        method: greedy (TEXTSPAN) or omp.
        rank: Dimensions of a head's outputs that count. Default: all.
        weights: Name heads by their weights alone, without images.
        out: Folder for textspan.json.
        json: Print the JSON instead of the table.
    """

    inputs: InputOptions = InputOptions()
    naming: PoolOptions = PoolOptions()
    _: KW_ONLY
    size: Annotated[Positive, Parameter(name=("--size", "-m"))] = 20
    heads: str | None = None
    method: str = "greedy"
    rank: Positive | None = None
    weights: Flag = False
    out: Path = Path("out/textspan")
    json: Flag = False
