"""Batches: the same images together and the same bits whatever the threads, and none lost, none twice."""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flow_parts import UNIT, WAIT, Held, encoded, model, picture, sample, samples, threads
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import Compose, Resize, ToTensor

from clipfast import InputError, Model
from clipfast.dataset.flow.batches import Batch, Batches
from clipfast.dataset.flow.decoder import Decoder
from clipfast.dataset.flow.reader import Reader
from clipfast.dataset.samples import Failure, Sample, Status
from clipfast.images import decode_image
from clipfast.preprocessing import look_up
from clipfast.reading import computing


@pytest.fixture(scope="module")
def tiny() -> Model:
    return model()


@pytest.fixture(scope="module")
def jpegs() -> list[Sample]:
    return samples(37)


def gathered(tiny: Model, given: list[Sample], size: int, count: int, **options: bool) -> list[Batch]:
    with closing(Batches(Decoder(tiny), size, count, **options).gather(given)) as batches:
        return list(batches)


@pytest.mark.parametrize("size", [1, 8, 37, 100])
@pytest.mark.parametrize("takes_turns", [False, True])
def test_any_number_of_threads_gives_the_same_batches(
    tiny: Model, jpegs: list[Sample], size: int, takes_turns: bool
) -> None:
    expected = torch.stack([tiny.preprocess(decode_image(io.BytesIO(each.content), each.id)) for each in jpegs])
    for count in (1, 2, 5):
        batches = gathered(tiny, jpegs, size, count, takes_turns=takes_turns)
        assert [len(batch.samples) for batch in batches] == [
            min(size, len(jpegs) - start) for start in range(0, len(jpegs), size)
        ]
        assert [each.id for batch in batches for each in batch.samples] == [each.id for each in jpegs]
        assert torch.equal(torch.cat([batch.pixels for batch in batches]), expected)
        assert all(each.content is None for batch in batches for each in batch.samples)
    assert threads() == []


def test_bytes_become_the_same_numbers(tiny: Model, jpegs: list[Sample]) -> None:
    decoder = Decoder(tiny, leaves_bytes=True)
    with closing(Batches(decoder, 10, 2).gather(jpegs)) as batches:
        pixels = torch.cat([batch.pixels for batch in batches])
    assert pixels.dtype == torch.uint8
    numbers = np.empty((len(pixels), 3, 24, 24), np.float32)
    for image, place in zip(pixels.numpy(), numbers, strict=True):
        look_up(decoder.levels, image, place)
    expected = torch.cat([batch.pixels for batch in gathered(tiny, jpegs, 10, 2)])
    assert torch.equal(torch.from_numpy(numbers), expected)


