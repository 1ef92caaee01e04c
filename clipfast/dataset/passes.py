"""A pass over images: preparing its collection, having its units computed, and what came of it."""

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from clipfast.dataset.changes import changed_units, refuse_changed, retriable_units
from clipfast.dataset.engines.engine import Engine, Events
from clipfast.dataset.flow.difference import Difference, kept_difference
from clipfast.dataset.flow.fast import Fast
from clipfast.dataset.labelling import Labeller, LabelNotes, all_names, peek
from clipfast.dataset.manifest import (
    KEPT,
    Manifest,
    Settings,
    is_collection,
    locked,
    refuse_other,
)
from clipfast.dataset.merging import keep_merged, save_basis
from clipfast.dataset.notes import Notes
from clipfast.dataset.plan import FILES, UNITS, Input, write_plan
from clipfast.dataset.samples import Status
from clipfast.dataset.worker import Job, Outcome, Progress, save_model
from clipfast.errors import ClipfastError, InputError
from clipfast.model import Model

Preprocess = Literal["exact", "fast"]

logger = logging.getLogger("clipfast")

MODEL_FILE = ".model.pt"
_ENOUGH = 100  # images, before a share of failures says something


class TooManyErrors(ClipfastError):
    """More images failed than the pass allows."""


@dataclass(frozen=True)
class PassOptions:
    """What a pass keeps and how it computes.

    Attributes:
        kept: the dtype (``"float16"`` or ``"float32"``) of each of :data:`KEPT`; what is not named is not kept.
        batch_size: images at once.
        unit_size: images in a unit that is a range; None for the collection's own, or 1024.
        model: what the user calls the model, for the record; default its own name.
        pretrained: the tag or the checkpoint's path that the model was loaded with, for the record.
        preprocess: ``"exact"``, or ``"fast"``: see :mod:`clipfast.dataset.flow.fast`.
        columns: ``image_column`` and ``id_column`` of tables and lists, as they were named, for the record.
        shard: index and number of the parts that the units are divided over, when several passes share them.
        retry_failed: whether units with failures that may be gone are computed again: see
            :func:`clipfast.dataset.changes.retriable_units`.
        retry_changed: whether units are computed again whose shard, table or files have changed since.
        max_error_rate: share of images that may fail.
    """

    kept: Mapping[str, str | None] = field(default_factory=dict)
    batch_size: int = 8
    unit_size: int | None = None
    model: str | None = None
    pretrained: str | None = None
    preprocess: Preprocess = "exact"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    shard: tuple[int, int] = (0, 1)
    retry_failed: bool = False
    retry_changed: bool = False
    max_error_rate: float = 1.0


@dataclass
class Summary:
    """What a pass has done.

    Attributes:
        folder: the collection.
        statuses: images of this run by status.
        problems: units that could not be read to their end, and why.
        units: units that this run computed.
        left: units that have no record yet; those of other parts do not count.
        lost: workers that ended in the middle of a unit.
        notes: what was passed over, by reason.
        labels: what did not fit together about labels.
        difference: what fast preprocessing changes; None for exact, and where nothing was left to do.
    """

    folder: Path
    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    units: int = 0
    left: int = 0
    lost: int = 0
    notes: Notes = field(default_factory=Notes)
    labels: LabelNotes = field(default_factory=LabelNotes)
    difference: Difference | None = None

    @property
    def failed(self) -> int:
        """Images that this run could not use."""
        return sum(self.statuses.values()) - self.statuses[Status.OK]


@dataclass(frozen=True)
class Prepared:
    """A pass that is ready to run.

    Attributes:
        manifest: of the collection.
        units: that this run computes, in order.
        run: the name of the run.
    """

    manifest: Manifest
    units: list[int]
    run: str


@contextmanager
def prepared(
    folder: Path, model: Model, inputs: Sequence[Input], options: PassOptions, labeller: Labeller | None = None
) -> Iterator[Prepared]:
    """Locks a folder and makes it a collection, or checks that it is one that this pass can go on with.

    Raises:
        InputError: another process writes there; the folder holds another pass, with every difference; an image that
            was collected has changed; there are no images; or the model's preprocessing has no fast form.
        OSError: the folder cannot be written.
    """
    if options.preprocess == "fast":
        Fast(model.preprocess)
    with locked(folder) as run:
        exists = is_collection(folder)
        old = Manifest(folder) if exists else None
        if old is None:
            refuse_other_results(folder)
        _remove_leftovers(folder, old)
        size = options.unit_size or (old.settings.unit_size if old is not None else 1024)
        with tempfile.TemporaryDirectory(prefix=".plan-", dir=folder) as made:
            plan = write_plan(Path(made), inputs, size)
            names = [each.name for each in inputs]
            images = {"names": names, "digest": plan.digest, "units": plan.count, **options.columns}
            if labeller is not None:
                labeller.check(peek(inputs, plan))
                if labeller.needs_names:
                    labeller.prepare(all_names(inputs, plan))
            labels = {} if labeller is None else labeller.settings()
            settings = _settings(model, options, size, images, labels)
            if old is not None:
                refuse_other(folder, old.settings, settings)
                again = retriable_units(old, plan) if options.retry_failed else []
                again += changed_units(old, plan) if options.retry_changed else []
                refuse_changed(old, plan, set(again))
                manifest = old
            else:
                again = []
                for name in (UNITS, FILES):
                    os.replace(Path(made, name), folder / name)
                save_basis(model.basis(), model.layers, folder)
                manifest = Manifest.create(folder, settings)
        index, count = options.shard
        units = sorted({*manifest.unfinished(), *again})
        yield Prepared(manifest, [unit for unit in units if unit % count == index], run)


