"""``clipfast demo``, ``clipfast decompose`` and ``clipfast scenes``."""

from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli.app import command
from clipfast.cli.options import BatchOption, Centring, DeviceOption, Dtype, DtypeOption, ModelOption, PretrainedOption


@command
def demo(
    photos: Annotated[list[Path] | None, typer.Argument(help="Photographs to look at too: files or folders.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the panels.")] = Path("out/demo"),
    scenes: Annotated[int, typer.Option(min=0, help="How many scenes to draw.")] = 6,
    seed: Annotated[int, typer.Option(min=0, help="Which scenes to draw.")] = 0,
    model: Annotated[str, typer.Option(hidden=True)] = "scenes",
) -> int:
    """Show what the bundled model sees in scenes it draws, and in photographs."""
    from clipfast.commands.demo import Options, run

    return run(Options(photos=photos or (), out=out, scenes=scenes, seed=seed, model=model))


@command
def decompose(
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders to search.")],
    model: ModelOption = "scenes",
    pretrained: PretrainedOption = None,
    texts: Annotated[list[str] | None, typer.Option(help="A text to score and to draw a map for; repeat.")] = None,
    texts_file: Annotated[Path | None, typer.Option(help="A file with one text per line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("out/decompose"),
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.fp32,
    layers: Annotated[str | None, typer.Option(help='Layers to keep heads of, such as "-4,-3,-2,-1"; all.')] = None,
    per_head: Annotated[bool, typer.Option("--per-head", help="A map per head, too.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Keep what every token gives to every head.")] = False,
    centring: Annotated[Centring, typer.Option(help="How the final mean is split over the terms.")] = Centring.uniform,
    no_panels: Annotated[bool, typer.Option("--no-panels", help="Draw no pictures.")] = False,
) -> int:
    """Take the embeddings of images apart: contributions, text maps, a panel per image, a summary."""
    from clipfast.commands.decompose import Options, run

    return run(
        Options(
            images=images,
            out=out,
            model=model,
            pretrained=pretrained,
            texts=texts or (),
            texts_file=texts_file,
            batch_size=batch_size,
            device=device,
            dtype=dtype.value,
            layers=layers,
            per_head=per_head,
            tokens=tokens,
            centring=centring.value,
            panels=not no_panels,
        )
    )


@command
def scenes(
    out: Annotated[Path, typer.Option(help="Folder for images, masks, labels.csv and classes.")] = Path("out/scenes"),
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 500,
    split: Annotated[
        str, typer.Option(help="test-unbiased; test, biased as in training; lookalike, four even groups; or train.")
    ] = "test-unbiased",
    seed: Annotated[int, typer.Option(min=0, help="Which ones.")] = 0,
) -> int:
    """Draw scenes of known truth as plain files, to try every other command on."""
    from clipfast.commands.scenes import Options, run

    return run(Options(out, count, split, seed))