def test_failures_of_every_kind_keep_their_places(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    good = encoded(240, 200, 0)
    broken = Image.open(io.BytesIO(good[: len(good) // 2]))
    missing = replace(sample(6, None), path=str(tmp_path / "gone.jpg"))
    given = [
        sample(0, good),
        sample(1, good[: len(good) // 2]),
        sample(2, b"<html>"),
        sample(3, encoded(600, 400, 1)),
        sample(4, picture(40, 30, 2)),
        sample(5, broken),
        missing,
        sample(7, encoded(90_000, 1, 3, "PNG")),
        sample(8, b"x").failed(Failure(Status.DUPLICATE, "twice")),
        sample(9, good),
    ]
    [first, second] = gathered(tiny, given, 8, 2)
    statuses = [each.failure and each.failure.status for each in [*first.samples, *second.samples]]
    assert statuses == [
        None,
        Status.DECODE_ERROR,
        Status.NO_IMAGE,
        Status.TOO_LARGE,
        None,
        Status.DECODE_ERROR,
        Status.MISSING,
        Status.TOO_LARGE,
        Status.DUPLICATE,
        None,
    ]
    assert (first.rows, second.rows) == ([0, 4], [1])
    assert torch.equal(second.pixels, first.pixels[:1])
    assert torch.equal(first.pixels[1], tiny.preprocess(picture(40, 30, 2)))
    reasons = [each.failure.reason for each in first.samples if each.failure]
    starts = ["0001.jpg: ", "0002.jpg: ", "0003.jpg: ", "0005.jpg: ", str(tmp_path), "0007.jpg: "]
    assert [reason[: len(start)] for reason, start in zip(reasons, starts, strict=True)] == starts


def test_a_batch_of_failures_alone_has_no_pixels(tiny: Model) -> None:
    [batch] = gathered(tiny, [sample(0, b""), sample(1, b"")], 4, 2)
    assert (batch.rows, len(batch.pixels), len(batch.samples)) == ([], 0, 2)


def test_memory_that_runs_out_for_an_image(tiny: Model, jpegs: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny)
    own = decoder._decode

    def decode(each: Sample, place: NDArray[np.generic]) -> None:
        if each.id == jpegs[1].id:
            raise MemoryError
        own(each, place)

    monkeypatch.setattr(decoder, "_decode", decode)
    with closing(Batches(decoder, 4, 2).gather(jpegs[:3])) as batches:
        [batch] = batches
    assert [each.failure and each.failure.status for each in batch.samples] == [None, Status.OUT_OF_MEMORY, None]


def test_preprocessing_of_unknown_steps_is_applied_as_it_is(jpegs: list[Sample]) -> None:
    other = model()
    other.preprocess = Compose([Resize((24, 24)), ToTensor()])
    assert Decoder(other, leaves_bytes=True).levels is None
    [batch] = gathered(other, jpegs[:3], 3, 2)
    assert torch.equal(batch.pixels[1], other.preprocess(decode_image(io.BytesIO(jpegs[1].content), "a")))


@pytest.mark.parametrize("leaves_bytes", [False, True])
def test_preprocessing_for_another_size_ends_the_pass(jpegs: list[Sample], leaves_bytes: bool) -> None:
    other = model()
    other.preprocess = model().resized(32, 32).preprocess
    with (
        closing(Batches(Decoder(other, leaves_bytes=leaves_bytes), 4, 2).gather(jpegs)) as batches,
        pytest.raises(InputError, match="use the preprocessing that belongs to it"),
    ):
        next(batches)
    assert threads() == []


def test_an_error_in_the_reader_reaches_the_caller(tiny: Model, jpegs: list[Sample]) -> None:
    for error in (OSError("the disk failed"), KeyboardInterrupt()):
        reader = Reader([Held(jpegs[:5], error)])  # type: ignore[arg-type]
        with closing(Batches(Decoder(tiny), 4, 2).gather(reader.read(UNIT))) as batches, pytest.raises(type(error)):
            list(batches)
        assert threads() == []


def test_an_error_of_a_thread_that_is_no_images_reaches_the_caller(
    tiny: Model, jpegs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(tiny)

    def decode(each: Sample, place: NDArray[np.generic]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(decoder, "_decode", decode)
    with closing(Batches(decoder, 4, 2).gather(jpegs)) as batches, pytest.raises(ZeroDivisionError):
        next(batches)
    assert threads() == []


def test_closing_early_leaves_no_thread(tiny: Model, jpegs: list[Sample]) -> None:
    held = Held(jpegs)
    batches = Batches(Decoder(tiny), 2, 3).gather(Reader([held]).read(UNIT))
    next(batches)
    batches.close()
    assert threads() == []
    assert held.closed


def test_closing_while_threads_wait_for_the_reader(tiny: Model, jpegs: list[Sample]) -> None:
    held = Held(jpegs)

    def stalling() -> Iterator[Sample]:
        for number, each in enumerate(jpegs):
            if number == 16:  # as many as the reader hands over at once
                held.go.clear()
                assert held.go.wait(WAIT)
            yield each

    reader = Reader([Held(stalling())])
    batches = Batches(Decoder(tiny), 16, 3).gather(reader.read(UNIT))
    assert len(next(batches).samples) == 16
    threading.Timer(0.2, held.go.set).start()  # what is being read is read to its end
    batches.close()
    assert threads() == []
    assert list(batches) == []


def test_a_slow_consumer_holds_reader_and_threads(tiny: Model) -> None:
    held = Held(samples(1) * 1)

    def many() -> Iterator[Sample]:
        content = encoded(40, 30, 0)
        for number in range(2000):
            held.given += 1
            yield sample(number, content)

    with closing(Batches(Decoder(tiny), 4, 2).gather(many())) as batches:
        next(batches)
        time.sleep(0.3)
        assert held.given <= 64 + 4 + 2  # what may be decoded ahead, the batch in use, and one in each thread
        assert 1 + sum(1 for _ in batches) == 500


def watched(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images whose decoding has begun, so far."""
    begun: list[str] = []
    own = decoder._decode

    def decode(each: Sample, place: NDArray[np.generic]) -> None:
        begun.append(each.id)
        own(each, place)

    monkeypatch.setattr(decoder, "_decode", decode)
    return begun


def test_turns_are_of_several_batches(tiny: Model, jpegs: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded until a batch is awaited that is not there, and then as much as may be ahead."""
    decoder = Decoder(tiny)
    begun = watched(decoder, monkeypatch)
    many = [replace(jpegs[number % len(jpegs)], id=f"{number}") for number in range(300)]
    with closing(Batches(decoder, 10, 2, takes_turns=True).gather(many)) as batches:
        for turn in range(1, 6):  # 60 images are not more than 64
            for _ in range(6):
                next(batches)
                time.sleep(0.01)
                assert len(begun) == 60 * turn
        assert next(batches, None) is None
    assert sorted(begun, key=int) == [each.id for each in many]


def test_without_turns_threads_wait_for_a_core_that_a_forward_leaves(
    tiny: Model, jpegs: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipfast.reading._available_cores", torch.get_num_threads)
    decoder = Decoder(tiny)
    begun = watched(decoder, monkeypatch)
    with closing(Batches(decoder, 1, 2, takes_turns=False).gather(jpegs * 4)) as batches:
        next(batches)
        with computing():
            for _ in range(40):
                next(batches)
            before = len(begun)
            time.sleep(0.1)
            assert len(begun) <= before + 2  # those that the threads were at
            for _ in range(60):  # batches that are awaited are decoded all the same
                next(batches)


@pytest.mark.parametrize(("cores", "device", "turns"), [(0, "cpu", True), (1, "cpu", False), (0, "cuda", False)])
def test_turns_are_taken_where_a_model_computes_on_all_cores(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, cores: int, device: str, turns: bool
) -> None:
    monkeypatch.setattr("clipfast.reading._available_cores", lambda: torch.get_num_threads() + cores)
    decoder = Decoder(tiny)
    decoder.device = torch.device(device)
    assert Batches(decoder, 4)._takes_turns is turns


@pytest.mark.parametrize(("size", "count"), [(0, 1), (-1, None), (1, 0)])
def test_sizes_and_threads_below_one_are_refused(tiny: Model, size: int, count: int | None) -> None:
    with pytest.raises(InputError, match="at least one"):
        Batches(Decoder(tiny), size, count)


def test_a_mode_that_is_none_is_refused(tiny: Model) -> None:
    with pytest.raises(InputError, match="exact or fast"):
        Decoder(tiny, "quick")  # type: ignore[arg-type]


def test_decoding_time_is_that_of_all_threads(tiny: Model, jpegs: list[Sample]) -> None:
    decoder = Decoder(tiny)
    began = time.perf_counter()
    with closing(Batches(decoder, 8, 1).gather(jpegs)) as batches:
        list(batches)
    assert 0 < decoder.seconds <= time.perf_counter() - began
