"""The pass over images that analyses start from: collecting their contributions, or opening what was collected."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from clipfast.analyses.moments import Moments
from clipfast.commands import console
from clipfast.commands.files import prepare_folder
from clipfast.commands.labels import labelled_images, labels_of
from clipfast.commands.loading import check_device, load_model, versions
from clipfast.commands.options import DTYPE, MODEL, InputOptions
from clipfast.commands.outcome import memory_for
from clipfast.commands.reading import reading
from clipfast.dataset.collection import Collection, CollectionWriter, Entry, is_collection, labelled
from clipfast.dataset.files import Source, find_images
from clipfast.errors import ClipfastError, InputError
from clipfast.model import Model


@dataclass(frozen=True)
class Collected:
    """What a pass left.

    Attributes:
        collection: on disk.
        model: the model, where it was loaded.
        failed: how many images could not be read.
        complete: whether the pass came to its end.
    """

    collection: Collection
    model: Model
    failed: int
    complete: bool


def collect(options: InputOptions, folder: Path) -> Collected:
    """Decomposes images into a collection, taking up what an earlier pass left there.

    Raises:
        ClipfastError: an option that does not fit, no readable image, or a folder with another collection.
        OSError: a result that cannot be written.
    """
    if len(options.images) == 1 and is_collection(options.images[0]):
        return _open(options, options.images[0])
    prepare_folder(folder)
    sources, missing, left_out = find_images(options.images, skip=folder)
    if not sources and len(missing) == 1:
        raise missing[0].error
    for gone in missing:
        console.error(gone.error)
    if not sources:
        raise InputError(f"none of the {len(missing)} paths has images")
    options = replace(options, model=options.model or MODEL, dtype=options.dtype or DTYPE)
    images = labelled_images(options, sources)
    sources = [source for source, _ in images]
    model = load_model(options.model or MODEL, options.pretrained, check_device(options.device), options.dtype or DTYPE)
    settings = _settings(options, sources, model)
    writer = CollectionWriter(folder, settings, not options.moments_only, Moments(model))
    done = {entry.file for entry in writer.entries}
    if done:
        console.note(f"{len(done)} of {len(sources)} images were collected before: going on with the others")
    for gone in missing:
        writer.fail(str(gone.path), console.one_line(gone.error))
    wanted = [(source, entry) for source, entry in images if entry.file not in done]
    failed, complete = len(missing), False

    def fail(item: tuple[Source, Entry], error: ClipfastError) -> None:
        console.error(error)
        writer.fail(item[1].file, console.one_line(error))

    try:
        with (
            console.progress("collecting", len(wanted)) as advance,
            reading(model, wanted, lambda item: item[0], options.batch_size, fail) as batches,
        ):
            for batch in batches:
                failed += batch.failed
                if batch.items:
                    named = [entry for _, entry in batch.items]
                    with memory_for(options.batch_size, str(model.device)):
                        failed += _decompose(model, named, batch.pixels, writer, options.dtype or DTYPE)
                advance(options.batch_size)
        complete = True
    except KeyboardInterrupt:
        have = f"{len(writer.entries)} of {len(sources)} images are collected"
        console.error(f"interrupted: {have}; run it again to go on")
    finally:
        writer.flush(complete=complete)
    for note in left_out:
        console.note(note)
    if not writer.entries:
        if not complete:
            raise KeyboardInterrupt
        raise InputError("no image could be read")
    return Collected(Collection(folder), model, failed, complete)


def _open(options: InputOptions, folder: Path) -> Collected:
    """A collection from before, with the model that its header names, and other labels where some are given."""
    collection = Collection(folder)
    header = collection.header
    for name in ("model", "pretrained", "dtype"):
        given = getattr(options, name)
        if given is not None and given != header[name]:
            raise InputError(
                f"{folder} was collected with {name} {header[name]!r}, not {given!r}: leave --{name} out, or give the "
                "images themselves"
            )
    labels = labels_of(options, collection.sources())
    if labels is not None:
        collection.entries = labelled(collection.entries, labels)
    model = load_model(header["model"], header["pretrained"], check_device(options.device), header["dtype"])
    if not header["complete"]:
        console.warn(f"{folder} holds a pass that was not finished: {len(collection.entries)} images")
    return Collected(collection, model, 0, True)


def _settings(options: InputOptions, sources: Sequence[Source], model: Model) -> dict[str, Any]:
    named = "\n".join(map(str, sources)).encode("utf-8", "surrogateescape")
    return {
        "model": options.model,
        "pretrained": options.pretrained,
        "dtype": options.dtype,
        "moments_only": options.moments_only,
        "labels": options.labels,
        "images": hashlib.sha256(named).hexdigest()[:16],
        "layers": model.tower.layers,
        "heads": model.tower.heads,
        "clipfast": versions()["clipfast"],
    }


def _decompose(model: Model, batch: list[Entry], pixels: Tensor, writer: CollectionWriter, dtype: str) -> int:
    """One batch, from pixels to the collection; returns how many have no finite embedding."""
    found = model.decompose(pixels, class_token=True)
    finite = found.is_finite().tolist()
    for entry, good in zip(batch, finite, strict=True):
        if not good:
            reason = f"{entry.file}: the embedding is not finite in {dtype}"
            console.error(reason)
            writer.fail(entry.file, reason)
    rows = [row for row, good in enumerate(finite) if good]
    if rows:
        writer.add([batch[row] for row in rows], found.select(rows) if len(rows) < len(batch) else found)
    return len(batch) - len(rows)
