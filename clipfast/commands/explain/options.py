"""Options of ``clipfast explain``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from clipfast.commands.options import Dashed, Flag, ImageOptions, Positive, Texts


@dataclass(frozen=True)
class Options:
    """Explain why an image is taken for one class rather than another, by concepts in the image and in the texts.

    Attributes:
        inputs: The images and the model.
        classes: The classes with commas between, such as "cat,dog,horse", or a CSV file with columns ``label`` and
            ``text``.
        prompt: A template such as "a photo of a {}.", into which every class is put; repeat. Default: "a photo of a
            {}." for classes with commas between.
        templates: A set of templates by name (plain, simple, imagenet), or a file with one per line; repeat.
        pool: Texts that concepts are named by: general, classes, common_words, scenes, or a file with one text per
            line. Default: scenes for the bundled model, else general.
        target: The class to explain. Default: the one that the model predicts.
        against: What it is held against: runner-up, mean (of all other classes), or a class.
        concepts: Texts at most that image and classes share.
        groups: Groups of patches at most.
        layers: Layers whose heads are looked at, such as "-4,-3,-2,-1". Default: all.
        curves: Remove and show patches in the order of the explanation, and in random orders, and watch the class.
        over: A collection of the same model, over which to measure what images and classes both know of each text, in
            bits.
        out: Folder for explain.json and a picture per image.
        json: Print the JSON instead of the tables.
    """

    inputs: ImageOptions = ImageOptions()
    _: KW_ONLY
    classes: str | None = None
    prompt: Texts = ()
    templates: Texts = ()
    pool: Annotated[str | None, Parameter(name=("--pool", "--texts"))] = None
    target: str | None = None
    against: str = "runner-up"
    concepts: Positive = 8
    groups: Positive = 4
    layers: Dashed = None
    curves: Flag = False
    over: Path | None = None
    out: Path = Path("out/explain")
    json: Flag = False
