"""``clipfast retrieve``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli.app import command
from clipfast.cli.options import JsonOption, over_images
from clipfast.commands.options import Collecting


class Measure(StrEnum):
    """How outputs are compared."""

    cosine = "cosine"
    dot = "dot"


@command
@over_images
def retrieve(
    collecting: Collecting,
    heads: Annotated[
        str | None, typer.Option(help="Such as L11.H3 or L10-L11; their outputs are added. To judge: each, or all.")
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option(help="An image of these, by path or name, or any other image file; repeat.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text as query; repeat.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Neighbours of each query.")] = 5,
    measure: Annotated[Measure, typer.Option(help="How outputs are compared.")] = Measure.cosine,
    centred: Annotated[
        bool, typer.Option("--centred/--not-centred", help="Compare outputs less their mean over the images.")
    ] = True,
    faiss: Annotated[bool, typer.Option("--faiss", help="Search by faiss, which is an extra to install.")] = False,
    sample: Annotated[
        int, typer.Option(min=1, help="Without queries: how many images, spread evenly, ask for their neighbours.")
    ] = 2000,
    out: Annotated[Path, typer.Option(help="Folder for retrieve.json and sheets.")] = Path("out/retrieve"),
    as_json: JsonOption = False,
) -> int:
    """Find the nearest images by what heads write; without queries, judge heads by labels."""
    from clipfast.commands.retrieve.command import Options, run

    return run(
        Options(
            collecting,
            out,
            heads,
            query or (),
            text or (),
            top,
            "dot" if measure is Measure.dot else "cosine",
            centred,
            faiss,
            sample,
            as_json,
        )
    )
