"""Running a pass with everything that is seen of it: for the commands that compute units of a collection."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipfast.commands.collect.options import RunOptions
from clipfast.commands.interrupts import saving_interrupts
from clipfast.commands.loading import check_device, parse_device
from clipfast.commands.progress import Tracked, open_log, showing
from clipfast.dataset.collecting import EngineName, engine_named
from clipfast.dataset.labelling import Labeller
from clipfast.dataset.manifest import Manifest, is_collection
from clipfast.dataset.passes import PassOptions, Prepared, Summary, prepared, run_pass
from clipfast.dataset.plan import Input
from clipfast.dataset.progress import Tracker
from clipfast.errors import InputError
from clipfast.files import write_text
from clipfast.model import Model

LAST_RUN = "last_run.json"
"""File of a collection with the speed of its last run, which ``clipfast plan`` reads."""


@dataclass(frozen=True)
class Placed:
    """Which engine runs, and where.

    Attributes:
        engine: its name.
        load: where this process loads the model.
        device: where workers compute, of which kind.
        devices: named ones, in turn; empty for all of the kind.
        workers: how many; None for one per device.
    """

    engine: EngineName
    load: torch.device | None
    device: str
    devices: tuple[str, ...]
    workers: int | None

    @classmethod
    def of(cls, options: RunOptions, device: str | None) -> "Placed":
        """As options say, or as there are devices.

        Raises:
            InputError: no such device here.
        """
        options.check()
        devices = options.places()
        is_remote = options.engine == "ray" or (options.engine is None and options.ray_address is not None)
        check = parse_device if is_remote else check_device  # a cluster has devices that this machine has not
        place = None if device is None else check(device)
        for each in devices:
            check(each)
        if is_remote:
            engine: EngineName = "ray"
        elif options.engine is not None:
            engine = options.engine
        else:
            kind = "cuda" if torch.cuda.is_available() else "cpu"
            everywhere = torch.cuda.device_count() if device in (None, "cuda") and kind == "cuda" else 1
            several = (options.workers or len(devices) or everywhere) > 1
            engine = "local" if several else "serial"
        if engine == "serial":
            if len(devices) == 1:
                place = check_device(devices[0])
            return cls(engine, place, str(place or ""), (), None)
        if device is None:
            device = torch.device(devices[0]).type if devices else "cuda" if torch.cuda.is_available() else "cpu"
        elif not devices and ((place is not None and place.index is not None) or (is_remote and device == "cpu")):
            devices = [device]  # though there may be others
        return cls(engine, torch.device("cpu"), device, tuple(devices), options.workers)

    def names(self, model: Model) -> tuple[str, ...]:
        """The devices for the progress."""
        if self.engine == "serial":
            return (str(model.device),)
        return self.devices or (self.device,)


@dataclass(frozen=True)
class Job:
    """What a run computes.

    Attributes:
        folder: of the collection.
        inputs: of the pass.
        labeller: gives samples their labels; None without labels.
        model: loaded where :class:`Placed` says.
        options: of the pass.
    """

    folder: Path
    inputs: Sequence[Input]
    labeller: Labeller | None
    model: Model
    options: PassOptions


def run_shown(job: Job, run: RunOptions, placed: Placed, begin: Callable[[], None] = lambda: None) -> Summary:
    """Computes the units of a pass that are left, and shows how it goes on.

    SIGINT, SIGTERM and SIGHUP end it; what is done is said then, and kept.

    Args:
        job: what is computed.
        run: how it is shown.
        placed: where it is computed.
        begin: called when the folder is known to be one that the pass can write to, and is locked.

    Raises:
        KeyboardInterrupt: a signal has arrived; its text says what is done and how to go on.
        ClipfastError: options or images that do not fit, with every reason, or too many images that fail.
        OSError: a file cannot be written.
    """
    engine = engine_named(
        placed.engine, job.model, workers=placed.workers, devices=placed.devices or None, ray_address=run.ray_address
    )
    try:
        with saving_interrupts() as interrupts, _prepared(job) as ready:
            manifest = ready.manifest
            begin()
            log = open_log(run.log_to, job.folder, manifest.settings.to_json()) if ready.units else None
            tracker = Tracker(manifest.plan.units(ready.units, files=False), placed.names(job.model))
            events = Tracked(tracker, interrupts)
            with showing(tracker if ready.units else None, run.interval, log):
                summary = run_pass(
                    ready,
                    job.model,
                    job.inputs,
                    job.labeller,
                    engine,
                    events,
                    job.options,
                    device=placed.device or None,
                    threads=run.threads,
                    shares_model=placed.engine != "serial",
                )
            _keep_speed(job.folder, tracker, placed, job.model)
        interrupts.check()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(done(job.folder)) from None
    return summary


def _prepared(job: Job) -> AbstractContextManager[Prepared]:
    return prepared(job.folder, job.model, job.inputs, job.options, job.labeller)


def done(folder: Path) -> str:
    """What an interrupted pass has done, and how to go on."""
    again = "run the same command again to go on"
    if not is_collection(folder):
        return f"nothing is collected yet; {again}"
    manifest = Manifest(folder)  # records are not read: there may be a million, and somebody waits
    return f"{len(manifest.finished())} of {manifest.plan.count} units are done; {again}"


def _keep_speed(folder: Path, tracker: Tracker, placed: Placed, model: Model) -> None:
    """Writes how fast the run was; of one that was over at once, with the time that it took to begin."""
    now = tracker.snapshot()
    if not now.images:
        return
    content = {
        "images": now.images,
        "seconds": round(now.seconds, 3),
        "images_per_second": tracker.mean_rate() or now.images / now.seconds,
        "workers": now.workers,
        "engine": placed.engine,
        "devices": list(placed.names(model)),
        "shares": dict(now.shares),
    }
    write_text(folder / LAST_RUN, json.dumps(content, indent=2) + "\n")


def read_speed(folder: Path) -> Mapping[str, Any] | None:
    """What the last run of a collection left about its speed; None where there is nothing, or nothing readable."""
    try:
        content = json.loads((folder / LAST_RUN).read_text(encoding="utf-8"))
        return content if float(content["images_per_second"]) > 0 and int(content["workers"]) > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_out(folder: Path, images: Sequence[str]) -> None:
    """Refuses a folder for results that is the data itself.

    Raises:
        InputError: it is.
    """
    for name in images:
        if "://" not in name and Path(name).absolute() == folder.absolute():
            raise InputError(f"--out is {folder}, which is also what to collect: give another folder")
