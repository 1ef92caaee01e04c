"""Options of ``clipfast demo``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import NonNegative, Paths


@dataclass(frozen=True)
class Options:
    """Show what the bundled model sees in scenes it draws, and in photographs.

    Attributes:
        photos: Photographs to look at too: files or folders.
        out: Folder for the panels.
        scenes: How many scenes to draw.
        seed: Which scenes to draw.
        model: Another model than the bundled one.
        image_size: Height and width of the model's input in pixels, such as 64x96, or one side. Default: 64.
    """

    photos: Paths = ()
    _: KW_ONLY
    out: Path = Path("out/demo")
    scenes: NonNegative = 6
    seed: NonNegative = 0
    model: Annotated[str, Parameter(show=False)] = "scenes"
    image_size: str | None = None
