"""Options of ``clipfast retrieve``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from clipfast.commands.options import Flag, InputOptions, Positive, Texts


@dataclass(frozen=True)
class Options:
    """Find the nearest images by what heads write; without queries, judge heads by labels.

    Attributes:
        inputs: The images and the model.
        heads: Such as L11.H3 or L10-L11; their outputs are added. To judge: each of these. Default there: all.
        query: One of the images, by path or name, or any other image file; repeat.
        text: A text as query; repeat.
        top: Neighbours of each query.
        measure: How outputs are compared.
        centred: Compare outputs less their mean over the images.
        faiss: Search with faiss, which is an extra to install.
        sample: Without queries: how many images, spread evenly, are used as queries.
        out: Folder for retrieve.json and sheets.
        json: Print the JSON instead of the table.
    """

    inputs: InputOptions = InputOptions()
    _: KW_ONLY
    heads: str | None = None
    query: Texts = ()
    text: Texts = ()
    top: Positive = 5
    measure: Literal["cosine", "dot"] = "cosine"
    centred: Annotated[bool, Parameter(negative="--not-centred")] = True
    faiss: Flag = False
    sample: Positive = 2000
    out: Path = Path("out/retrieve")
    json: Flag = False
