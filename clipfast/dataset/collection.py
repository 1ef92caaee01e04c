"""A collection to read, as the analyses take it: moments, images with their labels, and their contributions."""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from clipfast.analyses.moments import Moments
from clipfast.basis import StoredBasis
from clipfast.contributions import Contributions
from clipfast.dataset.arrays import UnitArrays
from clipfast.dataset.files import Identity, Source, distinct, found_again
from clipfast.dataset.images_table import fine, name_of, read_images
from clipfast.dataset.labels import Labels
from clipfast.dataset.manifest import Manifest, Record
from clipfast.dataset.merging import load_basis, merged_moments
from clipfast.dataset.reopening import source_of
from clipfast.dataset.samples import Status
from clipfast.errors import InputError
from clipfast.inputs import printable

_ROWS = 1024
"""Images that are read at once."""
_SHOWN = 3
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
"""Names of commands' options."""

logger = logging.getLogger("clipfast")


@dataclass(frozen=True)
class Entry:
    """One image of a collection.

    Attributes:
        file: the image as the user named it; no other image of the collection has this name.
        name: a file name without suffix, different for every image.
        path: the image's file, or the shard or table that it is in, from the root of the file system or as a URL.
        key: its sample's name in the tar shard, empty for a file of its own.
        member: its own name in the shard or the table, empty for a file of its own.
        size: bytes of the file or the shard when it was read.
        modified_ns: when the file or the shard was last written before it was read, in nanoseconds since 1970.
        folder: the folder that was searched, None for a file that was named itself.
        label: its label, None where there is none.
        group: its group, None where there is none.
    """

    file: str
    name: str
    path: str
    key: str = ""
    member: str = ""
    size: int | None = None
    modified_ns: int | None = None
    folder: str | None = None
    label: str | None = None
    group: str | None = None

    @classmethod
    def of(cls, source: Source) -> "Entry":
        """The image of a source, without labels."""
        folder = None if source.folder is None else os.path.abspath(source.folder)
        path, member, size, modified_ns = source.identity()
        return cls(str(source), source.name, path, source.key, member, size, modified_ns, folder)


def labelled(entries: Sequence[Entry], labels: Labels) -> list[Entry]:
    """The images with these labels, and groups where there are any, in place of those they had."""
    groups = labels.groups or (None,) * len(entries)
    return [
        replace(entry, label=label, group=group)
        for entry, label, group in zip(entries, labels.values, groups, strict=True)
    ]


