"""JPEGs that a device decodes: torchvision hands a batch of them to nvJPEG.

For fast preprocessing alone: nvJPEG's pixels are not those of the decoder on the CPU. A JPEG that is not like most (not
in RGB or grey, turned by its EXIF orientation, cut) is decoded on the CPU like every other image, and so are all of a
batch when the device refuses one of them. Images of one size are resized together, others one by one.

This has run on a CPU alone, where the same function of torchvision uses libjpeg: neither its speed on a GPU nor the
pixels of nvJPEG have been measured.
"""

import io
import logging
from collections import defaultdict
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from clipfast.dataset.flow.ahead import Ahead
from clipfast.dataset.flow.batches import Batch
from clipfast.dataset.flow.decoder import Decoder
from clipfast.dataset.flow.fast import Fast
from clipfast.dataset.samples import Failure
from clipfast.errors import ImageError
from clipfast.images import Size
from clipfast.transfer import Upload

logger = logging.getLogger("clipfast")


def is_available(device: torch.device) -> bool:
    """Whether torchvision decodes JPEGs on a CUDA device."""
    if device.type != "cuda":
        return False
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        return len(_decoded([file.getvalue()], device)) == 1
    except (RuntimeError, AttributeError):  # torchvision was built without it
        return False


def on_device(decoder: Decoder, batches: Generator[Batch, None, None]) -> Ahead[Batch] | Generator[Batch, None, None]:
    """The batches with the JPEGs that the decoder left to the device, which a thread has decoded ahead.

    Args:
        decoder: left them, and decodes what the device refuses.
        batches: closed with what is returned.
    """
    if not decoder.leaves_jpegs or decoder.fast is None:
        return batches
    return Ahead(_Jpegs(decoder, decoder.fast).completed(batches), 1, name="jpegs")


class _Jpegs:
    def __init__(self, decoder: Decoder, fast: Fast) -> None:
        self._decoder, self._fast, self._device = decoder, fast, decoder.device
        self._upload = Upload()

    def completed(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        with closing(batches):
            for batch in batches:
                yield self._completed(batch)

    def _completed(self, batch: Batch) -> Batch:
        decoded: dict[int, Tensor] = {}
        if batch.jpegs:
            try:
                with self._decoder.timed():
                    decoded = self._on_device(batch.jpegs)
            except RuntimeError as error:
                logger.debug("JPEGs are decoded on the CPU: %s", error)
                batch = self._on_cpu(batch)
        if not batch.rows:
            return batch
        others = [place for place, row in enumerate(batch.rows) if row not in decoded]
        if len(others) == len(batch.rows):
            return replace(batch, pixels=self._upload(batch.pixels, self._device, torch.uint8))
        pixels = torch.empty(batch.pixels.shape, dtype=torch.uint8, device=self._device)
        if others:
            pixels[others] = self._upload(batch.pixels[others], self._device, torch.uint8)
        for place, row in enumerate(batch.rows):
            if row in decoded:
                pixels[place] = decoded[row].permute(1, 2, 0)
        return replace(batch, pixels=pixels, jpegs={})

    def _on_device(self, jpegs: Mapping[int, tuple[bytes, Size]]) -> dict[int, Tensor]:
        """The pixels of each, ``[3, height, width]``."""
        images = dict(zip(jpegs, _decoded([content for content, _ in jpegs.values()], self._device), strict=True))
        rows_of_size: dict[Size, list[int]] = defaultdict(list)
        for row, (_, size) in jpegs.items():
            rows_of_size[size].append(row)
        pixels: dict[int, Tensor] = {}
        for size, rows in rows_of_size.items():
            finished = self._fast.finish(torch.stack([images[row] for row in rows]), self._fast.size(size))
            pixels.update(zip(rows, finished, strict=True))
        return pixels

    def _on_cpu(self, batch: Batch) -> Batch:
        """The batch with its JPEGs decoded by the decoder, and without those that cannot be decoded."""
        samples, failed = list(batch.samples), set()
        places = batch.pixels.numpy()
        for place, row in enumerate(batch.rows):
            if row not in batch.jpegs:
                continue
            try:
                self._decoder.decode(replace(samples[row], content=batch.jpegs[row][0]), places[place])
            except ImageError as error:
                samples[row] = samples[row].failed(Failure.of(error))
                failed.add(row)
        kept = [place for place, row in enumerate(batch.rows) if row not in failed]
        return Batch(samples, [batch.rows[place] for place in kept], batch.pixels[kept])


def _decoded(contents: Sequence[bytes], device: torch.device) -> list[Tensor]:
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    decoded: list[Tensor] = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    return decoded
