"""``clipfast ablate``."""

from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli.app import command
from clipfast.cli.options import ClassesOption, JsonOption, PoolOption, PromptOption, over_images
from clipfast.commands.options import Collecting


@command
@over_images
def ablate(
    collecting: Collecting,
    classes: ClassesOption = None,
    prompt: PromptOption = None,
    terms: Annotated[
        list[str] | None, typer.Option(help='What to ablate together, such as "mlps, L10.H3"; repeat for others.')
    ] = None,
    means: Annotated[
        Path | None, typer.Option(help="A folder of `clipfast stats` whose means are taken; the images' own.")
    ] = None,
    words: Annotated[
        list[str] | None, typer.Option(help="Remove heads whose texts contain this word or another; repeat.")
    ] = None,
    pool: PoolOption = "general",
    heads: Annotated[str | None, typer.Option(help="Heads to choose from; those of the last four layers.")] = None,
    top: Annotated[int, typer.Option(min=1, help="With --words: how many of a head's texts count.")] = 5,
    at_least: Annotated[int, typer.Option(min=1, help="With --words: how many of these must contain one.")] = 3,
    contrast: Annotated[
        int | None, typer.Option(min=1, help="Remove so many heads that differ most between groups of a class.")
    ] = None,
    greedy: Annotated[
        int | None, typer.Option(min=1, help="Remove up to so many heads, each the best for the worst group.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="For these two: a folder of `clipfast stats` with labels and groups.")
    ] = None,
    reconstruct: Annotated[
        int | None, typer.Option(min=1, help="Replace heads by what up to so many texts span.")
    ] = None,
    rest_ablated: Annotated[
        bool, typer.Option("--rest-ablated", help="With --reconstruct: ablate MLPs and all other heads, too.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the pool of random vectors.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for ablate.json.")] = Path("out/ablate"),
    as_json: JsonOption = False,
) -> int:
    """Replace terms by their mean: what zero-shot accuracy needs, and which heads to remove for the worst group."""
    from clipfast.commands.ablate.choosing import Choosing
    from clipfast.commands.ablate.command import Options, run

    choosing = Choosing(words or (), pool, heads, top, at_least, contrast, greedy, validation, seed)
    return run(
        Options(
            collecting,
            out,
            classes=classes,
            prompt=prompt or (),
            terms=terms or (),
            means=means,
            choosing=choosing,
            reconstruct=reconstruct,
            rest_ablated=rest_ablated,
            json=as_json,
        )
    )
