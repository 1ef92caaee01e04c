"""``clipfast stats`` and ``clipfast textspan``."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli.app import command
from clipfast.cli.options import JsonOption, PoolOption, SizeOption, over_images
from clipfast.commands.options import Collecting


@command
@over_images
def stats(
    collecting: Collecting,
    out: Annotated[Path, typer.Option(help="Folder for the collection.")] = Path("out/stats"),
    moments_only: Annotated[
        bool, typer.Option("--moments-only", help="Keep no image's contributions: enough for naming heads.")
    ] = False,
    as_json: JsonOption = False,
) -> int:
    """Pass over images once and keep what the analyses need; goes on where it was stopped."""
    from clipfast.commands.stats import Options, run

    return run(Options(replace(collecting, moments_only=moments_only), out, as_json))


@command
@over_images
def textspan(
    collecting: Collecting,
    pool: PoolOption = "general",
    size: SizeOption = 20,
    heads: Annotated[str | None, typer.Option(help="Such as L10-L11 or L11.H3; the last four layers.")] = None,
    method: Annotated[str, typer.Option(help="greedy (TEXTSPAN) or omp.")] = "greedy",
    rank: Annotated[int | None, typer.Option(min=1, help="Dimensions of a head's outputs that count; all.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the pool of random vectors.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for textspan.json.")] = Path("out/textspan"),
    as_json: JsonOption = False,
) -> int:
    """Name heads by the texts that span what they write (TEXTSPAN)."""
    from clipfast.commands.textspan import Options, run

    return run(Options(collecting, out, pool, size, heads, method, rank, seed, as_json))
