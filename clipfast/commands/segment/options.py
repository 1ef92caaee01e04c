"""Options of ``clipfast segment``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter, validators

from clipfast.commands.options import ClassOptions, Flag, InputOptions, NonNegative, Positive, Texts

Target = Literal["label", "predicted"]


@dataclass(frozen=True)
class Options:
    """Show where a class is, and score it by true masks beside other methods.

    Attributes:
        inputs: The images and the model.
        zeroshot: The classes.
        masks: A folder with a mask at each image's path, or shard. Without: pictures only.
        mask_values: A CSV file with columns ``value`` and ``label``. Without: all but 0 is foreground.
        ignore: The value of pixels that do not count, such as 255.
        texts: A text to look for, in place of classes; repeat.
        phrase: A phrase such as "the red star left of the sea", in place of classes: the region that it means; repeat.
        proposals: With --phrase: regions that are written, best first.
        background_texts: Texts that a class must stand out from, in place of the other classes: a file with one per
            line, a CSV file like --classes, or a pool's name. With --phrase: what nouns stand out from.
        contrast: Subtract the mean over the texts, or take the texts as they are.
        target: The class to find: the image's label, or the class that the model predicts. Default: label where there
            are labels.
        methods: Of ours,attention,rollout,gradcam,chefer,legrad. Default: all with masks, else ours.
        protocol: Masks are resized and cropped like the image (aligned), or squashed as in published figures.
        threshold: Heat from 0 to 1 above which a mask begins, or mean. With --phrase: share of a region's own peak.
        multiclass: A label for every pixel; needs --mask-values.
        background: With --multiclass: up to this heat a pixel is background. Default: no pixel is.
        panels: Images that are drawn with their truth.
        out: Folder for segment.json and pictures.
        json: Print the JSON instead of the table.
    """

    inputs: InputOptions = InputOptions()
    zeroshot: ClassOptions = ClassOptions()
    _: KW_ONLY
    masks: str | None = None
    mask_values: Path | None = None
    ignore: int | None = None
    texts: Texts = ()
    phrase: Texts = ()
    proposals: Positive = 5
    background_texts: str | None = None
    contrast: Annotated[bool, Parameter(negative="--no-contrast")] = True
    target: Target | None = None
    methods: str | None = None
    protocol: Literal["aligned", "published"] = "aligned"
    threshold: str = "mean"
    multiclass: Flag = False
    background: Annotated[float | None, Parameter(validator=validators.Number(gte=0, lte=1))] = None
    panels: NonNegative = 8
    out: Path = Path("out/segment")
    json: Flag = False
