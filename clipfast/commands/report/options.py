"""Options of ``clipfast report``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from clipfast.commands.options import ClassOptions, InputOptions, NonNegative, PoolOptions, Positive


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How many pictures the page has.

    Attributes:
        top: Images with the highest scores, for each of a head's first texts.
        random: Images drawn at random beside them.
        thumbnails: Different images in the page at most.
        thumbnail_size: Their longer side in pixels.
        maps: Heads with a map: those whose outputs vary most.
        examples: Images with maps for classes.
    """

    top: Positive = 5
    random: NonNegative = 5
    thumbnails: NonNegative = 1500
    thumbnail_size: Annotated[int, Parameter(validator=validators.Number(gte=16, lte=512))] = 80
    maps: NonNegative = 100
    examples: NonNegative = 6


@dataclass(frozen=True)
class Options:
    """Write one HTML page of what heads and layers do: texts, images, maps, ablations; it needs no network.

    Attributes:
        inputs: The images and the model.
        naming: The texts.
        zeroshot: The classes.
        pictures: How many pictures.
        size: Texts per head.
        heads: Heads to name, such as L10-L11 or L11.H3. Default: all.
        title: Title of the page.
        out: The page, or a folder for report.html.
    """

    inputs: InputOptions = InputOptions()
    naming: PoolOptions = PoolOptions()
    zeroshot: ClassOptions = ClassOptions()
    pictures: PictureOptions = PictureOptions()
    _: KW_ONLY
    size: Annotated[Positive, Parameter(name=("--size", "-m"))] = 20
    heads: str | None = None
    title: str | None = None
    out: Path = Path("out/report")
