"""Masks on disk: which mask belongs to an image, and what its values mean.

A mask lies at its image's path below the folder that was searched, in another folder and with any lossless ending:
``images/a/1.jpg`` has ``masks/a/1.png``. An image in a tar shard has it at the shard's path and its key
(``masks/shard-0/1.png`` or ``masks/1.png``), or beside it in the shard, as ``1.mask.png`` or ``1.seg.png``.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path, PurePath

from PIL import Image

from clipfast.commands.tables import read_rows
from clipfast.dataset.files import Source
from clipfast.dataset.shards import MASK_KINDS, read_member
from clipfast.errors import InputError
from clipfast.images import decode_pixels, open_pixels

SHARD = "shard"
ENDINGS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")
"""Lossless formats."""
_MEMBERS = tuple(f"{kind}{ending}" for kind in MASK_KINDS for ending in ENDINGS)


class MissingMask(InputError):
    """An image without a mask, or with two."""


def check_masks(where: str | None) -> None:
    """Raises :class:`InputError` where masks are neither ``"shard"`` nor a folder."""
    if where not in (None, SHARD) and not Path(where).is_dir():
        raise InputError(f"--masks is {where!r}: give a folder with masks, or shard")


def open_mask(source: Source, where: str) -> Image.Image:
    """The mask of an image, as it is but upright.

    Args:
        source: the image.
        where: ``"shard"``, or a folder.

    Raises:
        MissingMask: the image has none, or more than one.
        ImageError: it cannot be read.
    """
    if where == SHARD:
        member = _member(source)
        data = BytesIO(read_member(source.path, source.members[member]))
        return decode_pixels(data, f"{source.path}:{source.key}.{member}")
    return open_pixels(_file(source, Path(where)))


def _member(source: Source) -> str:
    masks = [ending for ending in _MEMBERS if ending in source.members]
    if len(masks) != 1:
        raise MissingMask(f"{source}: {_count(masks)} in the shard (looked for {_MEMBERS[0]}, {_MEMBERS[6]} …)")
    return masks[0]


def _file(source: Source, folder: Path) -> Path:
    inside = source.path if source.folder is None else source.path.relative_to(source.folder)
    place = PurePath(inside.name) if source.folder is None else PurePath(inside)
    places = [place.with_suffix("") / source.key, PurePath(source.key)] if source.key else [place.with_suffix("")]
    for place in places:
        masks = [path for ending in ENDINGS if (path := folder / f"{place}{ending}").is_file()]
        if len(masks) > 1:
            raise MissingMask(f"{source}: two masks, {masks[0]} and {masks[1]}")
        if masks:
            return masks[0]
    raise MissingMask(f"{source}: no mask (looked for {folder / places[0]}{ENDINGS[0]}, {ENDINGS[1]} …)")


def _count(masks: list[str]) -> str:
    return f"two masks, {masks[0]} and {masks[1]}," if masks else "no mask"


def read_mask_values(file: Path) -> dict[str, frozenset[int]]:
    """The values in masks that stand for each label, from a CSV file with columns ``value`` and ``label``.

    Raises:
        InputError: a file that cannot be read or lacks a column, a value that is no number, or of two labels.
    """
    labels: dict[int, str] = {}
    for place, row in read_rows(file, ("value", "label"), "mask values"):
        if not row["label"] or not row["value"].isdecimal():
            raise InputError(f"{place}: expected a whole number as value, and a label")
        value = int(row["value"])
        if labels.setdefault(value, row["label"]) != row["label"]:
            raise InputError(f"{place}: the value {value} is {row['label']!r}, and {labels[value]!r} before")
    if not labels:
        raise InputError(f"{file} has no values")
    names = sorted(set(labels.values()))
    return {name: frozenset(value for value, label in labels.items() if label == name) for name in names}


def check_values(values: Mapping[str, frozenset[int]], labels: tuple[str, ...], file: Path | None) -> None:
    """Raises :class:`InputError` where a label has no value in masks."""
    lacking = [label for label in labels if label not in values]
    if lacking:
        raise InputError(
            f"{file} has no mask value for the label {lacking[0]!r}: it has {', '.join(list(values)[:10])}"
        )
