"""Collecting a data set: one call from what the user names to a collection on disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from clipfast.dataset.engines.engine import Engine, Events
from clipfast.dataset.engines.serial import SerialEngine
from clipfast.dataset.labelling import Labeller
from clipfast.dataset.manifest import Manifest
from clipfast.dataset.passes import PassOptions, Summary, prepared, run_pass
from clipfast.dataset.plan import Input
from clipfast.dataset.worker import Outcome, Progress
from clipfast.errors import InputError
from clipfast.model import Model
from clipfast.signals import interrupts_between_locks

EngineName = Literal["serial", "local", "ray"]


class Silent:
    """Events that nobody listens to."""

    def began(self, manifest: Manifest, units: Sequence[int]) -> None:
        """Nothing."""

    def progressed(self, worker: str, progress: Progress) -> None:
        """Nothing."""

    def finished(self, outcome: Outcome) -> None:
        """Nothing."""

    def lost(self, worker: str, unit: int, reason: str) -> None:
        """Nothing."""


def engine_named(
    name: EngineName,
    model: Model,
    *,
    workers: int | None = None,
    devices: Sequence[str] | None = None,
    ray_address: str | None = None,
) -> Engine:
    """An engine by name.

    Args:
        name: ``"serial"``: in this process; ``"local"``: processes of this machine; ``"ray"``: actors of a Ray cluster.
        model: of the pass.
        workers: how many; default one per device.
        devices: where they compute, in turn; default every CUDA device, or the CPU.
        ray_address: of a cluster that runs already.

    Raises:
        InputError: no such engine.
        MissingExtra: Ray is not installed.
    """
    if name == "serial":
        return SerialEngine(model)
    if name == "local":
        from clipfast.dataset.engines.local import LocalEngine

        return LocalEngine(workers=workers, devices=devices)
    if name == "ray":
        from clipfast.dataset.engines.ray import RayEngine

        return RayEngine(workers=workers, devices=devices, address=ray_address)
    raise InputError(f"engine is {name!r}: choose serial, local or ray")


def collect(
    inputs: Sequence[Input],
    folder: Path,
    model: Model,
    options: PassOptions,
    *,
    labeller: Labeller | None = None,
    engine: Engine | None = None,
    events: Events | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Summary:
    """Collects images, or goes on where an earlier run was stopped.

    Args:
        inputs: see :func:`clipfast.dataset.inputs.opening.open_inputs`.
        folder: where the collection is, or becomes.
        model: decomposes the images.
        options: what is kept and how it is computed.
        labeller: gives samples their labels and groups; None where there are no labels.
        engine: default the calling process.
        events: is told how the pass goes on.
        device: where workers compute; default the model's.
        threads: of each worker; default torch's own number.

    Raises:
        ClipfastError: options or images that do not fit, with every reason.
        OSError: a file cannot be written.
    """
    engine = SerialEngine(model) if engine is None else engine
    folder.mkdir(parents=True, exist_ok=True)
    extra: dict[str, Any] = {"device": device, "threads": threads}
    with interrupts_between_locks(), prepared(folder, model, inputs, options, labeller) as ready:
        return run_pass(
            ready,
            model,
            inputs,
            labeller,
            engine,
            events or Silent(),
            options,
            shares_model=not isinstance(engine, SerialEngine),
            **extra,
        )