def run_pass(
    ready: Prepared,
    model: Model,
    inputs: Sequence[Input],
    labeller: Labeller | None,
    engine: Engine,
    events: Events,
    options: PassOptions,
    *,
    device: str | None = None,
    threads: int | None = None,
    shares_model: bool = True,
) -> Summary:
    """Has the units of a pass computed, and merges their moments.

    Args:
        ready: see :func:`prepared`.
        model: of the pass.
        inputs: of the pass.
        labeller: gives samples their labels and groups; None where there are no labels.
        engine: computes the units.
        events: is told how the pass goes on.
        options: of the pass.
        device: where workers compute; default the model's.
        threads: of each worker; default torch's own number.
        shares_model: whether the engine's workers read the model from a file.

    Raises:
        TooManyErrors: more images failed than the options allow; what is computed is kept.
        ClipfastError: a unit cannot be computed.
        OSError: a file cannot be written.
    """
    manifest = ready.manifest
    summary = Summary(manifest.folder)
    if options.preprocess == "fast" and ready.units:
        summary.difference = kept_difference(manifest.folder, model, inputs, manifest.plan.units())
        if summary.difference is not None:
            logger.warning("%s", summary.difference)
    events.began(manifest, ready.units)
    file = manifest.folder / MODEL_FILE
    if ready.units:
        if shares_model:
            save_model(model, file)
        job = Job(
            folder=manifest.folder.absolute(),
            run=ready.run,
            inputs=tuple(inputs),
            labeller=labeller,
            model=str(file.absolute()) if shares_model else "",
            device=device or str(model.device),
            threads=threads,
        )
        try:
            engine.run(job, ready.units, _Counted(summary, events, options.max_error_rate))
        finally:
            file.unlink(missing_ok=True)
            finished = manifest.finished()
            summary.left = sum(unit not in finished for unit in ready.units)
    keep_merged(manifest)
    return summary


class _Counted:
    """Counts what happens, and passes it on."""

    def __init__(self, summary: Summary, events: Events, max_error_rate: float) -> None:
        self._summary, self._events, self._most = summary, events, max_error_rate

    def began(self, manifest: Manifest, units: Sequence[int]) -> None:
        self._events.began(manifest, units)

    def progressed(self, worker: str, progress: Progress) -> None:
        self._events.progressed(worker, progress)

    def finished(self, outcome: Outcome) -> None:
        summary = self._summary
        summary.units += 1
        summary.statuses.update(outcome.statuses)
        summary.notes.merge(outcome.notes)
        summary.labels.merge(outcome.labels)
        if outcome.problem is not None:
            summary.problems.append(outcome.problem)
        self._events.finished(outcome)
        total = sum(summary.statuses.values())
        if total >= _ENOUGH and summary.failed > self._most * total:
            kinds = ", ".join(
                f"{count} {status}" for status, count in summary.statuses.most_common() if status != Status.OK
            )
            raise TooManyErrors(
                f"{summary.failed} of {total} images failed ({kinds}), more than the {self._most:.1%} of "
                "--max-error-rate: what is done is kept; mend the images and run it again"
            )

    def lost(self, worker: str, unit: int, reason: str) -> None:
        self._summary.lost += 1
        self._events.lost(worker, unit, reason)


def _settings(
    model: Model, options: PassOptions, unit_size: int, images: Mapping[str, Any], labels: Mapping[str, Any]
) -> Settings:
    tower = model.tower
    return Settings(
        model={
            "name": options.model or model.name,
            "pretrained": options.pretrained,
            "weights": model.fingerprint(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "image_size": list(model.image_size),
            "depth": model.depth,
            "layers": model.layers,
            "heads": model.heads,
            "grid": list(tower.grid),
            "prefix_tokens": tower.prefix_tokens,
        },
        preprocessing={"mode": options.preprocess, "steps": str(model.preprocess)},
        kept={name: options.kept.get(name) for name in KEPT} | ({} if tower.has_class_token else {"class_codes": None}),
        batch_size=options.batch_size,
        unit_size=unit_size,
        labels=labels,
        images=images,
        versions={"clipfast": metadata.version("clipfast"), "torch": torch.__version__},
    )


def _remove_leftovers(folder: Path, manifest: Manifest | None) -> None:
    """Removes what an earlier run left and no record names; the lock is held."""
    for path in folder.glob(".plan-*"):
        shutil.rmtree(path, ignore_errors=True)
    (folder / MODEL_FILE).unlink(missing_ok=True)
    if manifest is None:
        return
    named = {record.folder for record in manifest.records()}
    for path in manifest.data.iterdir():
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


def refuse_other_results(folder: Path) -> None:
    """For a folder that becomes a collection.

    Raises:
        InputError: it holds results of another command.
    """
    results = sorted(path.name for path in folder.glob("*.safetensors"))
    if results and not (folder / UNITS).exists():
        raise InputError(
            f"{folder} holds results of another command, which would be overwritten ({results[0]}): give another folder"
        )
