"""The images to segment: from files, folders, shards, or a collection, whose files are opened again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipfast.commands import console
from clipfast.commands.collecting import collect
from clipfast.commands.labels import labelled_images
from clipfast.commands.loading import check_device, load_model_of
from clipfast.commands.options import DTYPE, MODEL, InputOptions, parse_size, size_text
from clipfast.commands.outcome import memory_for
from clipfast.commands.reading import Prepared, reading
from clipfast.dataset.collection import Entry
from clipfast.dataset.files import Source, find_images
from clipfast.dataset.manifest import is_collection
from clipfast.errors import ClipfastError, InputError
from clipfast.model import Model

Item = tuple[Source, Entry]


@dataclass
class Failures:
    """Images that are left out, each with one line to say why.

    Attributes:
        rows: file and reason of each, as the JSON has them.
    """

    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, file: str, error: ClipfastError | str) -> None:
        """Reports one on stderr and keeps it for the JSON."""
        console.error(error)
        self.rows.append({"file": file, "error": console.one_line(error)})

    def add_item(self, item: Item, error: ClipfastError) -> None:
        """As :meth:`add`, for an image."""
        self.add(item[1].file, error)


def each_batch(
    model: Model, items: Sequence[Item], size: int, failures: Failures, add: Callable[[Prepared[Item]], None]
) -> None:
    """Reads and prepares images, hands them on a batch at a time, and shows how far it is.

    Args:
        model: that prepares them.
        items: the images.
        size: images at once.
        failures: gets those that cannot be read.
        add: takes a batch that is not empty.
    """
    with (
        console.progress("segmenting", len(items)) as advance,
        reading(model, items, lambda item: item[0], size, failures.add_item) as batches,
    ):
        for batch in batches:
            if batch.items:
                with memory_for(size, str(model.device)):
                    add(batch)
            advance(size)


@dataclass(frozen=True)
class ImageSet:
    """Images with their labels, and the model that is to decompose them.

    Attributes:
        items: the images, in order.
        options: those of the command, with the model filled in.
        load: loads the model.
    """

    items: Sequence[Item]
    options: InputOptions
    load: Callable[[], Model]

    @property
    def entries(self) -> list[Entry]:
        """File, name and label of every image."""
        return [entry for _, entry in self.items]


def find_image_set(options: InputOptions, out: Path, aside: Path | None, failures: Failures) -> ImageSet:
    """Finds images and their labels; loads the model only where a collection names it.

    Args:
        options: the images: files, folders and shards, or a collection, whose images are opened where they were.
        out: a folder of results, not searched.
        aside: another folder that is not searched, such as that of the masks.
        failures: gets the paths that hold no image.

    Raises:
        ClipfastError: no images, or labels that cannot be read.
    """
    if len(options.images) == 1 and is_collection(options.images[0]):
        collected = collect(options, out)
        header = collected.collection.header
        settings = {name: header[name] for name in ("model", "pretrained", "dtype")}
        named = replace(options, **settings, image_size=size_text(header["image_size"]))
        items = list(zip(collected.collection.sources(), collected.collection.entries, strict=True))
        return ImageSet(items, named, lambda: collected.model)
    sources, missing, left_out = find_images(options.images, skip=out)
    if aside is not None:
        folder = aside.resolve()
        sources = [source for source in sources if not source.path.resolve().is_relative_to(folder)]
    if not sources and len(missing) == 1:
        raise missing[0].error
    for gone in missing:
        failures.add(str(gone.path), gone.error)
    for note in left_out:
        console.note(note)
    if not sources:
        raise InputError("no images are left" if aside else f"none of the {len(missing)} paths has images")
    images = labelled_images(options, sources)
    named = replace(options, model=options.model or MODEL, dtype=options.dtype or DTYPE)
    check_device(options.device)
    parse_size(options.image_size)
    return ImageSet(images, named, lambda: load_model_of(named))
