"""Options of ``clipfast decompose``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from clipfast.commands.options import Dashed, Flag, ImageOptions, Texts

Centring = Literal["uniform", "termwise"]
Depth = Literal["all", "pool"]


@dataclass(frozen=True)
class Options:
    """Decompose the embeddings of images: contributions, text maps, a panel per image, a summary.

    Attributes:
        inputs: The images and the model.
        texts: A text to score and to draw a map for; repeat.
        texts_file: A file with one text per line.
        out: Folder for the results.
        layers: Layers whose heads are kept, such as "-4,-3,-2,-1". Default: all.
        per_head: Draw a map per head, too.
        tokens: Keep what every token contributes through every head.
        centring: How the mean of the final LayerNorm is split over the terms.
        depth: Whose heads: those of the blocks ("all") or those of the pooling ("pool"). Default: "pool" where an
            attention pool reads the tokens, else "all".
        panels: Draw pictures, or none.
    """

    inputs: ImageOptions = ImageOptions()
    _: KW_ONLY
    texts: Texts = ()
    texts_file: Path | None = None
    out: Path = Path("out/decompose")
    layers: Dashed = None
    per_head: Flag = False
    tokens: Flag = False
    centring: Centring = "uniform"
    depth: Depth | None = None
    panels: Annotated[Flag, Parameter(negative="--no-panels")] = True
