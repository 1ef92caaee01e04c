"""Options that several commands share, as the command line hands them over; nothing is loaded for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODEL = "scenes"
DTYPE = "fp32"


@dataclass(frozen=True)
class Collecting:
    """Which images, by which model; the names are those of the command line's options.

    Attributes:
        images: files, folders and tar shards, or one folder that was collected before.
        model: None for the bundled model, or for the one that a folder was collected with.
        pretrained: as in :func:`clipfast.load`.
        labels: ``"folder"``, ``"shard"`` or a CSV file; None for no labels, or for those that were collected.
        label_column: the column with labels.
        group_column: the column with groups, None for no groups.
        batch_size: images at once.
        device: None to choose.
        dtype: None for float32, or for what a folder was collected with.
        moments_only: whether each image's contributions are left out.
    """

    images: Sequence[Path]
    model: str | None = None
    pretrained: str | None = None
    labels: str | None = None
    label_column: str = "label"
    group_column: str | None = None
    batch_size: int = 8
    device: str | None = None
    dtype: str | None = None
    moments_only: bool = False
