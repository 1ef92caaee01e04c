"""Options of ``clipfast scenes``."""

from dataclasses import dataclass
from pathlib import Path

from clipfast.commands.options import NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class Options:
    """Draw scenes of known truth as plain files, to try every other command on.

    Attributes:
        out: Folder for images, masks, labels.csv and classes.
        count: How many.
        split: test-unbiased; test, biased as in training; lookalike, four even groups; or train.
        seed: Which ones.
    """

    out: Path = Path("out/scenes")
    count: Positive = 500
    split: str = "test-unbiased"
    seed: NonNegative = 0
