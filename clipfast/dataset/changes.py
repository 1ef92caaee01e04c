"""What has changed since it was collected: shards, tables and files with other bytes."""

import os
from collections.abc import Iterator, Set
from itertools import islice

from clipfast.dataset.images_table import read_images
from clipfast.dataset.manifest import Manifest, Record
from clipfast.dataset.plan import Plan, Unit
from clipfast.dataset.samples import Status
from clipfast.errors import InputError
from clipfast.inputs import printable

_SHOWN = 3
_AGAIN = (Status.MISSING, Status.UNREADABLE, Status.OUT_OF_MEMORY)
"""Failures that may be gone at the next try, though no byte of the image has changed."""


def refuse_changed(manifest: Manifest, plan: Plan, again: Set[int]) -> None:
    """Refuses to go on where images that were collected have changed since.

    Args:
        manifest: of the collection.
        plan: made now, of the same images.
        again: units that are computed again anyway.

    Raises:
        InputError: with the first names of what has changed.
    """
    changed = list(islice(_changed(manifest, plan, again), _SHOWN + 1))
    if changed:
        names = ", ".join(map(printable, changed[:_SHOWN])) + (", …" if len(changed) > _SHOWN else "")
        raise InputError(
            f"{manifest.folder}: images have changed since they were collected ({names}): give another folder, or "
            f"compute them again with `clipfast collection retry {manifest.folder} --changed`"
        )


def retriable_units(manifest: Manifest, plan: Plan) -> list[int]:
    """Finished units that may give more images if they are computed again.

    These are units that could not be read to their end, or that have images which were missing or could not be read,
    or for which memory ran out; and units with other failures whose file, shard or table has changed since. An image
    that could not be decoded is not tried again while its bytes are the same.
    """
    finished = sorted(manifest.finished())
    units = []
    for record, unit in zip(map(manifest.record, finished), plan.units(finished, files=False), strict=True):
        again = record.problem is not None or any(record.statuses.get(status) for status in _AGAIN)
        if again or (record.failed and next(_names(manifest, record, unit, failed=True), None) is not None):
            units.append(record.unit)
    return units


def changed_units(manifest: Manifest, plan: Plan) -> list[int]:
    """Finished units whose shard, table or files have changed since."""
    finished = sorted(manifest.finished())
    records = map(manifest.record, finished)
    pairs = zip(records, plan.units(finished, files=False), strict=True)
    return [record.unit for record, unit in pairs if next(_names(manifest, record, unit), None) is not None]


def _changed(manifest: Manifest, plan: Plan, again: Set[int]) -> Iterator[str]:
    finished = sorted(manifest.finished() - again)
    for record, unit in zip(map(manifest.record, finished), plan.units(finished, files=False), strict=True):
        yield from _names(manifest, record, unit)


def _names(manifest: Manifest, record: Record, unit: Unit, *, failed: bool = False) -> Iterator[str]:
    """Names of what a unit read and is not the same now. What is gone has not changed.

    Args:
        manifest: of the collection.
        record: of the unit.
        unit: as it is planned now.
        failed: whether images that failed are looked at, in place of the others.
    """
    if unit.kind != "files":
        source = record.source
        if unit.version is not None and source and (source["size"], source["version"]) != (unit.size, unit.version):
            yield unit.path
        return
    table = read_images(manifest.data / record.folder, record, ["id", "path", "size", "modified_ns", "status"])
    for row in table.to_pylist():
        if row["size"] is None or (row["status"] == Status.OK) == failed:
            continue
        try:
            status = os.stat(row["path"])
        except (OSError, ValueError):
            continue
        if (status.st_size, status.st_mtime_ns) != (row["size"], row["modified_ns"]):
            yield row["id"]
