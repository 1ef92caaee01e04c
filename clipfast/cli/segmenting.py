"""``clipfast segment``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from clipfast.cli.app import command
from clipfast.cli.options import ClassesOption, JsonOption, PromptOption, over_images
from clipfast.commands.options import Collecting


class Target(StrEnum):
    """Whose mask an image's is."""

    label = "label"
    predicted = "predicted"


class Protocol(StrEnum):
    """How masks are brought to where the model looks."""

    aligned = "aligned"
    published = "published"


@command
@over_images
def segment(
    collecting: Collecting,
    masks: Annotated[
        str | None, typer.Option(help="A folder with a mask at each image's path, or shard; none: pictures only.")
    ] = None,
    mask_values: Annotated[
        Path | None,
        typer.Option(help="A CSV file with columns `value` and `label`; else all but 0 is foreground."),
    ] = None,
    ignore: Annotated[int | None, typer.Option(help="The value of pixels that do not count, such as 255.")] = None,
    classes: ClassesOption = None,
    prompt: PromptOption = None,
    texts: Annotated[list[str] | None, typer.Option(help="A text to look for, in place of classes; repeat.")] = None,
    background_texts: Annotated[
        str | None,
        typer.Option(
            help="Texts that a class must stand out from, in place of the other classes: a file with one per line, "
            "a CSV file like --classes, or a pool's name."
        ),
    ] = None,
    contrast: Annotated[
        bool, typer.Option("--contrast/--no-contrast", help="Less the mean over the texts, or texts as they are.")
    ] = True,
    target: Annotated[
        Target | None, typer.Option(help="The class to find: the image's label, or what it is taken for.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Of ours,attention,rollout,gradcam,chefer,legrad; all with masks, else ours."),
    ] = None,
    protocol: Annotated[
        Protocol, typer.Option(help="Masks go the way of the image, or are squashed as in published figures.")
    ] = Protocol.aligned,
    threshold: Annotated[str, typer.Option(help="Heat from 0 to 1 above which a mask begins, or mean.")] = "mean",
    multiclass: Annotated[
        bool, typer.Option("--multiclass", help="A label for every pixel; needs --mask-values.")
    ] = False,
    background: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --multiclass: up to this heat a pixel is background; else no pixel is."),
    ] = None,
    panels: Annotated[int, typer.Option(min=0, help="Images that are drawn with their truth.")] = 8,
    out: Annotated[Path, typer.Option(help="Folder for segment.json and pictures.")] = Path("out/segment"),
    as_json: JsonOption = False,
) -> int:
    """Show where a class is, and score it by true masks beside other methods."""
    from clipfast.commands.segment.command import Options, run

    return run(
        Options(
            collecting,
            out,
            masks,
            mask_values,
            ignore,
            classes,
            prompt or (),
            texts or (),
            background_texts,
            contrast,
            None if target is None else target.value,
            methods,
            protocol.value,
            threshold,
            multiclass,
            background,
            panels,
            as_json,
        )
    )
