"""The pass over images that analyses start from: collecting their contributions, or opening a collection."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.analyses.moments import Moments
from clipfast.commands import console
from clipfast.commands.files import prepare_folder
from clipfast.commands.interrupts import Interrupts, saving_interrupts
from clipfast.commands.labels import labelled_images, labels_of
from clipfast.commands.loading import check_device, load_model, load_model_of, versions
from clipfast.commands.options import DTYPE, MODEL, InputOptions, parse_size, size_text
from clipfast.commands.outcome import OutOfMemory
from clipfast.commands.reading import Prepared, reading
from clipfast.contributions import Contributions
from clipfast.dataset.collection import Collection, Entry, changed_images, is_collection, labelled, shown
from clipfast.dataset.files import Source, find_images
from clipfast.dataset.writing import CollectionWriter, Failure
from clipfast.errors import ClipfastError, InputError, is_out_of_memory
from clipfast.model import Model

_OTHERS = {
    "weights": "images collected with other weights of the model",
    "images": "a pass over other images",
    "label_checksum": "images with other labels",
}
"""What a folder holds where a setting differs whose value says nothing to a reader."""


@dataclass(frozen=True)
class Collected:
    """The result of a pass, or of opening an earlier one.

    Attributes:
        collection: on disk.
        model: the model of the collection.
        failed: how many images this pass could not read; 0 for a collection that was opened.
        complete: whether this pass came to its end; True for a collection that was opened.
    """

    collection: Collection
    model: Model
    failed: int
    complete: bool


@dataclass(frozen=True)
class _Item:
    """An image of the pass: its place among all of them, its source and its entry."""

    number: int
    source: Source
    entry: Entry

    @property
    def key(self) -> tuple[str, str]:
        return self.entry.path, self.entry.member


def collect(options: InputOptions, folder: Path, *, unfinished: bool = False) -> Collected:
    """Decomposes images into a collection, or goes on with the pass that an earlier run began there.

    SIGINT, SIGTERM and SIGHUP save what is done and end the pass.

    Args:
        options: the images and the model; or one folder with a collection, which is opened.
        folder: where the collection is written.
        unfinished: whether a collection is opened whose pass did not come to its end; else it is refused.

    Raises:
        ClipfastError: an option that does not fit, no readable image, or a folder with another collection.
        OSError: a result that cannot be written.
    """
    if len(options.images) == 1 and is_collection(options.images[0]):
        return _open(options, options.images[0], unfinished)
    prepare_folder(folder)
    sources, missing, left_out = find_images(options.images, skip=folder)
    if not sources and len(missing) == 1:
        raise missing[0].error
    for path in missing:
        console.error(path.error)
    if not sources:
        raise InputError(f"none of the {len(missing)} paths has images")
    options = replace(options, model=options.model or MODEL, dtype=options.dtype or DTYPE)
    parse_size(options.image_size)  # what is wrong with it is said before anything slow
    images = labelled_images(options, sources)
    model = load_model_of(options)
    items = [_Item(number, source, entry) for number, (source, entry) in enumerate(images)]
    entries = [entry for _, entry in images]
    settings = _settings(options, entries, model)
    complete = False
    with (
        saving_interrupts() as interrupts,
        CollectionWriter(folder, settings, not options.moments_only, Moments(model), _OTHERS) as writer,
    ):
        _check_unchanged(folder, writer, entries)
        keys = {item.key for item in items}
        paths = [Failure(str(gone.path), console.one_line(gone.error), os.path.abspath(gone.path)) for gone in missing]
        writer.replace_failures([*paths, *(failure for failure in writer.failed if failure.key in keys)])
        try:
            _Pass(options, model, items, writer, interrupts).run()
            complete = True
        except KeyboardInterrupt:
            pass
        finally:
            try:
                _flush(writer, interrupts, complete)
            except KeyboardInterrupt:  # the first signal, in the moment before it was deferred: there is no second
                _flush(writer, interrupts, complete)
    if not complete:
        have = f"{len(writer.entries)} of {len(items)} images are collected; run it again to go on"
        if not writer.entries:
            raise KeyboardInterrupt(have)
        console.error(f"interrupted: {have}")
    else:
        interrupts.check()
    for note in left_out:
        console.note(note)
    if not writer.entries:
        raise InputError("no image could be read")
    return Collected(Collection(folder, unfinished=True), model, len(writer.failed), complete)


def _flush(writer: CollectionWriter, interrupts: Interrupts, complete: bool) -> None:
    with interrupts.deferred():
        writer.flush(complete=complete)


class _Pass:
    """Takes the images that are not in the collection yet, then those that failed in an earlier run.

    Args:
        options: batch size and dtype.
        model: decomposes them.
        items: all images of the pass.
        writer: takes the results.
        interrupts: ends the pass between two batches.
    """

    def __init__(
        self,
        options: InputOptions,
        model: Model,
        items: Sequence[_Item],
        writer: CollectionWriter,
        interrupts: Interrupts,
    ) -> None:
        self._options, self._model, self._writer, self._interrupts = options, model, writer, interrupts
        failed_before = {failure.key for failure in writer.failed}
        self._left = items[writer.position :]
        self._again = [item for item in items[: writer.position] if item.key in failed_before]
        self._at_once = options.batch_size
        self._computed = False

    def run(self) -> None:
        """Runs the pass.

        Raises:
            KeyboardInterrupt: it was interrupted; the writer has all batches that were taken.
        """
        if self._writer.entries:
            have = f"{len(self._writer.entries)} of {len(self._left) + self._writer.position} images"
            console.note(f"{have} were collected before: going on with the others")
        count = len(self._left) + len(self._again)
        with console.progress("collecting", count) as advance:
            for items, advances in ((self._left, True), (self._again, False)):
                for batch, failed, position in self._batches(items):
                    self._take(batch, failed, position if advances else None)
                    advance(self._options.batch_size)
                    self._interrupts.check()

    def _batches(self, items: Sequence[_Item]) -> Iterator[tuple[Prepared[_Item], list[Failure], int]]:
        """Batches with the images that could not be read, and the place among all images after the batch."""
        failed: list[Failure] = []

        def fail(item: _Item, error: ClipfastError) -> None:
            console.error(error)
            failed.append(Failure.of(item.entry, console.one_line(error)))

        end = 0
        with reading(self._model, items, lambda item: item.source, self._options.batch_size, fail) as batches:
            for batch in batches:
                end += len(batch.items) + batch.failed
                yield batch, failed.copy(), items[end - 1].number + 1
                failed.clear()

    def _take(self, batch: Prepared[_Item], failed: list[Failure], position: int | None) -> None:
        """Decomposes a batch and gives it to the writer, in parts where memory is short."""
        if not batch.items:
            self._write([], None, failed, position)
        start = 0
        while start < len(batch.items):
            part = batch.items[start : start + self._at_once]
            end = start + len(part)
            after = None if position is None else position if end == len(batch.items) else batch.items[end].number
            if self._fits(part, batch.pixels[start:end], failed, after):
                start, failed = end, []
            elif len(part) > 1:
                self._at_once = len(part) // 2
                console.warn(f"out of memory with {len(part)} images at once: going on with {self._at_once}")
            elif not self._computed:
                raise OutOfMemory(1, str(self._model.device))
            else:
                reason = f"{part[0].entry.file}: out of memory on {self._model.device}"
                console.error(reason)
                self._write([], None, [*failed, Failure.of(part[0].entry, reason)], after)
                start, failed = end, []

    def _fits(self, items: Sequence[_Item], pixels: Tensor, failed: list[Failure], position: int | None) -> bool:
        """Whether there was memory for a part of a batch; if not, nothing of it is in the collection."""
        try:
            self._decompose(items, pixels, failed, position)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self._computed = True
            return True
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _decompose(self, items: Sequence[_Item], pixels: Tensor, failed: list[Failure], position: int | None) -> None:
        contributions = self._model.decompose(pixels, class_token=self._model.tower.has_class_token)
        finite = contributions.is_finite().tolist()
        rows = [row for row, is_finite in enumerate(finite) if is_finite]
        if len(rows) < len(items):
            failed = list(failed)
            for item, is_finite in zip(items, finite, strict=True):
                if not is_finite:
                    reason = f"{item.entry.file}: the embedding is not finite in {self._options.dtype}"
                    console.error(reason)
                    failed.append(Failure.of(item.entry, reason))
            contributions = contributions.select(rows)
        self._write([items[row].entry for row in rows], contributions if rows else None, failed, position)

    def _write(
        self,
        entries: Sequence[Entry],
        contributions: Contributions | None,
        failed: Sequence[Failure],
        position: int | None,
    ) -> None:
        with self._interrupts.deferred():
            self._writer.add(entries, contributions, failed, position)
            if self._writer.is_due:
                self._writer.flush(complete=False)


def _check_unchanged(folder: Path, writer: CollectionWriter, entries: Sequence[Entry]) -> None:
    """Refuses to go on where an image that was collected has changed since."""
    now = {(entry.path, entry.member): entry.identity for entry in entries}
    before = [entry for entry in writer.entries if (entry.path, entry.member) in now]
    changed = changed_images(before, [now[entry.path, entry.member] for entry in before])
    if changed:
        raise InputError(
            f"{folder} holds {len(changed)} images that have changed since they were collected ({shown(changed)}): "
            "give another folder"
        )


def _open(options: InputOptions, folder: Path, unfinished: bool) -> Collected:
    """A collection from before, with the model that its header names, and other labels where some are given."""
    collection = Collection(folder, unfinished=unfinished)
    header = collection.header
    for name in ("model", "pretrained", "dtype"):
        option = getattr(options, name)
        if option is not None and option != header[name]:
            raise InputError(
                f"{folder} was collected with {name} {header[name]!r}, not {option!r}: leave --{name} out, or give the "
                "images themselves"
            )
    size, asked = tuple(header["image_size"]), parse_size(options.image_size)
    if asked is not None and asked != size:
        raise InputError(
            f"{folder} was collected with image size {size_text(size)}, not {size_text(asked)}: "
            "leave --image-size out, or give the images themselves"
        )
    labels = labels_of(options, collection.sources() if options.labels is not None else [])
    if labels is not None:
        collection.entries = labelled(collection.entries, labels)
    model = load_model(header["model"], header["pretrained"], check_device(options.device), header["dtype"], size)
    if model.fingerprint() != header["weights"]:
        raise InputError(f"the weights of {header['model']} are not those that {folder} was collected with")
    if not collection.complete:
        console.warn(f"{folder} holds an unfinished pass: {len(collection.entries)} of {header['sources']} images")
    return Collected(collection, model, 0, True)


def _settings(options: InputOptions, entries: Sequence[Entry], model: Model) -> dict[str, Any]:
    """What the results depend on; a pass with other settings does not go on in the same folder."""
    images = json.dumps([(entry.path, entry.member) for entry in entries])
    labels = json.dumps([(entry.label, entry.group) for entry in entries])
    return {
        "model": options.model,
        "pretrained": options.pretrained,
        "image_size": list(model.image_size),  # before the weights, which hold the positions of one size
        "weights": model.fingerprint(),
        "dtype": options.dtype,
        "moments_only": options.moments_only,
        "labels": options.labels,
        "label_checksum": _digest(labels),
        "sources": len(entries),
        "images": _digest(images),
        "layers": model.layers,
        "heads": model.heads,
        "clipfast": versions()["clipfast"],
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
