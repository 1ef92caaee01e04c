"""The pass over images that analyses start from: collecting their contributions, or opening a collection."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clipfast.commands import console
from clipfast.commands.files import prepare_folder
from clipfast.commands.interrupts import saving_interrupts
from clipfast.commands.labels import labels_of
from clipfast.commands.loading import check_device, load_model, load_model_of
from clipfast.commands.options import DTYPE, MODEL, InputOptions, parse_size, size_text
from clipfast.commands.passing import Shown
from clipfast.commands.quantities import plural
from clipfast.dataset.collecting import collect as collect_inputs
from clipfast.dataset.collection import Collection, labelled
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.labelling import Labeller
from clipfast.dataset.labels import parse_where
from clipfast.dataset.manifest import KEPT, Manifest, is_collection
from clipfast.dataset.passes import PassOptions
from clipfast.errors import InputError
from clipfast.model import Model

EXACT = PassOptions(kept=dict.fromkeys(KEPT, "exact"), retry_failed=True)
"""What analyses keep that collect their images themselves: everything, to the last bit. Failures are tried again."""


@dataclass(frozen=True)
class Collected:
    """The result of a pass, or of opening an earlier one.

    Attributes:
        collection: on disk.
        model: the model of the collection.
        failed: how many images could not be read; 0 for a collection that was opened.
        complete: whether this pass came to its end; True for a collection that was opened.
    """

    collection: Collection
    model: Model
    failed: int
    complete: bool


def collect(options: InputOptions, folder: Path, *, unfinished: bool = False, how: PassOptions = EXACT) -> Collected:
    """Decomposes images into a collection, or goes on with the pass that an earlier run began there.

    SIGINT, SIGTERM and SIGHUP end the pass; the units that are done are kept.

    Args:
        options: the images and the model; or one folder with a collection, which is opened.
        folder: where the collection is written.
        unfinished: whether a collection is opened whose pass did not come to its end; else it is refused.
        how: what is kept per image, and in which units; batch size and labels are those of ``options``.

    Raises:
        ClipfastError: an option that does not fit, no readable image, or a folder with another collection.
        OSError: a result that cannot be written.
    """
    if len(options.images) == 1 and is_collection(options.images[0]):
        return _open(options, options.images[0], unfinished)
    prepare_folder(folder)
    options = replace(options, model=options.model or MODEL, dtype=options.dtype or DTYPE)
    parse_size(options.image_size)  # what is wrong with it is said before anything slow
    inputs = open_inputs(options.images, skip=folder)
    labeller = labeller_of(options)
    model = load_model_of(options)
    exact = "float64" if model.dtype == torch.float64 else "float32"
    how = replace(
        how,
        kept={name: exact if dtype == "exact" else dtype for name, dtype in how.kept.items()},
        batch_size=options.batch_size,
        model=options.model,
        pretrained=options.pretrained,
    )
    with saving_interrupts() as interrupts:
        try:
            summary = collect_inputs(inputs, folder, model, how, labeller=labeller, events=Shown(interrupts))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_how_far(folder)) from None
        problems = [problem for each in inputs for problem in getattr(each, "problems", list)()]
    for problem in problems:
        console.error(problem)
    for line in [*(labeller.notes() if labeller is not None else ()), *summary.labels.lines()]:
        console.warn(line)
    for note in (*(note for each in inputs for note in getattr(each, "notes", list)()), *summary.notes.lines()):
        console.note(note)
    collection = Collection(folder, unfinished=True)
    return Collected(collection, model, collection.failed + len(problems), collection.complete)


def _how_far(folder: Path) -> str:
    if not is_collection(folder):
        return "nothing is collected yet"
    manifest = Manifest(folder)
    return f"{len(manifest.finished())} of {manifest.plan.count} units are collected; run it again to go on"


def labeller_of(options: InputOptions) -> Labeller | None:
    """What gives images the labels that the options ask for; None where none are asked for.

    Raises:
        InputError: a column without ``--labels``, or a filter that is none.
    """
    options.check()
    if options.labels is None:
        return None
    return Labeller(
        options.labels,
        label=options.label_column,
        group=options.group_columns(),
        file_column=options.file_column,
        where=parse_where(options.where),
    )


def _open(options: InputOptions, folder: Path, unfinished: bool) -> Collected:
    """A collection from before, with the model that its settings name, and other labels where some are given."""
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
        manifest = collection.manifest
        done = f"{len(manifest.finished())} of {manifest.plan.count} units"
        console.warn(f"{folder} holds an unfinished pass: {done}, {plural(collection.count, 'image')}")
    return Collected(collection, model, 0, True)
