"""The images of a pass that needs the pictures themselves, wherever they were named: files, shards, a collection."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from clipfast.commands import console
from clipfast.commands.collecting import collect
from clipfast.commands.labels import labelled_images
from clipfast.commands.loading import check_device, load_model_of
from clipfast.commands.options import DTYPE, MODEL, InputOptions
from clipfast.dataset.collection import Entry, is_collection
from clipfast.dataset.files import Source, find_images
from clipfast.errors import ClipfastError, InputError
from clipfast.model import Model

Item = tuple[Source, Entry]


@dataclass
class Failures:
    """Images that are left out, each with one line to say why.

    Attributes:
        found: file and reason of each.
    """

    found: list[dict[str, str]] = field(default_factory=list)

    def add(self, file: str, error: ClipfastError | str) -> None:
        """Says and notes one."""
        console.error(error)
        self.found.append({"file": file, "error": console.one_line(error)})

    def add_item(self, item: Item, error: ClipfastError) -> None:
        """The same of an image."""
        self.add(item[1].file, error)


@dataclass(frozen=True)
class Pictures:
    """Images with what is known of them, and the model that is to look at them.

    Attributes:
        items: the images, in order.
        options: what was asked for, with the model filled in.
        load: loads the model.
    """

    items: Sequence[Item]
    options: InputOptions
    load: Callable[[], Model]

    @property
    def entries(self) -> list[Entry]:
        """What is known of every image."""
        return [entry for _, entry in self.items]


def find_pictures(options: InputOptions, out: Path, aside: Path | None, failures: Failures) -> Pictures:
    """Finds images and looks up their labels; no model is loaded for that, unless a collection names it.

    Args:
        options: the images: files, folders and shards, or a collection, whose images are found where they were.
        out: a folder of results, not searched.
        aside: another folder that is not searched, such as that of the masks.
        failures: gets the paths that hold no image.

    Raises:
        ClipfastError: no images, or labels that cannot be read.
    """
    if len(options.images) == 1 and is_collection(options.images[0]):
        found = collect(options, out)
        header = found.collection.header
        named = replace(options, **{name: header[name] for name in ("model", "pretrained", "dtype")})
        items = list(zip(found.collection.sources(), found.collection.entries, strict=True))
        return Pictures(items, named, lambda: found.model)
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
    return Pictures(images, named, lambda: load_model_of(named))
