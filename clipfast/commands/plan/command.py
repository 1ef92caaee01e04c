"""``clipfast plan``: hours, bytes and network of a pass over many images."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from clipfast.commands import console
from clipfast.commands.collection.info.command import describe
from clipfast.commands.loading import check_device, load_model
from clipfast.commands.options import MODEL
from clipfast.commands.plan.measuring import SIZE, measure, named_shape, shape_of
from clipfast.commands.plan.options import Options
from clipfast.commands.quantities import bytes_text, count_text, hours_text, parse_count, plural
from clipfast.dataset.costs import Estimate, Machines, Sizes, estimate
from clipfast.errors import InputError

FORMAT = "clipfast.plan/1"
IMAGES = ("1M", "100M", "5B")
IMAGE_BYTES = 100_000
UNIT_IMAGES = 10_000


@dataclass(frozen=True)
class _Basis:
    """What an estimate starts from.

    Attributes:
        model: its name.
        rate: images per second of one worker.
        image_bytes: mean size of an encoded image.
        unit_images: images of a unit.
        sizes: of what is written.
        notes: where each comes from.
    """

    model: str
    rate: float
    image_bytes: float
    unit_images: int
    sizes: Sizes
    notes: list[str]


def run(options: Options) -> int:
    """Prints what a pass takes; returns the exit code.

    Raises:
        ClipfastError: options that do not fit, or a model that cannot be loaded.
        OSError: nothing can be written for measuring.
    """
    options.check()
    counts = [parse_count(text, "--images") for text in options.images or IMAGES]
    basis = _of_model(options) if options.like is None else _of_collection(options)
    machines = Machines(basis.rate, options.machines, options.workers, options.start, options.disk * 1e6)
    estimates = [estimate(count, basis.unit_images, basis.image_bytes, basis.sizes, machines) for count in counts]
    if options.json:
        console.say(json.dumps(_content(basis, machines, estimates), indent=2))
        return 0
    who = f"{plural(machines.count, 'machine')} with {plural(machines.workers, 'worker')}"
    title = f"{basis.model}, {who} of {basis.rate:.4g} images/s, units of {plural(basis.unit_images, 'image')}"
    console.table(["what", *(f"{count_text(count)} images" for count in counts)], _rows(estimates), title=title)
    for note in basis.notes:
        console.note(note)
    return 0


def _of_model(options: Options) -> _Basis:
    name = options.model or MODEL
    if options.rate is None:
        model = load_model(name, None, check_device(options.device), options.dtype)
        measured = measure(model, options)
        shape, rate = shape_of(model.tower), measured.rate
        size = f"{SIZE[0]} x {SIZE[1]}"
        note = f"rate: measured on {measured.images} drawn images of {size} pixels, one worker on {measured.device}"
    else:
        shape, rate, note = named_shape(name), options.rate, "rate: as given"
    notes = [note, "bytes on disk: of all numbers before compression"]
    if options.image_bytes is None:
        notes.append(f"bytes of images: {bytes_text(IMAGE_BYTES)} assumed, see --image-bytes")
    return _Basis(
        model=name,
        rate=rate,
        image_bytes=options.image_bytes or IMAGE_BYTES,
        unit_images=options.unit_images or UNIT_IMAGES,
        sizes=Sizes.of(shape, options.kept.kept()),
        notes=notes,
    )


def _of_collection(options: Options) -> _Basis:
    """From what a collection's last run left, and from its files.

    Raises:
        InputError: no collection, none with images, or one without a rate where none is given.
    """
    assert options.like is not None
    content = describe(options.like)
    images = sum(content["statuses"].values())
    units = content["units"] - content["units_left"]
    if not images:
        raise InputError(f"{options.like} holds no image yet: there is nothing to estimate from")
    run, rate = content["last_run"], options.rate
    if rate is None:
        if run is None:
            raise InputError(f"{options.like} does not say how fast its last run was: give --rate")
        rate = run["images_per_second"] / run["workers"]
    sizes = dict(content["bytes"])
    once = sizes.pop("once")
    per_unit = {name: sizes.pop(name, 0) / units for name in ("moments", "records")}
    measured = content["bytes_of_shards"] / images
    notes = [
        "rate: as given" if options.rate is not None else f"rate: of the last run of {options.like}",
        f"bytes on disk: those of {options.like}, {images:,} images",
    ]
    if options.image_bytes is None and not measured:
        notes.append(f"bytes of images: {bytes_text(IMAGE_BYTES)} assumed, see --image-bytes")
    return _Basis(
        model=content["settings"]["model"]["name"],
        rate=rate,
        image_bytes=options.image_bytes or measured or IMAGE_BYTES,
        unit_images=options.unit_images or max(1, round(images / units)),
        sizes=Sizes({name: size / images for name, size in sizes.items()}, per_unit, once),
        notes=notes,
    )


def _rows(estimates: list[Estimate]) -> list[list[str]]:
    """A row per quantity, a column per estimate."""
    kinds = list(dict.fromkeys(kind for each in estimates for kind, size in each.written.items() if size))
    return [
        ["units of work", *(f"{each.units:,}" for each in estimates)],
        ["time", *(hours_text(each.seconds) for each in estimates)],
        ["time to merge the moments", *(hours_text(each.merge_seconds) for each in estimates)],
        ["images read", *(bytes_text(each.read) for each in estimates)],
        ["on disk", *(bytes_text(each.disk) for each in estimates)],
        *([f"on disk, {kind}", *(bytes_text(each.written[kind]) for each in estimates)] for kind in kinds),
        ["a machine reads", *(f"{bytes_text(each.reading)}/s" for each in estimates)],
        ["a machine writes", *(f"{bytes_text(each.writing)}/s" for each in estimates)],
    ]


def _content(basis: _Basis, machines: Machines, estimates: list[Estimate]) -> dict[str, Any]:
    """The same as JSON; bytes, and seconds."""
    return {
        "format": FORMAT,
        "model": basis.model,
        "machines": asdict(machines),
        "image_bytes": basis.image_bytes,
        "unit_images": basis.unit_images,
        "bytes_per_image": dict(basis.sizes.per_image),
        "bytes_per_unit": dict(basis.sizes.per_unit),
        "notes": basis.notes,
        "estimates": [asdict(each) | {"hours": each.hours, "disk": each.disk} for each in estimates],
    }
