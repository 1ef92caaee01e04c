"""Collecting from Python: one call with what a program has, names or a data set in memory."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from clipfast.dataset.collecting import EngineName, engine_named
from clipfast.dataset.collecting import collect as collect_inputs
from clipfast.dataset.engines.engine import Engine, Events
from clipfast.dataset.inputs.objects import from_object
from clipfast.dataset.inputs.opening import open_inputs
from clipfast.dataset.labelling import Labeller
from clipfast.dataset.manifest import KEPT
from clipfast.dataset.passes import PassOptions, Preprocess, Summary
from clipfast.dataset.plan import Input
from clipfast.errors import InputError
from clipfast.model import Model

Keep = Mapping[str, str | None] | str | None


def collect(
    data: Any,
    out: str | PathLike[str],
    model: Model,
    *,
    keep: Keep = "float16",
    labels: Labeller | str | None = None,
    batch_size: int = 8,
    unit_size: int | None = None,
    preprocess: Preprocess = "exact",
    engine: Engine | EngineName = "serial",
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    threads: int | None = None,
    image_column: str | None = None,
    id_column: str | None = None,
    retry_failed: bool = False,
    max_error_rate: float = 1.0,
    events: Events | None = None,
) -> Summary:
    """Decomposes a data set into a collection on disk, or goes on where an earlier call was stopped.

    >>> clipfast.dataset.collect("shards/{0000..0099}.tar", "collection", model)
    >>> clipfast.dataset.collect(datasets.load_dataset("cifar10", split="test"), "collection", model, labels="columns")
    >>> collection = clipfast.dataset.open("collection")

    Args:
        data: a name or several, as ``clipfast collect`` takes them: folders, image files, tar shards, tables, lists of
            paths, URLs; or a Hugging Face data set, a torch ``Dataset``, an iterable of (id, image).
        out: the folder of the collection.
        model: decomposes the images.
        keep: what is kept of every image beside the moments. A dtype, ``"float16"`` or ``"float32"``, keeps codes,
            class codes and terms in it, and embeddings in float32. A mapping gives the dtype of each of them; None
            keeps none.
        labels: where labels are: ``"folder"``, ``"parent"``, ``"shard"``, ``"columns"``, a CSV file, or a
            :class:`.Labeller`, which also takes the names of columns.
        batch_size: images at once.
        unit_size: images in a unit of work where they are not in shards: what an interruption costs at most.
        preprocess: ``"exact"``, as the model prepares images itself, or ``"fast"``.
        engine: ``"serial"``, in this process; ``"local"``, processes of this machine; ``"ray"``; or an engine.
        workers: how many processes or actors.
        devices: where they compute, in turn.
        threads: of each worker.
        image_column: of tables, lists and data sets: the column with images, paths or URLs; None to choose one.
        id_column: of tables, lists and data sets: the column with a name for each image.
        retry_failed: compute units again in which images were missing or could not be read.
        max_error_rate: end the pass when a larger share of images fails.
        events: is told how the pass goes on.

    Returns:
        What this call has done; the collection itself is read with :func:`clipfast.dataset.open`.

    Raises:
        ClipfastError: data or options that do not fit, with every reason.
        OSError: a file cannot be written.
    """
    inputs = _inputs(data, Path(out), image_column, id_column)
    labeller = Labeller(labels) if isinstance(labels, str) else labels
    if isinstance(engine, str):
        engine = engine_named(engine, model, workers=workers, devices=devices)
    options = PassOptions(
        kept=kept_of(keep),
        batch_size=batch_size,
        unit_size=unit_size,
        preprocess=preprocess,
        columns={"image_column": image_column, "id_column": id_column},
        retry_failed=retry_failed,
        max_error_rate=max_error_rate,
    )
    return collect_inputs(
        inputs, Path(out), model, options, labeller=labeller, engine=engine, events=events, threads=threads
    )


def kept_of(keep: Keep) -> dict[str, str | None]:
    """The dtype in which each of :data:`~clipfast.dataset.manifest.KEPT` is kept, None where it is not.

    Raises:
        InputError: something else is to be kept.
    """
    if keep is None:
        return dict.fromkeys(KEPT)
    if isinstance(keep, str):
        return {**dict.fromkeys(KEPT, keep), "embeddings": "float32"}
    unknown = [name for name in keep if name not in KEPT]
    if unknown:
        raise InputError(f"keep names {unknown[0]!r}: choose from {', '.join(KEPT)}")
    return {name: keep.get(name) for name in KEPT}


def _inputs(data: Any, out: Path, image_column: str | None, id_column: str | None) -> list[Input]:
    if isinstance(data, str | PathLike):
        data = [data]
    if isinstance(data, Sequence) and data and all(isinstance(name, str | PathLike) for name in data):
        return open_inputs(data, skip=out, image_column=image_column, id_column=id_column)
    return [from_object(data, image_column=image_column, id_column=id_column)]
