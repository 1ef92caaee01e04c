"""Is a collection sound? Every file is read and compared with what was recorded about it, and what belongs together."""

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from clipfast import storage
from clipfast.analyses.moments import Moments
from clipfast.basis import Basis
from clipfast.dataset.arrays import UnitArrays
from clipfast.dataset.guard import GUARD
from clipfast.dataset.images_table import IMAGES, fine, name_of, read_images
from clipfast.dataset.inputs.locations import is_url, open_unit, version
from clipfast.dataset.manifest import BASIS, DATA, HEADER, LOCK, MOMENTS, PARTS, RECORDS, RUN, Manifest, Record
from clipfast.dataset.merging import MERGED, load_basis, records_digest, unit_moments
from clipfast.dataset.pieces import sized_checksum
from clipfast.dataset.plan import FILES, UNITS, UnitError
from clipfast.dataset.samples import Status
from clipfast.errors import ClipfastError
from clipfast.inputs import printable

_OWN = {HEADER, LOCK, RUN, GUARD, PARTS, RECORDS, DATA, BASIS, MOMENTS, MERGED, UNITS, FILES}
_SHOWN = 20  # names that several images have
_BLOCK = 1 << 20


def validate(
    folder: str | Path, *, inputs: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Looks for everything that is wrong with a collection. Nothing is changed.

    Checked are the checksums of all files, the number of images in every table and array against the records, the
    merged moments against those of the units, names that several images have, and files that no record names. While a
    pass writes to the collection, its unfinished units are found as such files.

    Args:
        folder: the collection.
        inputs: whether shards, tables and files that the images came from are read again, too: are they the same?
        progress: called with the numbers of units that are done and of all.

    Returns:
        A line for each finding; empty where the collection is sound and complete.

    Raises:
        InputError: no collection, or its settings are damaged, so that nothing else can be checked.
    """
    manifest = Manifest(Path(folder))
    return list(_Validation(manifest, inputs, progress or (lambda done, total: None)).findings())


class _Validation:
    def __init__(self, manifest: Manifest, inputs: bool, progress: Callable[[int, int], None]) -> None:
        self._manifest, self._inputs, self._progress = manifest, inputs, progress
        self._records: dict[int, Record] = {}
        self._ids: list[np.ndarray[Any, np.dtype[np.uint64]]] = []
        self._moments: Moments | None = None
        self._moments_are_whole = True

    def findings(self) -> Iterator[str]:
        manifest = self._manifest
        basis: Basis | None = None
        try:
            manifest.plan.check()
        except ClipfastError as error:
            yield str(error)
        try:
            basis = load_basis(manifest.folder)
        except ClipfastError as error:
            yield str(error)
        yield from self._read_records()
        for done, record in enumerate(self._records.values(), start=1):
            yield from self._unit(record, basis)
            if self._inputs:
                yield from self._sources(record)
            self._progress(done, len(self._records))
        yield from self._repeated_ids()
        yield from self._merged()
        yield from self._leftovers()

    def _read_records(self) -> Iterator[str]:
        manifest = self._manifest
        finished = manifest.finished()
        for unit in sorted(finished):
            try:
                if unit >= manifest.plan.count:
                    yield f"{manifest.record_path(unit)}: the plan has {manifest.plan.count} units"
                else:
                    self._records[unit] = manifest.record(unit)
            except ClipfastError as error:
                self._moments_are_whole = False
                yield f"{error}; `clipfast collection retry {manifest.folder}` computes the unit again"
        missing = [unit for unit in range(manifest.plan.count) if unit not in finished]
        if missing:
            shown = ", ".join(map(str, missing[:3])) + (", …" if len(missing) > 3 else "")
            yield (
                f"{manifest.folder}: {len(missing)} of {manifest.plan.count} units have no record ({shown}): run the "
                "command that began the pass to finish it"
            )

    # ------------------------------------------------------------------------------------------------- a unit

    def _unit(self, record: Record, basis: Basis | None) -> Iterator[str]:
        folder = self._manifest.data / record.folder
        damaged = set()
        for name, expected in record.files.items():
            problem = _difference(folder / name, expected)
            if problem is not None:
                damaged.add(name)
                yield f"{folder / name}: {problem}"
        if IMAGES not in damaged:
            yield from _reported(self._table(record, folder))
        if not any("/" in name for name in damaged):
            yield from _reported(self._arrays(record, folder))
        if MOMENTS in damaged or basis is None:
            self._moments_are_whole = False
        else:
            yield from _reported(self._add_moments(record, basis))

    def _table(self, record: Record, folder: Path) -> Iterator[str]:
        path = folder / IMAGES
        table = read_images(folder, record, ["id", "status", "row"])
        counts = Counter(table.column("status").to_pylist())
        if counts != Counter({str(status): count for status, count in record.statuses.items() if count}):
            yield f"{path}: it counts {_listed(counts)}, its record {_listed(record.statuses)}"
        rows = fine(table).column("row").to_pylist()
        if rows != list(range(record.count)) and (any(row is not None for row in rows) or self._kept()):
            yield f"{path}: the rows of its images are not 0 to {record.count - 1}"
        own = table.filter(
            np.array([status != Status.DUPLICATE for status in table.column("status").to_pylist()], bool)
        )
        self._ids.append(np.fromiter(map(_hash, own.column("id").to_pylist()), np.uint64, own.num_rows))

    def _kept(self) -> dict[str, str]:
        return {name: dtype for name, dtype in self._manifest.settings.kept.items() if dtype is not None}

    def _arrays(self, record: Record, folder: Path) -> Iterator[str]:
        arrays, kept = UnitArrays(folder, record), self._kept() if record.count else {}
        for name in sorted({*kept, *arrays.names}):
            if name not in arrays.names:
                yield f"{folder}: it has no {name}, which the collection keeps"
            elif name not in kept:
                yield f"{folder / name}: the collection keeps no {name}"
            else:
                shards = sum(file.startswith(f"{name}/c/") for file in record.files)
                if arrays.dtype(name) != kept[name]:  # that the rows are the record's is checked by every reader
                    yield f"{folder / name}: it is {arrays.dtype(name)}, not {kept[name]}"
                if arrays.shards(name) != shards:
                    yield f"{folder / name}: it has {shards} shards, not {arrays.shards(name)}"

    def _add_moments(self, record: Record, basis: Basis) -> Iterator[str]:
        whole, self._moments_are_whole = self._moments_are_whole, False
        moments = unit_moments(self._manifest, record, basis)
        if moments is not None and self._moments is None:
            self._moments = moments
        elif moments is not None and self._moments is not None:
            self._moments.merge(moments)
        self._moments_are_whole = whole
        yield from ()

    # ------------------------------------------------------------------------------------------------- inputs

    def _sources(self, record: Record) -> Iterator[str]:
        """What the images of a unit came from and is not the same now."""
        source = record.source
        if not source:
            yield from _reported(self._files(record))
            return
        path = str(source["path"])
        name = printable(path)
        if source.get("checksum") is None:
            now = version(path)
            if now.size is None and now.version is None:
                yield f"{name}: it is gone or cannot be read"
            elif (now.size, now.version) != (source["size"], source["version"]):
                yield f"{name}: it has changed since unit {record.unit} was collected"
            return
        digest = xxhash.xxh3_128()
        try:
            with open_unit(path, path) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except UnitError as error:
            yield str(error)
        except Exception as error:  # file systems raise what they like
            yield f"{name}: it cannot be read ({' '.join(str(error).split())})"
        else:
            if digest.hexdigest() != source["checksum"]:
                yield f"{name}: it has changed since unit {record.unit} was collected: its checksum is another"

    def _files(self, record: Record) -> Iterator[str]:
        """The same of a unit that is a list of files: one line for all of them."""
        table = read_images(self._manifest.data / record.folder, record, ["path", "size", "modified_ns"])
        changed = []
        for row in table.to_pylist():
            path = name_of(row["path"])
            if row["size"] is None or is_url(path):
                continue
            now = version(path)
            if (now.size, now.modified_ns) != (row["size"], row["modified_ns"]):
                changed.append(printable(path))
        if changed:
            shown = ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
            yield f"unit {record.unit}: {len(changed)} of its files have changed or are gone ({shown})"

    # ------------------------------------------------------------------------------------------------- all units

    def _repeated_ids(self) -> Iterator[str]:
        """Names that images of several units have. In memory are eight bytes of each name."""
        hashes = np.sort(np.concatenate(self._ids)) if self._ids else np.empty(0, np.uint64)
        twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not twice:
            return
        places: dict[str, list[int]] = defaultdict(list)
        for record in self._records.values():
            try:
                table = read_images(self._manifest.data / record.folder, record, ["id", "status"])
            except ClipfastError:
                continue  # found already
            for row in table.to_pylist():
                if row["status"] != Status.DUPLICATE and _hash(row["id"]) in twice:
                    places[row["id"]].append(record.unit)
        repeated = {name: units for name, units in places.items() if len(units) > 1}
        for name, units in list(repeated.items())[:_SHOWN]:
            yield f"{printable(name)}: {len(units)} images have this name, in units {', '.join(map(str, units[:5]))}"
        if len(repeated) > _SHOWN:
            yield f"{self._manifest.folder}: {len(repeated) - _SHOWN} more names that several images have"

    def _merged(self) -> Iterator[str]:
        """Whether the kept sum is that of the units. One of other records is made again when it is used."""
        folder = self._manifest.folder
        path = folder / MOMENTS
        try:
            kept = json.loads((folder / MERGED).read_text(encoding="utf-8"))
            if kept["records"] != records_digest(self._manifest):
                return
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"{folder / MERGED}: it is damaged ({type(error).__name__}): the moments are merged again when used"
            return
        try:
            Moments.load(path)  # checks every tensor
            have = storage.file_checksum(path)
        except (ClipfastError, OSError) as error:
            yield f"{error}: the moments are merged again when they are used"
            return
        if have != kept.get("moments"):
            yield f"{path}: it is not the file that was written: the moments are merged again when they are used"
        elif self._moments_are_whole and self._moments is not None:
            with tempfile.TemporaryDirectory() as temporary:
                self._moments.save(Path(temporary, MOMENTS))
                if storage.file_checksum(Path(temporary, MOMENTS)) != have:
                    yield f"{path}: it is not the sum of the units' moments: remove it, and it is made again"

    def _leftovers(self) -> Iterator[str]:
        """Files that are no part of the collection."""
        manifest = self._manifest
        units = {record.folder: record for record in self._records.values()}
        finished = manifest.finished()
        records = {manifest.record_path(unit) for unit in finished}
        unread = {f"{unit:06}" for unit in finished - set(self._records)}  # their records are damaged
        for path in sorted(manifest.folder.iterdir()):
            if path.name.startswith(".") and path.name not in _OWN:  # results of analyses may lie beside it
                yield _leftover(path, "no part of the collection")
        for path in sorted((manifest.folder / RECORDS).iterdir()):
            if path not in records:
                yield _leftover(path, "no record")
        for path in sorted(manifest.data.iterdir()):
            if path.name not in units:
                if path.name.partition("-")[0] not in unread:
                    yield _leftover(path, "no record names it; the next run removes it")
                continue
            named = {path / name for name in units[path.name].files}
            for file in sorted(path.rglob("*")):
                if file not in named and not file.is_dir():
                    yield _leftover(file, "no record names it")


def _reported(findings: Iterator[str]) -> Iterator[str]:
    """Findings, and an error as the last of them."""
    try:
        yield from findings
    except ClipfastError as error:
        yield str(error)


def _difference(path: Path, expected: tuple[int, str]) -> str | None:
    """What is wrong with a file."""
    try:
        if path.stat().st_size != expected[0]:
            return f"it has {path.stat().st_size} bytes, its record says {expected[0]}"
        return None if sized_checksum(path) == expected else "its checksum is not that of its record"
    except FileNotFoundError:
        return "it is gone"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _leftover(path: Path, why: str) -> str:
    size = sum(file.lstat().st_size for file in path.rglob("*")) if path.is_dir() else path.lstat().st_size
    return f"{printable(path)}: {size} bytes left over: {why}"


def _listed(counts: Any) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()) if count) or "no image"


def _hash(name: str) -> int:
    return xxhash.xxh3_64_intdigest(name.encode("utf-8"))
