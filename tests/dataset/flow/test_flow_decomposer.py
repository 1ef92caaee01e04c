"""Decomposing batches: memory that runs out halves them, and images that are not finite are failures."""

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from builders import pixels
from flow_parts import model, sample, samples
from torch import Tensor

from clipfast import Contributions, InputError, Model
from clipfast.dataset.flow.batches import Batch, Batches
from clipfast.dataset.flow.decoder import Decoder
from clipfast.dataset.flow.decomposer import Decomposer, Part
from clipfast.dataset.samples import Failure, Status


@pytest.fixture(scope="module")
def tiny() -> Model:
    return model()


def batch_of(tiny: Model, images: int, seed: int = 0, failed: tuple[int, ...] = ()) -> Batch:
    given = [sample(number, None) for number in range(images + len(failed))]
    for place in failed:
        given[place] = given[place].failed(Failure(Status.DECODE_ERROR, "broken"))
    rows = [place for place in range(len(given)) if place not in failed]
    return Batch(given, rows, pixels(tiny.module.visual, images, seed=seed))


def parts(decomposer: Decomposer, *batches: Batch) -> list[Part]:
    with closing(decomposer.decompose(batches)) as made:
        return list(made)


def assert_same(got: Contributions | None, expected: Contributions) -> None:
    assert got is not None
    for name, tensor in expected._tensors().items():
        torch.testing.assert_close(got._tensors()[name], tensor, rtol=0, atol=1e-5, msg=name)


class Short:
    """A model whose memory is enough for so many images."""

    def __init__(self, tiny: Model, monkeypatch: pytest.MonkeyPatch, enough: int) -> None:
        self.enough, self.counts, self._own = enough, list[int](), tiny.decompose
        self.poison: int | None = None
        monkeypatch.setattr(tiny, "decompose", self.decompose)

    def decompose(self, images: Tensor, **options: bool) -> Contributions:
        self.counts.append(len(images))
        if len(images) > self.enough:
            raise torch.OutOfMemoryError("CUDA error: out of memory")
        return self._own(images, **options)


def test_a_batch_is_decomposed_at_once_with_its_class_token(tiny: Model) -> None:
    batch = batch_of(tiny, 5, failed=(1, 4))
    [(given, made)] = parts(Decomposer(tiny), batch)
    assert given == batch.samples
    expected = tiny.decompose(batch.pixels, class_token=True)
    assert made is not None
    assert all(torch.equal(made._tensors()[name], tensor) for name, tensor in expected._tensors().items())


def test_a_batch_of_failures_has_no_contributions(tiny: Model) -> None:
    batch = replace(batch_of(tiny, 0, failed=(0, 1)), pixels=torch.empty(0))
    assert parts(Decomposer(tiny), batch) == [(batch.samples, None)]


def test_bytes_give_the_bits_of_numbers(tiny: Model) -> None:
    given, made = samples(9), []
    for leaves_bytes in (False, True):
        decoder = Decoder(tiny, leaves_bytes=leaves_bytes)
        with closing(Batches(decoder, 4, 2).gather(given)) as batches:
            made.append([part for _, part in Decomposer(tiny, decoder.levels).decompose(batches)])
    for numbers, from_bytes in zip(*made, strict=True):
        assert numbers is not None
        assert from_bytes is not None
        assert all(torch.equal(from_bytes._tensors()[name], each) for name, each in numbers._tensors().items())


