"""Batches on their way to a GPU: the bits of a plain conversion, and no buffer overwritten while it is read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from builders import vision_tower
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

import clipfast
from clipfast import transfer
from clipfast.preprocessing import Prepare, look_up
from clipfast.transfer import Levels, Upload


class Stream:
    """Queued work of a stream; it runs when somebody waits for it, which is as late as a GPU may run it."""

    def __init__(self, device: object = None) -> None:
        self.queue: list[Callable[[], object]] = []
        self.done = 0
        self.waits: list[Event] = []

    def run(self, upto: int) -> None:
        for work in self.queue[self.done : upto]:
            work()
        self.done = max(self.done, upto)

    def wait_event(self, event: "Event") -> None:
        self.waits.append(event)


class Event:
    def __init__(self) -> None:
        self.place: tuple[Stream, int] | None = None

    def record(self, stream: Stream) -> None:
        self.place = stream, len(stream.queue)

    def synchronize(self) -> None:
        if self.place is not None:
            stream, upto = self.place
            stream.run(upto)


_WRONG = {True: torch.nan, False: 255}
"""What memory holds before a copy, by whether it holds floats."""


class Gpu:
    """What :mod:`clipfast.transfer` uses of ``torch.cuda``, without a GPU and as lazy as one can be."""

    def __init__(self) -> None:
        self.main = self.current = Stream()
        self.made: list[Stream] = []
        self.pinned: list[Tensor] = []
        self.outlived: list[Stream] = []

    def new_stream(self, device: object) -> Stream:
        self.made.append(Stream())
        return self.made[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def copy(self, host: Tensor, device: object) -> Tensor:
        out = torch.full_like(host, _WRONG[host.dtype.is_floating_point])
        self.current.queue.append(lambda: out.copy_(host))
        return out

    def pin(self, count: int, dtype: torch.dtype) -> Tensor:
        self.pinned.append(torch.full((count,), _WRONG[dtype.is_floating_point], dtype=dtype))
        return self.pinned[-1]

    def finish(self) -> None:
        """Runs what the main stream waits for; nothing else."""
        for event in self.main.waits:
            event.synchronize()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(transfer, "_copy", gpu.copy)
    monkeypatch.setattr(transfer, "_pinned", gpu.pin)
    monkeypatch.setattr(transfer, "_outlive", lambda batch, stream: gpu.outlived.append(stream))
    monkeypatch.setattr(torch.cuda, "Stream", gpu.new_stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.current)
    return gpu


@dataclass(frozen=True)
class Device:
    type: str = "cuda"


DEVICE: Any = Device()
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def images(count: int, seed: int) -> list[Tensor]:
    return list(torch.randn(count, 3, 5, 4, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_are_those_of_a_plain_conversion(gpu: Gpu, dtype: torch.dtype) -> None:
    """Copies run as late as the events allow, so a buffer that is filled too early shows."""
    upload = Upload()
    batches = [images(count, seed) for seed, count in enumerate((4, 4, 4, 4, 2, 7))]
    sent = []
    for batch in batches:
        sent.append(upload(batch, DEVICE, dtype))
    gpu.finish()
    for batch, have in zip(batches, sent, strict=True):
        assert torch.equal(have, torch.stack(batch).to(dtype))


def test_images_may_change_as_soon_as_they_are_sent(gpu: Gpu) -> None:
    batch = images(3, 0)
    expected = torch.stack(batch)
    sent = Upload()(batch, DEVICE, torch.float32)
    for image in batch:
        image.zero_()
    gpu.finish()
    assert torch.equal(sent, expected)


def test_two_buffers_and_one_side_stream(gpu: Gpu) -> None:
    upload = Upload()
    for seed in range(5):
        upload(images(4, seed), DEVICE, torch.float32)
    assert len(gpu.pinned) == transfer.BUFFERS == 2
    assert len(gpu.made) == 1
    assert not gpu.main.queue, "a copy on the main stream waits for the forward"
    assert len(gpu.main.waits) == len(gpu.outlived) == 5
    assert gpu.outlived == [gpu.main] * 5
    upload(images(6, 9), DEVICE, torch.float32)
    assert len(gpu.pinned) == 3, "a larger batch needs a larger buffer"


def test_other_devices_get_a_plain_conversion() -> None:
    batch = images(3, 0)
    sent = Upload()(batch, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(sent, torch.stack(batch).bfloat16())


def test_whole_batches_of_bytes_are_sent_as_they_are(gpu: Gpu) -> None:
    upload = Upload()
    batches = [bytes_of(count, seed) for seed, count in enumerate((4, 4, 2, 5))]
    copies = [batch.clone() for batch in batches]
    sent = []
    for batch in copies:
        sent.append(upload(batch, DEVICE, torch.uint8))
        batch.zero_()
    gpu.finish()
    for batch, have in zip(batches, sent, strict=True):
        assert have.dtype == torch.uint8
        assert torch.equal(have, batch)
    assert {memory.dtype for memory in gpu.pinned} == {torch.uint8}
    assert torch.equal(Upload()(batches[0], torch.device("cpu"), torch.uint8), batches[0])


def bytes_of(count: int, seed: int, height: int = 5, width: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_a_gpu)])
def test_bytes_become_the_numbers_that_threads_look_up(dtype: torch.dtype, device: str) -> None:
    """Every byte of every channel, to the bit, rounded to the model's dtype as a conversion of the numbers is."""
    prepare = Prepare(image_transform_v2(PreprocessCfg(), is_train=False))
    assert prepare.levels is not None
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    pixels = torch.cat([ramp, ramp.flip(1), bytes_of(3, 0, 16, 16)])
    expected = np.empty((len(pixels), 3, 16, 16), np.float32)
    for image, place in zip(pixels.numpy(), expected, strict=True):
        look_up(prepare.levels, image, place)
    numbers = Levels(prepare.levels, torch.device(device), dtype)(pixels.to(device))
    assert numbers.is_contiguous()
    assert torch.equal(numbers.cpu(), torch.from_numpy(expected).to(dtype))


@needs_a_gpu
def test_batches_on_a_gpu_are_those_of_a_plain_conversion() -> None:
    upload, device = Upload(), torch.device("cuda", 0)
    batches = [images(64, seed) for seed in range(6)]
    torch.cuda._sleep(10**8)  # the main stream is busy: copies must not wait for it, and their readers must
    sent = [upload(batch, device, torch.bfloat16) for batch in batches]
    for batch, have in zip(batches, sent, strict=True):
        assert torch.equal((have * 1).cpu(), torch.stack(batch).bfloat16())


@needs_a_gpu
def test_files_arrive_on_a_gpu() -> None:
    pictures = [Image.new("RGB", (32, 32), (30 * index, 5, 200)) for index in range(7)]
    near, far = (clipfast.wrap(vision_tower(seed=1).to(device)) for device in ("cpu", "cuda"))
    for mine, theirs in zip(near.batches(pictures, 3), far.batches(pictures, 3), strict=True):
        assert torch.equal(mine, theirs.cpu())
