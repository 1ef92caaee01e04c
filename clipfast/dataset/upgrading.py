"""Collections of version 4, as ``clipfast stats`` of clipfast 0.2 wrote them, rewritten as they are now.

They have one file of moments for all images, ``images.jsonl``, and files of contributions in float32. Every file of
contributions becomes a unit. Its moments are summed again from its contributions; where only moments were kept there is
one unit with the old sums.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any

from clipfast import storage
from clipfast.analyses.moments import Moments
from clipfast.contributions import Contributions
from clipfast.dataset.arrays import files
from clipfast.dataset.flow.writer import UnitWriter
from clipfast.dataset.images_table import ImageTable
from clipfast.dataset.manifest import HEADER, KEPT, MOMENTS, Manifest, Record, Settings, is_old, locked
from clipfast.dataset.merging import keep_merged, save_basis
from clipfast.dataset.plan import Unit, write_plan
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.errors import InputError
from clipfast.files import flush_tree

IMAGES = "images.jsonl"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def is_old_collection(folder: Path) -> bool:
    """Whether a folder holds a collection that :func:`upgrade` can read."""
    try:
        content = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and is_old(content.get("format"))


def upgrade(
    old: Path, folder: Path, *, store_dtype: str = "float32", advance: Callable[[int], None] | None = None
) -> int:
    """Writes a collection of version 4 anew; the old one stays as it is.

    Args:
        old: the old collection, whose pass came to its end.
        folder: an empty folder for the new one.
        store_dtype: ``"float32"``, which keeps every bit, or ``"float16"``.
        advance: called with the number of images after each unit.

    Returns:
        The number of images.

    Raises:
        InputError: it is not such a collection, it is unfinished or damaged, or ``folder`` is not empty.
        OSError: the folder cannot be written.
    """
    header, moments, entries = _read(old)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: give a new folder for the upgraded collection")
    folder.mkdir(parents=True, exist_ok=True)
    groups = [(file, list(group)) for file, group in groupby(entries, lambda entry: entry["shard"])]
    kept = groups[0][0] is not None
    checksums = {shard["file"]: shard["checksum"] for shard in header["shards"]}
    first = Contributions.load(old / str(groups[0][0])) if kept else None
    with locked(folder):
        plan = write_plan(folder, [_Written(old, [len(group) for _, group in groups])], len(entries))
        save_basis(moments.basis, len(moments.layers), folder)
        images = {"names": [str(old)], "digest": plan.digest, "units": plan.count}
        manifest = Manifest.create(folder, _settings(header, first, images, store_dtype, moments))
        for number, (file, group) in enumerate(groups):
            contributions = None if file is None else _contributions(old, file, checksums, group)
            failed = header["failed"] if number == len(groups) - 1 else []
            _write_unit(manifest, number, group, contributions, moments, failed)
            if advance is not None:
                advance(len(group))
        keep_merged(manifest)
    return len(entries)


class _Written:
    """The input of an upgraded collection: units that cannot be read again."""

    def __init__(self, old: Path, counts: Sequence[int]) -> None:
        self.name = str(old)
        self._counts = counts

    def units(self, size: int) -> Iterator[Unit]:
        """A unit per file of contributions."""
        start = 0
        for count in self._counts:
            yield Unit("items", self.name, start, start + count)
            start += count

    def read(self, unit: Unit) -> Iterator[Sample]:
        """Nothing: the images are in other places."""
        raise InputError(f"{unit.path} was collected by an older version: collect its images again")

    names = read


def _write_unit(
    manifest: Manifest,
    number: int,
    entries: Sequence[Mapping[str, Any]],
    contributions: Contributions | None,
    moments: Moments,
    failed: Sequence[Mapping[str, str]],
) -> None:
    folder = manifest.new_folder(number)
    samples, failures = [_sample(entry) for entry in entries], [_failure(each) for each in failed]
    if contributions is None:
        table = ImageTable(folder)
        table.add_unmeasured([*samples, *failures])
        table.finish()
        moments.save(folder / MOMENTS, with_basis=False)
        flush_tree(folder)
    else:
        with closing(UnitWriter(folder, manifest.settings.kept, Moments(backend=moments.backend))) as writer:
            writer.write(samples, contributions)
            writer.write(failures, None)
            writer.finish()
    statuses = {"ok": len(samples)} | ({Status.DECODE_ERROR.value: len(failures)} if failures else {})
    manifest.write(Record(number, folder.name, statuses, files(folder)))


def _sample(entry: Mapping[str, Any]) -> Sample:
    return Sample(
        id=entry["file"],
        path=entry["path"],
        member=entry["member"],
        key=entry["key"],
        folder=entry["folder"],
        size=entry["size"],
        modified_ns=entry["modified_ns"],
        label=entry["label"],
        group=entry["group"],
    )


def _failure(failed: Mapping[str, str]) -> Sample:
    reason = Failure(Status.DECODE_ERROR, failed["error"])
    return Sample(id=failed["file"], path=failed["path"], member=failed["member"], failure=reason)


def _settings(
    header: Mapping[str, Any],
    first: Contributions | None,
    images: Mapping[str, Any],
    store_dtype: str,
    moments: Moments,
) -> Settings:
    names = ("pretrained", "weights", "image_size", "layers", "heads")
    classes = first is not None and "class_token" in first.kept
    kept = {"codes": store_dtype, "class_codes": store_dtype, "terms": store_dtype, "embeddings": "float32"}
    return Settings(
        model={"name": header["model"], "dtype": _DTYPES[header["dtype"]]}
        | {name: header[name] for name in names}
        | {
            "depth": "pool" if moments.basis.kind == "pool" else "all",
            "grid": None if first is None else list(first.grid),
            "prefix_tokens": None if first is None else first.prefix_tokens,
        },
        preprocessing={"mode": "exact", "steps": None},
        kept={name: None if first is None or (name == "class_codes" and not classes) else kept[name] for name in KEPT},
        batch_size=0,
        unit_size=0,
        labels={} if header["labels"] is None else {"origin": header["labels"]},
        images=images,
        versions={"clipfast": header["clipfast"]},
    )


def _read(folder: Path) -> tuple[dict[str, Any], Moments, list[dict[str, Any]]]:
    """Header, moments and images of an old collection, every checksum checked."""
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({error}): give the folder of an old collection") from None
    if not isinstance(header, dict) or not is_old(header.get("format")):
        raise InputError(f"{folder} is no collection of version 4: there is nothing to upgrade")
    expected = header.pop("checksum", None)
    if storage.checksum(json.dumps(header, sort_keys=True).encode()) != expected:
        raise InputError(f"{path} is damaged or was edited: its checksum does not match")
    with storage.as_damage(path):
        if not header["complete"]:
            raise InputError(
                f"{folder} holds an unfinished pass of an older version: finish it with that version, or collect the "
                "images again"
            )
        if not header["count"]:
            raise InputError(f"{folder} holds no image: there is nothing to upgrade")
        moments = Moments.load(folder / header["moments"]["file"])
        if storage.file_checksum(folder / header["moments"]["file"]) != header["moments"]["checksum"]:
            raise InputError(f"{folder / header['moments']['file']} is not the file that its pass wrote")
        return header, moments, _entries(folder / IMAGES, header)


def _entries(path: Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    size, checksum = header[IMAGES]["bytes"], header[IMAGES]["checksum"]
    try:
        with path.open("rb") as file:
            data = file.read(size)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if len(data) < size or storage.checksum(data) != checksum:
        raise InputError(f"{path} is damaged or was edited: its checksum does not match")
    entries = [json.loads(line) for line in data.decode("ascii").split("\n")[:-1]]
    if len(entries) != header["count"]:
        raise InputError(f"{path} names {len(entries)} images, {HEADER} counts {header['count']}")
    return entries


def _contributions(
    folder: Path, file: str, checksums: Mapping[str, str], entries: Sequence[Mapping[str, Any]]
) -> Contributions:
    path = folder / file
    if not path.is_file():
        raise InputError(f"{path} is gone: collect the images again")
    contributions = Contributions.load(path)
    if storage.file_checksum(path) != checksums.get(file):
        raise InputError(f"{path} is not the file that its pass wrote: collect the images again")
    if [entry["row"] for entry in entries] != list(range(len(contributions))):
        raise InputError(f"{path} has {len(contributions)} rows, {IMAGES} names others: collect the images again")
    return contributions
