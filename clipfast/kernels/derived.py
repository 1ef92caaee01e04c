"""What kernels make of a weight, kept as long as the weight itself: a layout or a dtype that they read it in.

A matrix that belongs to the model is read by every forward. Laid out anew for each, it costs a launch and a pass over
its memory per layer and batch. :class:`Derived` keeps what was made under the tensor that it was made from. The entry
ends with the tensor, and is made again when the tensor is changed in place.
"""

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Entry:
    """Tensors made from one version of a source.

    Attributes:
        version: of the source.
        made: by what they are, each with the event that says when it can be read (None on the CPU).
        streams: by what they are, the streams that have waited for that event.
    """

    version: int
    made: dict[Hashable, tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=dict)
    streams: dict[Hashable, set[int]] = field(default_factory=dict)


class Derived:
    """Tensors made from other tensors, each made once.

    Safe to use from several threads and streams. While a CUDA graph is captured nothing is added: what a capture makes
    lives in the graph's own memory and has no values before the first replay. What was made before is read there.
    """

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many tensors something is kept for."""
        return len(self._entries)

    def get(self, source: Tensor, what: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What ``make`` returned for this source, as long as the source has not been changed.

        Args:
            source: what it is made from. Inference tensors do not record changes, so nothing is kept for them.
            what: which of the things that are made from the source.
            make: makes it from ``source`` alone; its result is on the same device.
        """
        if source.is_inference():
            return make()
        capturing = source.is_cuda and torch.cuda.is_current_stream_capturing()
        with self._lock:
            entry = self._entries.get(source)
            if entry is None or entry.version != source._version:
                if capturing:
                    return make()
                entry = self._entries[source] = _Entry(source._version)
            if what not in entry.made:
                if capturing:
                    return make()
                with torch.inference_mode(False), torch.no_grad():
                    made = make()
                if made._is_view():  # of the source: nothing was copied, and keeping it would keep the source alive
                    return made
                entry.made[what] = made, _recorded(made)
                entry.streams[what] = set()
            made, event = entry.made[what]
            if event is not None and not capturing:  # torch waits for the whole device before it captures
                _wait(made, event, entry.streams[what])
            return made


def _recorded(tensor: Tensor) -> torch.cuda.Event | None:
    """An event behind what is queued on the current stream of a GPU's tensor."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def _wait(tensor: Tensor, event: torch.cuda.Event, waited: set[int]) -> None:
    """Has the current stream wait until a tensor can be read, once per stream."""
    stream = torch.cuda.current_stream(tensor.device)
    if stream.cuda_stream not in waited:
        stream.wait_event(event)
        tensor.record_stream(stream)  # its memory is not given to others while the stream reads it
        waited.add(stream.cuda_stream)
