"""A worker that outlives its run never leaves a record whose files are gone."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from made import EVERYTHING, Made, small_model

from clipfast.dataset import guard
from clipfast.dataset.guard import beginning, counting
from clipfast.dataset.manifest import Manifest, Record, current_run, locked
from clipfast.dataset.passes import prepared
from clipfast.dataset.pieces import files
from clipfast.dataset.worker import Job, StaleRunError, Worker
from clipfast.errors import InputError


def test_a_worker_that_writes_its_record_when_the_next_run_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run waits, and finds the unit done; the worker's next unit does not count."""
    model = small_model()
    with prepared(tmp_path, model, [Made()], EVERYTHING) as ready:
        worker = Worker(Job(tmp_path, ready.run, (Made(),)), model)
    writes, goes_on = threading.Event(), threading.Event()
    write = Manifest.write

    def slowly(manifest: Manifest, record: Record) -> None:
        writes.set()
        assert goes_on.wait(60)
        write(manifest, record)

    monkeypatch.setattr(Manifest, "write", slowly)
    with ThreadPoolExecutor(2) as threads:
        outcome = threads.submit(worker.run, 0)
        assert writes.wait(60)

        def begin() -> list[int]:
            with prepared(tmp_path, model, [Made()], EVERYTHING) as ready:
                return ready.units

        units = threads.submit(begin)
        with pytest.raises(TimeoutError):
            units.result(0.3)
        assert current_run(tmp_path) == ready.run
        goes_on.set()
        assert outcome.result(60).unit == 0
        assert units.result(60) == [1, 2, 3, 4]
    manifest = Manifest(tmp_path)
    record = manifest.record(0)
    assert files(manifest.data / record.folder) == record.files
    with pytest.raises(StaleRunError, match="was taken over by another run"):
        worker.run(1)
    assert manifest.finished() == {0}
    assert os.listdir(manifest.data) == [record.folder]


def test_workers_do_not_wait_for_each_other(tmp_path: Path) -> None:
    with counting(tmp_path), counting(tmp_path):
        pass
    with beginning(tmp_path):
        pass


def test_a_worker_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_PATIENCE", 0.1)
    with (
        counting(tmp_path),
        pytest.raises(InputError, match=r"^a worker of an earlier run is still writing to "),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path) as run:
        assert current_run(tmp_path) == run
