"""Writing in a thread: what a unit leaves is that of its parts, and what goes wrong there is raised here."""

import errno
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import zarr
from builders import pixels
from flow_parts import WAIT, model, sample, threads

from clipfast import Contributions, InputError, Model, Moments
from clipfast.dataset.arrays import ArrayWriter
from clipfast.dataset.flow import writer as writing
from clipfast.dataset.flow.writer import MOMENTS, UnitWriter
from clipfast.dataset.images_table import IMAGES, ImageTable
from clipfast.dataset.samples import Failure, Sample, Status

KEPT = {"codes": "float16", "embeddings": "float32"}


@pytest.fixture(scope="module")
def tiny() -> Model:
    return model()


@pytest.fixture(scope="module")
def parts(tiny: Model) -> list[tuple[list[Sample], Contributions]]:
    made = []
    for number in range(12):
        given = [sample(10 * number + place, None) for place in range(4)]
        given[number % 4] = given[number % 4].failed(Failure(Status.DECODE_ERROR, "broken"))
        made.append((given, tiny.decompose(pixels(tiny.module.visual, 3, seed=number), class_token=True)))
    return made


def test_table_arrays_and_moments_are_those_of_the_parts(
    tiny: Model, parts: list[tuple[list[Sample], Contributions]], tmp_path: Path
) -> None:
    expected = Moments(tiny)
    with closing(UnitWriter(tmp_path, KEPT, Moments(tiny))) as writer:
        for given, contributions in parts:
            writer.write(given, contributions)
            expected.update(contributions)
        writer.write([sample(999, None).failed(Failure(Status.MISSING, "gone"))], None)
        writer.finish()
    assert threads() == []
    assert writer.statuses == {"ok": 36, "decode_error": 12, "missing": 1}
    assert [each.id for each in writer.failures][:2] == ["0000.jpg", "0011.jpg"]
    assert writer.seconds > 0
    assert writer.moments_seconds > 0
    table = pq.read_table(tmp_path / IMAGES).to_pylist()
    assert [row["id"] for row in table[:-1]] == [each.id for given, _ in parts for each in given]
    assert [row["row"] for row in table if row["status"] == "ok"] == list(range(36))
    codes = zarr.open_array(tmp_path / "codes", mode="r")
    assert torch.equal(torch.from_numpy(codes[:]), torch.cat([each.codes for _, each in parts]).half())
    moments = Moments.load(tmp_path / MOMENTS, basis=tiny.basis())
    assert moments._sums.keys() == expected._sums.keys()
    assert all(torch.equal(moments._sums[name], expected._sums[name]) for name in expected._sums)


def test_without_images_there_are_no_moments(tiny: Model, tmp_path: Path) -> None:
    with closing(UnitWriter(tmp_path, {}, Moments(tiny))) as writer:
        writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [IMAGES]


def test_a_full_disk_is_raised_to_the_caller(
    tiny: Model, parts: list[tuple[list[Sample], Contributions]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = []

    def add(self: ImageTable, given: Sequence[Sample], contributions: Contributions | None = None) -> None:
        added.append(given)
        if len(added) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "images.parquet")

    monkeypatch.setattr(ImageTable, "add", add)
    with closing(UnitWriter(tmp_path, {}, Moments(tiny))) as writer:
        with pytest.raises(OSError, match="No space left"):  # noqa: PT012
            for given, contributions in parts:
                writer.write(given, contributions)
            writer.finish()
        with pytest.raises(OSError, match="No space left"):
            writer.finish()
    assert len(added) == 2
    assert threads() == []


def test_a_number_too_large_for_its_dtype_is_raised_to_the_caller(
    tiny: Model, parts: list[tuple[list[Sample], Contributions]], tmp_path: Path
) -> None:
    given, contributions = parts[0]
    large = contributions._with({**contributions._tensors(), "codes": contributions.codes * 1e6})
    with closing(UnitWriter(tmp_path, KEPT, Moments(tiny))) as writer:
        writer.write(given, large)
        with pytest.raises(InputError, match="keep codes in float32"):
            writer.finish()
    assert threads() == []


def test_a_slow_disk_holds_the_caller(
    tiny: Model, parts: list[tuple[list[Sample], Contributions]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many parts wait: memory is bounded."""
    go, own, added = threading.Event(), ArrayWriter.add, []

    def add(self: ArrayWriter, contributions: Contributions) -> None:
        assert go.wait(WAIT)
        added.append(contributions)
        own(self, contributions)

    monkeypatch.setattr(ArrayWriter, "add", add)
    written = []
    with closing(UnitWriter(tmp_path, KEPT, Moments(tiny))) as writer:

        def write() -> None:
            for given, contributions in parts:
                writer.write(given, contributions)
                written.append(given)

        caller = threading.Thread(target=write)
        caller.start()
        caller.join(0.3)
        assert caller.is_alive()
        assert len(written) <= writing._WAITING + 1  # one of them is being written
        go.set()
        caller.join(WAIT)
        writer.finish()
    assert len(written) == len(added) == len(parts)


def test_closing_early_drops_what_waits(
    tiny: Model, parts: list[tuple[list[Sample], Contributions]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go, added = threading.Event(), threading.Event(), []

    def add(self: ImageTable, given: Sequence[Sample], contributions: Contributions | None = None) -> None:
        added.append(given)
        began.set()
        assert go.wait(WAIT)

    monkeypatch.setattr(ImageTable, "add", add)
    writer = UnitWriter(tmp_path, {}, Moments(tiny))
    for given, contributions in parts[:4]:
        writer.write(given, contributions)
    assert began.wait(WAIT)
    closer = threading.Thread(target=writer.close)
    closer.start()
    closer.join(0.1)
    go.set()
    closer.join(WAIT)
    assert not closer.is_alive()
    assert len(added) == 1
    assert threads() == []
    writer.close()
