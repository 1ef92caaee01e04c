"""The way of prepared images to a GPU: pinned memory, and a stream of its own for the copies.

Images are written in the model's dtype into pinned memory, half the bytes of float32 for a model of 16 bits. The copy
to the GPU runs on a side stream while the GPU computes on the last batch and Python goes on. There are two buffers: one
is filled while the other may still be read by a copy.

Images may also travel as bytes, a quarter of float32's, and become numbers on the GPU (:class:`Levels`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

BUFFERS = 2


@dataclass
class _Buffer:
    """Pinned memory with the event behind the last copy out of it."""

    memory: Tensor
    copied: torch.cuda.Event


class Upload:
    """Batches on their way to a device, see above; on other devices than CUDA's a plain conversion."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._buffers: dict[tuple[torch.device, int], _Buffer] = {}
        self._count = 0

    def __call__(self, images: Sequence[Tensor] | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The images as one batch; work that is queued on the current stream from now on sees it whole.

        Args:
            images: of one shape, ``[3, height, width]`` for floats, on the CPU; a batch already, or one by one. May be
                changed as soon as this returns, on a CUDA device.
            device: where to.
            dtype: of the batch; rounded as ``Tensor.to`` rounds.

        Returns:
            ``[images, …]``.
        """
        if device.type != "cuda":
            return (images if isinstance(images, Tensor) else torch.stack(list(images))).to(device, dtype)
        buffer = self._next(len(images) * images[0].numel(), device, dtype)
        host = buffer.memory[: len(images) * images[0].numel()].view(len(images), *images[0].shape)
        if isinstance(images, Tensor):
            host.copy_(images)
        else:
            for place, image in zip(host, images, strict=True):
                place.copy_(image)
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):  # it does not wait for the current stream: the batch is memory of its own
            batch = _copy(host, device)
            buffer.copied.record(stream)
        current.wait_event(buffer.copied)
        _outlive(batch, current)
        return batch

    def _next(self, count: int, device: torch.device, dtype: torch.dtype) -> _Buffer:
        """The buffer that was used before the last one, large enough and free to be written."""
        slot = (device, self._count % BUFFERS)
        self._count += 1
        buffer = self._buffers.get(slot)
        if buffer is not None:
            buffer.copied.synchronize()
        if buffer is None or buffer.memory.numel() < count or buffer.memory.dtype != dtype:
            buffer = self._buffers[slot] = _Buffer(_pinned(count, dtype), torch.cuda.Event())
        return buffer


class Levels:
    """Bytes of images become numbers on a device, to the bits that :func:`clipfast.preprocessing.look_up` gives.

    Args:
        levels: the number of every byte, ``[3, 256]``.
        device: where the bytes are.
        dtype: of the numbers; rounded as ``Tensor.to`` rounds.
    """

    def __init__(self, levels: NDArray[np.float32], device: torch.device, dtype: torch.dtype) -> None:
        self._table = torch.from_numpy(levels).to(device, dtype).reshape(-1, 1)
        starts = torch.arange(len(levels), dtype=torch.int32, device=device) * levels.shape[1]
        self._starts = starts.view(-1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        """The numbers, ``[images, 3, height, width]``.

        Args:
            pixels: uint8 ``[images, height, width, 3]``.
        """
        places = pixels.permute(0, 3, 1, 2).int() + self._starts
        return F.embedding(places, self._table).squeeze(-1)


def _pinned(count: int, dtype: torch.dtype) -> Tensor:
    """Page-locked memory, which a GPU reads while the CPU goes on."""
    return torch.empty(count, dtype=dtype, pin_memory=True)


def _copy(host: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device with the copy to it queued on the current stream."""
    return torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)


def _outlive(batch: Tensor, stream: torch.cuda.Stream) -> None:
    """Keeps memory of the side stream's pool until what the stream has queued by the end of the batch's life ran."""
    batch.record_stream(stream)
