"""Passes over images: what is done is kept, what is not done is done again, and nothing else may be mixed in."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made import EVERYTHING, Made, contents, small_model

import clipfast
from clipfast.dataset.collecting import Silent, collect
from clipfast.dataset.collection import Collection
from clipfast.dataset.engines.serial import SerialEngine
from clipfast.dataset.manifest import MOMENTS, Manifest, locked
from clipfast.dataset.merging import merge_units, merged_moments
from clipfast.dataset.passes import PassOptions, TooManyErrors, prepared
from clipfast.dataset.validating import validate
from clipfast.dataset.worker import Job, Outcome, Progress, StaleRunError, Worker
from clipfast.errors import InputError


@pytest.fixture(scope="module")
def model() -> clipfast.Model:
    return small_model()


@pytest.fixture(scope="module")
def whole(model: clipfast.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    collect([Made()], folder, model, EVERYTHING)
    return folder


class Stopping(Silent):
    """Raises after so many units, or at the first report after them."""

    def __init__(self, units: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.units, self.error, self.done = units, error, 0

    def finished(self, outcome: Outcome) -> None:
        self.done += 1
        if self.done > self.units:
            raise self.error

    def progressed(self, worker: str, progress: Progress) -> None:
        if self.done >= self.units:
            raise self.error


def test_a_pass_gives_what_the_model_gives(model: clipfast.Model, whole: Path) -> None:
    assert validate(whole) == []
    collection = Collection(whole)
    assert (collection.count, collection.failed, collection.complete) == (16, 2, True)
    assert [entry.file for entry in collection.entries] == [f"image {n}" for n in range(18) if n not in (5, 6)]
    moments = clipfast.Moments(model)
    import io

    from made import encoded
    from PIL import Image

    at = 0
    for entries, contributions in collection.batches():
        pictures = [Image.open(io.BytesIO(encoded(int(entry.file.split()[1])))) for entry in entries]
        expected = model.decompose(pictures, class_token=True)
        for name, tensor in expected._tensors().items():
            assert torch.allclose(contributions._tensors()[name], tensor, rtol=0, atol=2e-6), name
        moments.update(expected)
        at += len(entries)
    assert at == 16
    assert torch.allclose(collection.moments.means(), moments.means(), rtol=0, atol=1e-7)
    assert torch.allclose(collection.moments.covariance(1, 1), moments.covariance(1, 1), rtol=0, atol=1e-8)
    reasons = [each["status"] for each in collection.failures()]
    assert reasons == ["no_image", "no_image"]


@pytest.mark.parametrize("units", range(5))
def test_a_stopped_pass_goes_on_to_the_same_bits(
    units: int, model: clipfast.Model, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect([Made()], tmp_path, model, EVERYTHING, events=Stopping(units))
    done = Manifest(tmp_path).finished()
    assert len(done) in (units, units + 1)
    summary = collect([Made()], tmp_path, model, EVERYTHING)
    assert summary.units == 5 - len(done)
    assert contents(tmp_path) == contents(whole)
    assert (tmp_path / MOMENTS).read_bytes() == (whole / MOMENTS).read_bytes()
    assert len(list((tmp_path / "data").iterdir())) == 5  # nothing is left of what was stopped


def test_units_are_independent_of_their_order(model: clipfast.Model, whole: Path, tmp_path: Path) -> None:
    class Backwards(SerialEngine):
        def run(self, job: Job, units: object, events: object) -> None:
            super().run(job, list(units)[::-1], events)  # type: ignore[call-overload]

    collect([Made()], tmp_path, model, EVERYTHING, engine=Backwards(model))
    assert contents(tmp_path) == contents(whole)
    assert (tmp_path / MOMENTS).read_bytes() == (whole / MOMENTS).read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda options: replace(options, batch_size=5), "batch size 3, not 5"),
        (lambda options: replace(options, kept={}), "kept codes 'float32', not None"),
        (lambda options: replace(options, unit_size=9), "unit size 4, not 9"),
        (lambda options: replace(options, pretrained="x"), "pretrained None, not 'x'"),
        (lambda options: replace(options, preprocess="fast"), "preprocessing mode 'exact', not 'fast'"),
    ],
)
def test_every_setting_that_differs_is_named(
    change: Callable[[PassOptions], PassOptions], reason: str, model: clipfast.Model, whole: Path
) -> None:
    before = contents(whole)
    with pytest.raises(InputError, match=f"holds .*{reason}.*: give another folder"):
        collect([Made()], whole, model, change(EVERYTHING))
    assert contents(whole) == before


def test_other_images_and_weights_are_refused_together(whole: Path) -> None:
    with pytest.raises(InputError, match=r"other weights of the model.*a pass over other images"):
        collect([Made(count=17)], whole, small_model(seed=4), EVERYTHING)


def test_a_second_pass_is_refused_while_the_first_runs(model: clipfast.Model, whole: Path) -> None:
    with locked(whole), pytest.raises(InputError, match="being written by another process"):
        collect([Made()], whole, model, EVERYTHING)
    assert collect([Made()], whole, model, EVERYTHING).units == 0


def test_a_worker_of_an_older_run_writes_nothing(model: clipfast.Model, tmp_path: Path) -> None:
    with prepared(tmp_path, model, [Made()], EVERYTHING) as ready:
        worker = Worker(Job(tmp_path, ready.run, (Made(),)), model)
        worker.run(0)
        old = Worker(Job(tmp_path, "another run", (Made(),)), model)
        with pytest.raises(StaleRunError):
            old.run(1)
    assert Manifest(tmp_path).finished() == {0}


def test_failures_that_may_be_gone_are_tried_again_on_request(
    model: clipfast.Model, whole: Path, tmp_path: Path
) -> None:
    gone = Made(missing=frozenset({1, 9}), broken=frozenset({3}))
    summary = collect([gone], tmp_path, model, EVERYTHING)
    assert summary.statuses == {"ok": 12, "missing": 2, "no_image": 2}
    assert summary.problems == ["unit 3 ends in the middle"]
    assert Collection(tmp_path).failed == 5
    assert collect([Made()], tmp_path, model, EVERYTHING).units == 0  # not without being asked
    again = collect([Made()], tmp_path, model, replace(EVERYTHING, retry_failed=True))
    assert again.units == 3  # 5 and 6 are damaged as before: their unit is not computed again
    assert contents(tmp_path) == contents(whole)
    assert (tmp_path / MOMENTS).read_bytes() == (whole / MOMENTS).read_bytes()
    assert len(list((tmp_path / "data").iterdir())) == 5


def test_too_many_errors_end_the_pass_and_keep_what_is_done(model: clipfast.Model, tmp_path: Path) -> None:
    images = Made(count=400, bad=frozenset(range(40, 400, 2)))
    options = replace(EVERYTHING, unit_size=50, max_error_rate=0.2)
    with pytest.raises(TooManyErrors, match=r"images failed \(\d+ no_image\), more than the 20.0% of --max-error-rate"):
        collect([images], tmp_path, model, options)
    done = Manifest(tmp_path).finished()
    assert 2 <= len(done) < 8
    collect([images], tmp_path, model, replace(options, max_error_rate=0.5))
    assert Collection(tmp_path).count == 220


def test_parts_of_a_pass_divide_its_units(model: clipfast.Model, whole: Path, tmp_path: Path) -> None:
    for index in range(3):
        collect([Made()], tmp_path / str(index), model, replace(EVERYTHING, shard=(index, 3)))
    parts = [contents(tmp_path / str(index)) for index in range(3)]
    assert [sorted(part) for part in parts] == [[0, 3], [1, 4], [2]]
    assert parts[0] | parts[1] | parts[2] == contents(whole)
    with pytest.raises(InputError, match=r"unfinished pass \(2 of 5 units\)"):
        Collection(tmp_path / "0")


def test_results_of_another_command_are_not_overwritten(model: clipfast.Model, tmp_path: Path) -> None:
    (tmp_path / "contributions-00000.safetensors").write_bytes(b"precious")
    with pytest.raises(InputError, match="results of another command"):
        collect([Made()], tmp_path, model, EVERYTHING)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["contributions-00000.safetensors"]


def test_images_that_all_fail_leave_a_collection_that_says_so(model: clipfast.Model, tmp_path: Path) -> None:
    summary = collect([Made(count=3, bad=frozenset({0, 1, 2}))], tmp_path, model, EVERYTHING)
    assert summary.failed == 3
    with pytest.raises(InputError, match="holds no image"):
        Collection(tmp_path)


def test_kept_moments_that_are_damaged_are_made_again(model: clipfast.Model, tmp_path: Path) -> None:
    collect([Made()], tmp_path, model, EVERYTHING)
    manifest = Manifest(tmp_path)
    expected = merge_units(manifest)
    data = bytearray((tmp_path / MOMENTS).read_bytes())
    data[-9] ^= 1
    (tmp_path / MOMENTS).write_bytes(data)
    have = merged_moments(manifest)
    assert all(torch.equal(have._sums[name], tensor) for name, tensor in expected._sums.items())
    (tmp_path / "merged.json").unlink()
    assert merged_moments(manifest).count == 16


def test_moments_of_a_unit_that_are_damaged_are_never_added(model: clipfast.Model, tmp_path: Path) -> None:
    collect([Made()], tmp_path, model, EVERYTHING)
    manifest = Manifest(tmp_path)
    path = manifest.data / manifest.record(2).folder / "moments.safetensors"
    data = bytearray(path.read_bytes())
    for at in (3, len(data) // 2, len(data) - 1):
        data[at] ^= 64
        path.write_bytes(data)
        with pytest.raises(InputError, match="damaged or was edited"):
            merge_units(manifest)
        data[at] ^= 64
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        merge_units(manifest)


def test_edited_records_and_settings_are_noticed(model: clipfast.Model, tmp_path: Path) -> None:
    collect([Made()], tmp_path, model, EVERYTHING)
    for path in (tmp_path / "units" / "000001.json", tmp_path / "collection.json"):
        text = path.read_text()
        for at in range(0, len(text), 7):
            edited = text[:at] + chr(ord(text[at]) ^ 1) + text[at + 1 :]
            path.write_text(edited)
            try:
                same = Manifest(tmp_path).settings, [record.to_json() for record in Manifest(tmp_path).records()]
            except InputError:
                continue
            finally:
                path.write_text(text)
            assert same == (Manifest(tmp_path).settings, [record.to_json() for record in Manifest(tmp_path).records()])
    os.replace(tmp_path / "units" / "000001.json", tmp_path / "units" / "000002.json")
    with pytest.raises(InputError, match="it is the record of unit 1"):
        list(Manifest(tmp_path).records())