class Collection:
    """A collection on disk, to read.

    Args:
        folder: where it is.
        unfinished: whether one whose pass did not come to its end is read too.

    Attributes:
        folder: where it is.
        manifest: its settings, plan and records.

    Raises:
        InputError: no collection, an unfinished one, or a damaged one.
    """

    def __init__(self, folder: Path, *, unfinished: bool = False) -> None:
        self.folder = folder
        self.manifest = Manifest(folder)
        self._records = list(self.manifest.records())
        if not (self.complete or unfinished):
            raise InputError(
                f"{folder} holds an unfinished pass ({len(self._records)} of {self.manifest.plan.count} units): run "
                "the command that began it once more to finish it"
            )
        if not any(record.count for record in self._records):
            raise InputError(f"{folder} holds no image yet, or none that could be read: run its pass again")
        self._entries: list[Entry] | None = None

    @property
    def complete(self) -> bool:
        """Whether the pass came to its end."""
        return len(self._records) == self.manifest.plan.count

    @property
    def count(self) -> int:
        """Images that are in."""
        return sum(record.count for record in self._records)

    @property
    def statuses(self) -> Counter[str]:
        """How many images have each status."""
        total: Counter[str] = Counter()
        for record in self._records:
            total.update(record.statuses)
        return total

    @property
    def failed(self) -> int:
        """Images, and units, that could not be read."""
        return sum(record.failed + (record.problem is not None) for record in self._records)

    @property
    def header(self) -> dict[str, Any]:
        """What analyses tell of the pass: ``model``, ``pretrained``, ``dtype``, ``weights``, ``labels`` and so on."""
        settings = self.manifest.settings
        model = settings.model
        names = ("pretrained", "image_size", "weights", "layers", "heads")
        return {"model": model["name"], "labels": settings.labels.get("origin"), "complete": self.complete} | {
            "count": self.count,
            "dtype": _DTYPES.get(model["dtype"], model["dtype"]),
            **{name: model[name] for name in names},
        }

    @property
    def holds_contributions(self) -> bool:
        """Whether every image's contributions were kept, not the moments alone."""
        kept = self.manifest.settings.kept
        return all(kept.get(name) is not None for name in ("codes", "terms", "embeddings"))

    @cached_property
    def moments(self) -> Moments:
        """Of all its images."""
        return merged_moments(self.manifest)

    @property
    def entries(self) -> list[Entry]:
        """Its images, in order, without those that failed."""
        if self._entries is None:
            rows = [row for record in self._records for row in self._rows(record)]
            names = distinct(_label(row) for row in rows)
            self._entries = [_entry(row, name) for row, name in zip(rows, names, strict=True)]
        return self._entries

    @entries.setter
    def entries(self, entries: list[Entry]) -> None:
        if len(entries) != self.count:
            raise ValueError(f"{len(entries)} entries for {self.count} images")
        self._entries = entries

    def failures(self) -> Iterator[dict[str, str]]:
        """``file``, ``status`` and ``error`` of every image, and of every unit, that could not be read."""
        for record in self._records:
            if record.problem is not None:
                path = str(record.source.get("path", ""))
                yield {"file": path, "status": record.problem["kind"], "error": record.problem["reason"]}
            if record.failed:
                table = read_images(self.manifest.data / record.folder, record, ["id", "status", "reason"])
                for row in table.to_pylist():
                    if row["status"] != Status.OK:
                        yield {"file": row["id"], "status": row["status"], "error": row["reason"]}

    def sources(self) -> list[Source]:
        """The images themselves, in order. One that is gone raises when it is opened; changed ones give a warning."""
        places = [
            source_of(entry.file, entry.name, entry.path, key=entry.key, member=entry.member, folder=entry.folder)
            for entry in self.entries
        ]
        sources = found_again(places)
        changed = changed_images(self.entries, [source.identity() for source in sources])
        if changed:
            logger.warning(
                "%s: %d images have changed since they were collected (%s)", self.folder, len(changed), shown(changed)
            )
        return sources

    def batches(self, *, without_terms: bool = False) -> Iterator[tuple[Sequence[Entry], Contributions]]:
        """The images with their contributions, at most 1024 at once, in order.

        Args:
            without_terms: whether start and MLPs are not read. They are then zero, and what they are is in
                :attr:`.Contributions.rest`, so that the sum of all terms is still the embedding.

        Raises:
            InputError: what is asked for was not kept, or a file is gone or damaged.
        """
        kept = self.manifest.settings.kept
        wanted = {"codes": "--codes", "embeddings": "--embeddings"} | ({} if without_terms else {"terms": "--terms"})
        lacking = [option for name, option in wanted.items() if kept.get(name) is None]
        if lacking:
            if not any(kept.values()):
                raise InputError(f"{self.folder} holds moments only: collect the images again with their contributions")
            raise InputError(
                f"{self.folder} does not hold every image's {', '.join(n for n in wanted if kept.get(n) is None)}: "
                f"collect the images again with {' '.join(lacking)}"
            )
        entries, start = self.entries, 0
        for record in self._records:
            if not record.count:
                continue
            columns = ["mean", "std", "norm"]
            table = fine(read_images(self.manifest.data / record.folder, record, [*columns, "status"]))
            numbers = torch.from_numpy(np.stack([table.column(name).to_numpy() for name in columns], 1)).to(self._dtype)
            arrays = UnitArrays(self.manifest.data / record.folder, record)
            for first in range(0, record.count, _ROWS):
                part = slice(first, min(first + _ROWS, record.count))
                contributions = self._contributions(arrays, part, numbers[part], without_terms)
                yield entries[start + part.start : start + part.stop], contributions
            start += record.count

    def _contributions(self, arrays: UnitArrays, rows: slice, numbers: Tensor, without_terms: bool) -> Contributions:
        model = self.manifest.settings.model

        def read(name: str) -> Tensor:
            return torch.from_numpy(arrays.read(name, rows)).to(self._dtype)

        embedding = read("embeddings")
        if without_terms:
            start = rest = torch.zeros_like(embedding)
            mlps = torch.zeros((), dtype=self._dtype).expand(len(embedding), self._basis.layers, embedding.shape[1])
        else:
            terms = read("terms")
            start, mlps, rest = terms[:, 0], terms[:, 1:-1], terms[:, -1]
        mean, std, norm = numbers.T.contiguous()
        contributions = Contributions(
            embedding=embedding,
            norm=norm,
            mean=mean,
            std=std,
            codes=read("codes"),
            start=start,
            mlps=mlps,
            rest=rest,
            layers=tuple(range(model["layers"])),
            grid=(model["grid"][0], model["grid"][1]),
            basis=self._basis.to(embedding.device, self._dtype),
            prefix_tokens=model["prefix_tokens"],
            _class_codes=read("class_codes") if "class_codes" in arrays.names else None,
        )
        if not without_terms:
            return contributions
        return replace(contributions, rest=embedding / norm[:, None] - contributions.total())

    @cached_property
    def _basis(self) -> StoredBasis:
        return load_basis(self.folder)

    @property
    def _dtype(self) -> torch.dtype:
        """What contributions are computed in: float64 for a model of float64, else float32."""
        return torch.float64 if self.manifest.settings.model["dtype"] == "float64" else torch.float32

    def _rows(self, record: Record) -> list[dict[str, Any]]:
        columns = ["id", "path", "key", "member", "folder", "size", "modified_ns", "label", "group", "row"]
        table = fine(read_images(self.manifest.data / record.folder, record, [*columns, "status"]))
        return cast(list[dict[str, Any]], table.to_pylist())


def _label(row: dict[str, Any]) -> str:
    """What an image's results are called, before names are made distinct."""
    path = Path(name_of(row["path"]))
    stem = path.stem
    if row["folder"] is not None and path.is_relative_to(name_of(row["folder"])):
        stem = "__".join(path.relative_to(name_of(row["folder"])).with_suffix("").parts)
    place = name_of(row["key"] or row["member"])
    return f"{stem}__{place.replace('/', '__')}" if place else stem


def _entry(row: dict[str, Any], name: str) -> Entry:
    return Entry(
        file=row["id"],
        name=name,
        path=name_of(row["path"]),
        key=name_of(row["key"]),
        member=name_of(row["member"]),
        size=row["size"],
        modified_ns=row["modified_ns"],
        folder=None if row["folder"] is None else name_of(row["folder"]),
        label=row["label"],
        group=row["group"],
    )


def changed_images(entries: Sequence[Entry], identities: Sequence[Identity]) -> list[Entry]:
    """Images whose files were written again since they were read; files that are gone do not count."""
    return [
        entry
        for entry, now in zip(entries, identities, strict=True)
        if now.size is not None and (now.size, now.modified_ns) != (entry.size, entry.modified_ns)
    ]


def shown(entries: Sequence[Entry]) -> str:
    """Some of the images by name, for messages."""
    return ", ".join(printable(entry.file) for entry in entries[:_SHOWN]) + (", …" if len(entries) > _SHOWN else "")
