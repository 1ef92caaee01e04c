"""One worker in this process: for short passes, models that cannot be pickled, and data sets in memory."""

from collections.abc import Sequence
from functools import partial

from clipfast.dataset.engines.engine import Events
from clipfast.dataset.worker import Job, Worker
from clipfast.model import Model


class SerialEngine:
    """Computes one unit after the other in the calling thread.

    Args:
        model: on the device that computes; None to read it from the job's file.
    """

    def __init__(self, model: Model | None = None) -> None:
        self._model = model

    def run(self, job: Job, units: Sequence[int], events: Events) -> None:
        """As :meth:`.Engine.run`."""
        worker = Worker(job, self._model)
        for unit in units:
            events.finished(worker.run(unit, partial(events.progressed, "0")))