def test_memory_that_runs_out_halves_the_batch_and_the_next_ones(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    batches = [batch_of(tiny, 11, seed=1, failed=(3,)), batch_of(tiny, 11, seed=2)]
    expected = [tiny.decompose(batch.pixels, class_token=True) for batch in batches]
    short = Short(tiny, monkeypatch, enough=3)
    with caplog.at_level(logging.WARNING, "clipfast"):
        made = parts(Decomposer(tiny), *batches)
    assert short.counts == [11, 5, 2, 2, 2, 2, 2, 1, 2, 2, 2, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 11 images at once: going on with 5",
        "out of memory with 5 images at once: going on with 2",
    ]
    for batch, (given, contributions), whole in zip(batches, made, expected, strict=True):
        assert given == batch.samples
        assert_same(contributions, whole)


def test_a_model_that_never_fits_ends_the_pass(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    Short(tiny, monkeypatch, enough=0)
    with pytest.raises(InputError, match=r"^out of memory on cpu with a single image: take a smaller model$"):
        parts(Decomposer(tiny), batch_of(tiny, 4))


def test_an_image_that_does_not_fit_after_others_did_is_a_failure(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Short(tiny, monkeypatch, enough=4)
    decomposer = Decomposer(tiny)
    parts(decomposer, batch_of(tiny, 2))
    short.enough = 0
    [(given, made)] = parts(decomposer, batch_of(tiny, 2))
    assert made is None
    assert [each.failure and each.failure.status for each in given] == [Status.OUT_OF_MEMORY] * 2
    assert given[1].failure is not None
    assert given[1].failure.reason == "0001.jpg: out of memory on cpu"


def test_other_errors_are_raised(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def decompose(images: Tensor, **options: bool) -> Contributions:
        raise RuntimeError("a kernel is broken")

    monkeypatch.setattr(tiny, "decompose", decompose)
    with pytest.raises(RuntimeError, match="a kernel is broken"):
        parts(Decomposer(tiny), batch_of(tiny, 2))


def test_images_that_are_not_finite_are_failures(tiny: Model) -> None:
    batch = batch_of(tiny, 5, failed=(0,))
    batch.pixels[2] = torch.nan
    [(given, made)] = parts(Decomposer(tiny), batch)
    assert [each.failure and each.failure.status for each in given] == [
        Status.DECODE_ERROR,
        None,
        None,
        Status.NOT_FINITE,
        None,
        None,
    ]
    assert given[3].failure is not None
    assert given[3].failure.reason == "0003.jpg: the embedding is not finite in float32"
    assert_same(made, tiny.decompose(batch.pixels[[0, 1, 3, 4]], class_token=True))
    batch.pixels[:] = torch.inf
    [(given, made)] = parts(Decomposer(tiny), batch)
    assert made is None
    assert all(each.failure for each in given)


def test_on_a_gpu_the_next_batch_is_queued_before_the_last_is_looked_at(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU changes in the order of things, on a CPU."""
    happened: list[str] = []
    queue, look = Decomposer._queue, Decomposer._part
    monkeypatch.setattr(Decomposer, "_queue", lambda self, batch: (happened.append("queue"), queue(self, batch))[1])
    monkeypatch.setattr(Decomposer, "_part", lambda self, queued: (happened.append("look"), look(self, queued))[1])
    batches = [batch_of(tiny, 2, seed=seed) for seed in range(3)]
    expected = parts(Decomposer(tiny), *batches)
    assert happened == ["queue", "look"] * 3
    happened.clear()
    decomposer = Decomposer(tiny)
    decomposer._ahead = 1
    made = parts(decomposer, *batches)
    assert happened == ["queue", "queue", "look", "queue", "look", "look"]
    for (given, contributions), (same, other) in zip(made, expected, strict=True):
        assert given == same
        assert other is not None
        assert_same(contributions, other)


def test_batches_are_taken_one_at_a_time(tiny: Model) -> None:
    taken: deque[int] = deque()

    def batches() -> Iterator[Batch]:
        for seed in range(3):
            taken.append(seed)
            yield batch_of(tiny, 2, seed=seed)

    with closing(Decomposer(tiny).decompose(batches())) as made:
        next(made)
        assert list(taken) == [0]


def test_time_is_counted(tiny: Model) -> None:
    decomposer = Decomposer(tiny)
    parts(decomposer, batch_of(tiny, 4))
    assert decomposer.seconds > 0
