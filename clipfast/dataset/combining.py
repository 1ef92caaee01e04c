"""Putting collections together: parts of one pass that several jobs shared, and passes over different images.

Units keep their files as they are: these are linked into the new collection where both are on one file system, and
copied where not. Only numbers of units change, where plans are put one behind the other. So the result has the bits
that one pass would have given, and merging goes on where it was stopped.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import xxhash
from filelock import FileLock, Timeout

from clipfast.dataset.duplicates import names_in_both
from clipfast.dataset.manifest import (
    BASIS,
    LOCK,
    PARTS,
    Manifest,
    Record,
    Settings,
    is_collection,
    locked,
    refuse_other,
)
from clipfast.dataset.merging import keep_merged
from clipfast.dataset.passes import refuse_other_results
from clipfast.dataset.plan import FILES, UNITS, Plan, Unit, write_plan
from clipfast.errors import InputError
from clipfast.files import atomic_write, flush_folder, flush_tree
from clipfast.inputs import printable

_PART = re.compile(r"(\d{4,})-of-(\d{4,})")
_BLOCK = 1 << 20
_SHOWN = 3


def part_folder(out: Path, index: int, count: int) -> Path:
    """Where one of several jobs that share a pass collects: ``out/parts/0003-of-0016``.

    Args:
        out: the collection that they will be merged to.
        index: of the job, from 0.
        count: how many jobs there are.

    Raises:
        InputError: no such part.
    """
    if not 0 <= index < count:
        raise InputError(f"part {index} of {count} does not exist: the parts are 0 to {count - 1}")
    return out / PARTS / f"{index:04}-of-{count:04}"


@dataclass(frozen=True)
class Merged:
    """What a merge has done.

    Attributes:
        folder: the collection.
        parts: that it was made of, in order.
        units: of the collection.
        images: in its statistics.
        copied: units that this run put there.
        duplicates: some names of images that are in several data sets, where these are allowed.
    """

    folder: Path
    parts: tuple[Path, ...]
    units: int
    images: int
    copied: int
    duplicates: tuple[str, ...] = ()


def merge(
    parts: Sequence[Path],
    out: Path,
    *,
    duplicates: Literal["refuse", "report"] = "refuse",
    advance: Callable[[int, int], None] = lambda done, units: None,
) -> Merged:
    """Makes one collection of several, or goes on where an earlier merge was stopped.

    Parts with the same plan are joined: together they have all its units. Plans of different images are put one behind
    the other in the order of the parts, as if one pass had been given all of these images.

    Args:
        parts: collections with the same model and the same settings; empty for those in ``out/parts``.
        out: where the result is, or becomes.
        duplicates: what to do where an image's name is in the data of several plans.
        advance: called after each unit with how many are there, and how many there will be.

    Raises:
        InputError: parts that are missing, not finished, damaged, in use, or do not fit together, with every reason;
            names that occur twice; ``out`` holds another collection.
        OSError: a file cannot be written.
    """
    folders = list(parts) or _found(out)
    if any(folder.resolve() == out.resolve() for folder in folders):
        raise InputError(f"{out} cannot be merged into itself: give another folder as the result")
    with ExitStack() as stack:
        manifests = [_opened(folder, stack) for folder in folders]
        _refuse_differences(manifests)
        plans = _by_plan(manifests)
        _refuse_gaps(plans)
        names = tuple(_duplicates(plans))
        if names and duplicates == "refuse":
            shown = ", ".join(map(printable, names[:_SHOWN])) + (", …" if len(names) > _SHOWN else "")
            raise InputError(
                f"several of these collections have images of the same name ({shown}): leave one of them out, or allow "
                "duplicates"
            )
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            manifest = _begun(out, plans)
            copied, done = 0, 0
            for start, sharing in zip(_starts(plans), plans, strict=True):
                for unit, having in sorted(_owners(sharing).items()):
                    copied += _take(manifest, start + unit, unit, having)
                    done += 1
                    advance(done, manifest.plan.count)
            flush_folder(manifest.data)
            keep_merged(manifest)
            images = sum(record.count for record in manifest.records())
    return Merged(out, tuple(folders), manifest.plan.count, images, copied, names)


# ------------------------------------------------------------------------------------------------- what there is


def _found(out: Path) -> list[Path]:
    """The parts of a collection.

    Raises:
        InputError: there are none, or some are missing.
    """
    paths = sorted(path for path in (out / PARTS).glob("*") if _PART.fullmatch(path.name))
    if not paths:
        raise InputError(
            f"{out / PARTS} holds no parts: collect them with --num-shards and --shard-index, or name them"
        )
    numbers = [tuple(map(int, _PART.fullmatch(path.name).groups())) for path in paths]  # type: ignore[union-attr]
    counts = sorted({count for _, count in numbers})
    if len(counts) > 1:
        raise InputError(
            f"{out / PARTS} holds parts of {' and of '.join(map(str, counts))}: remove those that do not count"
        )
    [count] = counts
    missing = sorted(set(range(count)) - {index for index, _ in numbers})
    if missing:
        raise InputError(f"{out / PARTS}: {_listed('part', missing)} of {count} {_is(missing)} missing")
    return paths


def _opened(folder: Path, stack: ExitStack) -> Manifest:
    """A part that nobody writes to until the stack is closed.

    Raises:
        InputError: no collection, a damaged one, or one that another process writes to.
    """
    manifest = Manifest(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
        stack.callback(lock.release)
    except Timeout:
        raise InputError(f"{folder} is being written by another process: wait until it is done") from None
    except OSError:
        pass  # where this process cannot write, it may read
    return manifest


def _refuse_differences(manifests: Sequence[Manifest]) -> None:
    """Refuses parts whose settings differ by more than their images."""
    first = manifests[0]
    reasons = []
    for other in manifests[1:]:
        same = other.settings.images["digest"] == first.settings.images["digest"]
        adapted = other.settings if same else _with_images_of(other.settings, first.settings)
        differences = adapted.differences(first.settings)
        if differences:
            reasons.append(f"{other.folder} holds {'; '.join(differences)}")
    if reasons:
        raise InputError(f"these collections do not fit to {first.folder}: {'; '.join(reasons)}")


def _with_images_of(settings: Settings, other: Settings) -> Settings:
    """The same settings but for what comes with the images: which they are, and the rows of a table of their labels."""
    labels = dict(settings.labels)
    if "rows" in labels and "rows" in other.labels:
        labels["rows"] = other.labels["rows"]
    return replace(settings, images=other.images, labels=labels)


def _by_plan(manifests: Sequence[Manifest]) -> list[list[Manifest]]:
    """Parts that share a plan together, in the order of the first of them."""
    plans: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        plans.setdefault(manifest.plan.digest, []).append(manifest)
    for sharing in plans.values():
        sharing[0].plan.check()
    return list(plans.values())


def _starts(plans: Sequence[Sequence[Manifest]]) -> Iterator[int]:
    """The number that the first unit of each plan gets."""
    start = 0
    for sharing in plans:
        yield start
        start += sharing[0].plan.count


def _refuse_gaps(plans: Sequence[Sequence[Manifest]]) -> None:
    """Refuses plans of which some units are in no part, and says which part should have them."""
    reasons = []
    for sharing in plans:
        missing = set(range(sharing[0].plan.count)).difference(*(manifest.finished() for manifest in sharing))
        if not missing:
            continue
        shares = [(manifest.folder, _PART.fullmatch(manifest.folder.name)) for manifest in sharing]
        left = {
            folder: sum(unit % int(match[2]) == int(match[1]) for unit in missing)
            for folder, match in shares
            if match is not None
        }
        if sum(left.values()) == len(missing):
            reasons += [f"{folder} lacks {count} of its units" for folder, count in left.items() if count]
        else:
            folders = ", ".join(str(manifest.folder) for manifest in sharing)
            reasons.append(f"{folders}: {_listed('unit', sorted(missing))} {_is(missing)} missing")
    if reasons:
        raise InputError(f"not finished: {'; '.join(reasons)}; run these passes to the end first")


def _duplicates(plans: Sequence[Sequence[Manifest]]) -> Iterator[str]:
    """Some names of images that are in several plans."""
    for place, sharing in enumerate(plans):
        for others in plans[:place]:
            yield from islice(names_in_both(_units(others), _units(sharing)), 10)


def _owners(sharing: Sequence[Manifest]) -> dict[int, list[Manifest]]:
    """The parts that have each unit of a plan."""
    owners: dict[int, list[Manifest]] = {}
    for manifest in sharing:
        for unit in manifest.finished():
            owners.setdefault(unit, []).append(manifest)
    return owners


def _units(sharing: Sequence[Manifest]) -> list[tuple[Manifest, int]]:
    """Every unit of a plan with a part that has it."""
    return [(parts[0], unit) for unit, parts in sorted(_owners(sharing).items())]


def _listed(what: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10])) + (", …" if len(numbers) > 10 else "")
    return f"{what} {shown}" if len(numbers) == 1 else f"{what}s {shown}"


def _is(some: Any) -> str:
    return "is" if len(some) == 1 else "are"


# ------------------------------------------------------------------------------------------------- what is made


class _Planned:
    """One of the inputs of plans, whose units are there already."""

    def __init__(self, name: str, units: Iterator[Unit]) -> None:
        self.name, self._units = name, units

    def units(self, size: int) -> Iterator[Unit]:
        """As they were planned."""
        return self._units

    def read(self, unit: Unit) -> Any:
        """Nothing reads from here."""
        raise NotImplementedError

    names = read


def _planned(plans: Sequence[Sequence[Manifest]]) -> list[_Planned]:
    """The inputs of all plans, one behind the other."""
    inputs = []
    for manifest, *_ in plans:
        units = _Grouped(manifest.plan)
        inputs += [_Planned(name, units.of(place)) for place, name in enumerate(manifest.settings.images["names"])]
    return inputs


class _Grouped:
    """The units of a plan by their inputs, which have to be asked for in their order."""

    def __init__(self, plan: Plan) -> None:
        self._units = plan.units()
        self._next = next(self._units, None)

    def of(self, place: int) -> Iterator[Unit]:
        """The units of one input."""
        while self._next is not None and self._next.input == place:
            yield self._next
            self._next = next(self._units, None)


def _begun(out: Path, plans: Sequence[Sequence[Manifest]]) -> Manifest:
    """The collection of all plans with no units yet, or with those of an earlier merge; its lock is held."""
    first = plans[0][0]
    for path in out.glob(".plan-*"):
        shutil.rmtree(path, ignore_errors=True)
    if not is_collection(out):
        refuse_other_results(out)
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=out) as made:
        if len(plans) == 1:
            settings = first.settings
            for name in (UNITS, FILES):
                shutil.copyfile(first.folder / name, Path(made, name))
        else:
            inputs = _planned(plans)
            plan = write_plan(Path(made), inputs, first.settings.unit_size)
            images = {"names": [each.name for each in inputs], "digest": plan.digest, "units": plan.count}
            settings = _with_rows(replace(first.settings, images=images), plans)
        if is_collection(out):
            manifest = Manifest(out)
            refuse_other(out, manifest.settings, settings)
            _remove_leftovers(manifest)
            return manifest
        for name in (UNITS, FILES):
            with atomic_write(out / name) as partial:
                shutil.copyfile(Path(made, name), partial)
    with atomic_write(out / BASIS) as partial:
        shutil.copyfile(first.folder / BASIS, partial)
    return Manifest.create(out, settings)


def _with_rows(settings: Settings, plans: Sequence[Sequence[Manifest]]) -> Settings:
    """Settings with a digest of the rows of all tables of labels."""
    rows = [sharing[0].settings.labels.get("rows") for sharing in plans]
    if len(set(rows)) == 1:
        return settings
    return replace(settings, labels={**settings.labels, "rows": xxhash.xxh3_128_hexdigest(repr(rows).encode())})


def _remove_leftovers(manifest: Manifest) -> None:
    named = {record.folder for record in manifest.records()}
    for path in manifest.data.iterdir():
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


def _take(manifest: Manifest, number: int, unit: int, having: Sequence[Manifest]) -> bool:
    """Gives the new collection one unit; whether it was not there yet.

    Raises:
        InputError: parts have it with different results, or its files are damaged.
        OSError: a file cannot be written.
    """
    source, record = having[0], having[0].record(unit)
    for other in having[1:]:
        _refuse_unequal(unit, source, record, other, other.record(unit))
    if manifest.record_path(number).exists():
        _refuse_unequal(number, manifest, manifest.record(number), source, record)
        return False
    folder = manifest.new_folder(number)
    try:
        _copy(source.data / record.folder, folder, record)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    flush_folder(manifest.data)
    manifest.write(replace(record, unit=number, folder=folder.name))
    return True


def _refuse_unequal(unit: int, one: Manifest, first: Record, other: Manifest, second: Record) -> None:
    if (first.files, first.statuses) != (second.files, second.statuses):
        raise InputError(
            f"unit {unit} has other results in {other.folder} than in {one.folder}: the files were others, or the "
            "machines compute differently; leave one of the two out"
        )


def _copy(source: Path, target: Path, record: Record) -> None:
    """Links or copies the files of a unit, and flushes them to the disk."""
    linked = True
    for name, (size, checksum) in record.files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if linked:
                os.link(source / name, path)
        except FileNotFoundError:
            raise InputError(f"{source / name} is gone: see `clipfast collection validate`") from None
        except OSError:  # another file system, or one without links
            linked = False
        if not linked:
            _copy_file(source / name, path, checksum)
        if path.stat().st_size != size:
            raise InputError(
                f"{source / name} has {path.stat().st_size} bytes, its record says {size}: see `clipfast collection "
                "validate`"
            )
    flush_tree(target)


def _copy_file(source: Path, target: Path, checksum: str) -> None:
    digest = xxhash.xxh3_128()
    try:
        with open(source, "rb") as read, open(target, "xb") as written:
            while block := read.read(_BLOCK):
                digest.update(block)
                written.write(block)
    except FileNotFoundError:
        raise InputError(f"{source} is gone: see `clipfast collection validate`") from None
    if digest.hexdigest() != checksum:
        raise InputError(
            f"{source} is damaged: its checksum is not that of its record; see `clipfast collection validate`"
        )
