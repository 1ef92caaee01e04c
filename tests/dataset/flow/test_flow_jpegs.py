"""JPEGs that a device decodes; here the device is the CPU, and torchvision's libjpeg the decoder."""

import io
from contextlib import closing

import pytest
import torch
from flow_parts import encoded, model, sample, samples, threads
from PIL import Image

from clipfast import Model
from clipfast.dataset.flow import jpegs
from clipfast.dataset.flow.batches import Batch, Batches
from clipfast.dataset.flow.decoder import Decoder
from clipfast.dataset.flow.jpegs import is_available, on_device
from clipfast.dataset.samples import Sample, Status
from clipfast.images import plain_jpeg_size

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding:DeprecationWarning")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return model()


def completed(tiny: Model, given: list[Sample], size: int = 8, leaves_jpegs: bool = True) -> list[Batch]:
    decoder = Decoder(tiny, "fast", leaves_bytes=True, leaves_jpegs=leaves_jpegs)
    with closing(on_device(decoder, Batches(decoder, size, 2).gather(given))) as batches:
        return list(batches)


def turned() -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.open(io.BytesIO(encoded(60, 40, 1))).save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_usual_jpegs_are_left_and_no_other_image(tiny: Model) -> None:
    grey, ink = io.BytesIO(), io.BytesIO()
    Image.open(io.BytesIO(encoded(60, 40, 1))).convert("L").save(grey, "JPEG")
    Image.open(io.BytesIO(encoded(60, 40, 1))).convert("CMYK").save(ink, "JPEG")
    assert plain_jpeg_size(encoded(60, 40, 1)) == (60, 40)
    assert plain_jpeg_size(grey.getvalue()) == (60, 40)
    others = [ink.getvalue(), turned(), encoded(60, 40, 1)[:-2], encoded(60, 40, 1, "PNG"), b"", b"\xff\xd8\xff\xd9"]
    assert [plain_jpeg_size(content) for content in others] == [None] * len(others)
    leaving = Decoder(tiny, "fast", leaves_bytes=True, leaves_jpegs=True)
    assert leaving.left(sample(0, encoded(60, 40, 1))) == (60, 40)
    assert leaving.left(sample(0, encoded(60_000, 1, 1))) is None  # too long to be resized
    assert leaving.left(sample(0, Image.new("RGB", (60, 40)))) is None
    assert leaving.left(sample(0, None)) is None


def test_only_fast_batches_of_bytes_are_left(tiny: Model) -> None:
    content = encoded(60, 40, 1)
    for mode, leaves_bytes in (("exact", True), ("exact", False), ("fast", False)):
        decoder = Decoder(tiny, mode, leaves_bytes=leaves_bytes, leaves_jpegs=True)  # type: ignore[arg-type]
        assert decoder.left(sample(0, content)) is None


def test_pixels_are_those_of_whole_images_resized_by_torch(tiny: Model) -> None:
    """The CPU's torchvision decodes as Pillow does, so they differ from Pillow's whole images by the resize alone."""
    given = samples(21)
    exact = Decoder(tiny, leaves_bytes=True)
    expected = exact.empty(len(given))
    for each, place in zip(given, expected.numpy(), strict=True):
        exact.decode(each, place)
    pixels = torch.cat([batch.pixels for batch in completed(tiny, given)])
    assert pixels.shape == expected.shape
    assert (pixels.int() - expected.int()).abs().max() <= 3


def test_other_images_of_a_batch_are_decoded_on_the_cpu(tiny: Model) -> None:
    given = samples(6)
    given[1] = sample(1, encoded(50, 40, 1, "PNG"))
    given[2] = sample(2, b"no image")
    given[4] = sample(4, turned())
    [batch] = completed(tiny, given)
    [without] = completed(tiny, given, leaves_jpegs=False)
    assert batch.rows == without.rows == [0, 1, 3, 4, 5]
    assert [each.failure for each in batch.samples] == [each.failure for each in without.samples]
    assert torch.equal(batch.pixels[[1, 3]], without.pixels[[1, 3]])
    assert not torch.equal(batch.pixels[0], batch.pixels[2])


def test_images_of_one_size_are_resized_together(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    own = torch.nn.functional.interpolate

    def interpolate(batch: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        sizes.append(tuple(batch.shape))
        return own(batch, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.nn.functional.interpolate", interpolate)
    given = [sample(number, encoded(60 if number % 2 else 50, 40, number)) for number in range(6)]
    [batch] = completed(tiny, given)
    assert sorted(sizes) == [(3, 3, 40, 50), (3, 3, 40, 60)]
    for number, each in enumerate(given):
        [alone] = completed(tiny, [each])
        assert torch.equal(alone.pixels[0], batch.pixels[number])


def test_where_the_device_refuses_the_cpu_decodes_the_batch(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("nvjpegDecodeBatched failed")

    given = samples(5)
    broken = bytearray(encoded(300, 200, 2))
    given[3] = sample(3, bytes(broken[:2000]) + b"\xff\xd9")  # ends like a whole JPEG
    monkeypatch.setattr(jpegs, "_decoded", refuse)
    [batch], [expected] = completed(tiny, given), completed(tiny, given, leaves_jpegs=False)
    assert batch.rows == expected.rows
    assert [each.failure for each in batch.samples] == [each.failure for each in expected.samples]
    assert torch.equal(batch.pixels, expected.pixels)


def test_a_batch_that_fails_as_a_whole(tiny: Model) -> None:
    [batch] = completed(tiny, [sample(0, b""), sample(1, b"x")])
    assert (batch.rows, [each.failure and each.failure.status for each in batch.samples]) == (
        [],
        [Status.NO_IMAGE, Status.NO_IMAGE],
    )


def test_closing_early_leaves_no_thread(tiny: Model) -> None:
    decoder = Decoder(tiny, "fast", leaves_bytes=True, leaves_jpegs=True)
    batches = on_device(decoder, Batches(decoder, 2, 2).gather(samples(40)))
    next(batches)
    batches.close()
    assert threads() == []


def test_there_is_no_such_device_on_the_cpu() -> None:
    assert not is_available(torch.device("cpu"))
