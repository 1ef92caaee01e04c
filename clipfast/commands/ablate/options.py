"""Options of ``clipfast ablate``."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from cyclopts import Parameter

from clipfast.commands.options import ClassOptions, Flag, InputOptions, PoolOptions, Positive, Texts


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """How heads to remove are chosen.

    Attributes:
        words: Remove heads whose texts contain this word or another; repeat.
        heads: Heads to choose from. Default: those of the last four layers.
        top: With --words: how many of a head's texts count.
        at_least: With --words: how many of these must contain one.
        contrast: Remove so many heads that differ most between groups of a class.
        greedy: Remove up to so many heads, each the best for the worst group.
        validation: For --contrast and --greedy: a folder of ``clipfast collect`` with labels and groups.
    """

    words: Texts = ()
    heads: str | None = None
    top: Positive = 5
    at_least: Positive = 3
    contrast: Positive | None = None
    greedy: Positive | None = None
    validation: Path | None = None


@dataclass(frozen=True)
class Options:
    """Replace terms by their mean: what zero-shot accuracy needs, and which heads to remove for the worst group.

    Attributes:
        inputs: The images and the model.
        zeroshot: The classes.
        terms: What to ablate together, such as "mlps, L10.H3"; repeat for others.
        means: A folder of ``clipfast collect`` whose means are used. Default: the means of the images themselves.
        selection: Which heads to remove.
        naming: The texts that heads are named by.
        reconstruct: Replace heads by what up to so many texts span.
        rest_ablated: With --reconstruct: ablate MLPs and all other heads, too.
        out: Folder for ablate.json.
        json: Print the JSON instead of the table.
    """

    inputs: InputOptions = InputOptions()
    zeroshot: ClassOptions = ClassOptions()
    selection: SelectionOptions = SelectionOptions()
    naming: PoolOptions = PoolOptions()
    _: KW_ONLY
    terms: Texts = ()
    means: Path | None = None
    reconstruct: Positive | None = None
    rest_ablated: Flag = False
    out: Path = Path("out/ablate")
    json: Flag = False
