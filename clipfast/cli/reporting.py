"""``clipfast report``."""

from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli.app import command
from clipfast.cli.options import ClassesOption, PoolOption, PromptOption, SizeOption, over_images
from clipfast.commands.options import Collecting


@command
@over_images
def report(
    collecting: Collecting,
    pool: PoolOption = "general",
    size: SizeOption = 20,
    heads: Annotated[str | None, typer.Option(help="Heads to name, such as L10-L11 or L11.H3; all.")] = None,
    classes: ClassesOption = None,
    prompt: PromptOption = None,
    top: Annotated[int, typer.Option(min=1, help="Images with the highest scores, for a head's first texts.")] = 5,
    random: Annotated[int, typer.Option(min=0, help="Images drawn at random beside them.")] = 5,
    thumbnails: Annotated[int, typer.Option(min=0, help="Different images in the page at most.")] = 1500,
    thumbnail_size: Annotated[int, typer.Option(min=16, max=512, help="Their longer side in pixels.")] = 80,
    maps: Annotated[int, typer.Option(min=0, help="Heads with a map, those that vary most.")] = 100,
    examples: Annotated[int, typer.Option(min=0, help="Images with maps for classes.")] = 6,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the pool of random vectors.")] = 0,
    out: Annotated[Path, typer.Option(help="The page, or a folder for report.html.")] = Path("out/report"),
) -> int:
    """Write one HTML page of what heads and layers do: texts, images, maps, ablations; it needs no network."""
    from clipfast.commands.report.command import Options, run
    from clipfast.commands.report.pictures import Showing

    return run(
        Options(
            collecting,
            out,
            pool=pool,
            size=size,
            heads=heads,
            classes=classes,
            prompt=prompt or (),
            showing=Showing(top, random, thumbnails, thumbnail_size, maps, examples),
            title=title,
            seed=seed,
        )
    )
