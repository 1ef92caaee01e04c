"""The way of prepared images to a GPU: pinned memory, and a stream of its own for the copies.

Images are written in the model's dtype into pinned memory, half the bytes of float32 for a model of 16 bits. The copy
to the GPU runs on a side stream while the GPU computes on the last batch and Python goes on. There are two buffers: one
is filled while the other may still be read by a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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

    def __call__(self, images: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
        """The images as one batch; work that is queued on the current stream from now on sees it whole.

        Args:
            images: ``[3, height, width]`` each, on the CPU; may be changed as soon as this returns.
            device: where to.
            dtype: of the batch; rounded as ``Tensor.to`` rounds.

        Returns:
            ``[images, 3, height, width]``.
        """
        if device.type != "cuda":
            return torch.stack(list(images)).to(device, dtype)
        buffer = self._next(len(images) * images[0].numel(), device, dtype)
        host = buffer.memory[: len(images) * images[0].numel()].view(len(images), *images[0].shape)
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


def _pinned(count: int, dtype: torch.dtype) -> Tensor:
    """Page-locked memory, which a GPU reads while the CPU goes on."""
    return torch.empty(count, dtype=dtype, pin_memory=True)


def _copy(host: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device with the copy to it queued on the current stream."""
    return torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)


def _outlive(batch: Tensor, stream: torch.cuda.Stream) -> None:
    """Keeps memory of the side stream's pool until what the stream has queued by the end of the batch's life ran."""
    batch.record_stream(stream)
