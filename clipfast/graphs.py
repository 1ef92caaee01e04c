"""Forwards as CUDA graphs: a hundred kernel launches become one.

A GPU often waits for Python: always at a few images, and for fast kernels at many. A captured forward is replayed on
the same memory instead: the images are copied in, the results copied out. One graph is captured per shape of the images
and request, at its second call: the first compiles and times kernels, and shapes that come once are not worth a graph.
Weights changed in place are seen, since a graph reads them where they are, and replaced ones give a new graph.

**Memory.** A graph keeps the images and results of one batch, and all graphs of a stream share the memory for what is
in between, as much as the largest forward needs (:attr:`Graphs.nbytes` says how much that is). At most :data:`KEPT`
graphs are kept.

**Streams and threads.** A graph's memory belongs to the stream it was captured for: calls on another stream have graphs
of their own, which may run at the same time. Calls of several threads on one stream follow one another: the copy in,
the replay and the copy out of one are queued before those of the next.
"""

import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from clipfast.contributions import Contributions
from clipfast.kernels.measuring import capture

logger = logging.getLogger("clipfast")

KEPT = 8
"""Graphs kept at once; the one that was not used for longest goes first."""
SEEN = 64
"""Kinds of calls remembered as seen once."""
ANY_BATCH = sys.maxsize
_WARMUP = 1
"""Forwards on the capture's own stream before it, for what libraries allocate per stream."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Contributions
    forward: Callable[[Tensor], Contributions]  # keeps alive what the graph reads


class Graphs:
    """Captured forwards by what they compute.

    Args:
        largest: the largest batch that is captured; larger ones run as they are.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Gives up all graphs and their memory."""
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()  # whether it can be captured
        self._pools: dict[Hashable, Any] = {}
        self._reserved = 0

    def __reduce__(self) -> tuple[type["Graphs"], tuple[int]]:
        """A copy starts without graphs."""
        return Graphs, (self.largest,)

    @property
    def count(self) -> int:
        """How many graphs are kept."""
        return len(self._captured)

    @property
    def nbytes(self) -> int:
        """Bytes of GPU memory that captures have reserved since the start or :meth:`forget`, images and results too."""
        return self._reserved

    def takes(self, images: Tensor) -> bool:
        """Whether a batch may be run as a graph: not while it is compiled, observed, or part of another capture."""
        return (
            0 < len(images) <= self.largest
            and images.is_cuda
            and not torch.compiler.is_compiling()
            and _get_current_dispatch_mode() is None
            and not torch.cuda.is_current_stream_capturing()
        )

    def run(self, images: Tensor, key: Hashable, forward: Callable[[Tensor], Contributions]) -> Contributions:
        """The result of ``forward(images)``, from the second call of a kind on by replaying it.

        Args:
            images: ``[B, 3, height, width]`` on a GPU.
            key: what else the result depends on; kept for calls that come once, so it should hold on to nothing large.
            forward: the computation; it may not wait for the GPU or read its memory. One that cannot be captured runs
                as it is, and a warning says why once.
        """
        stream = current_stream(images.device)
        whole = (tuple(images.shape), images.dtype, images.device, stream, key)
        with self._lock:
            captured = self._captured.get(whole)
            if captured is None and self._seen.get(whole):
                captured = self._capture(whole, images, forward)
            if captured is not None:
                self._captured.move_to_end(whole)
                captured.images.copy_(images)
                captured.graph.replay()
                return captured.result.clone()
            self._seen.setdefault(whole, True)
            while len(self._seen) > SEEN:
                self._seen.popitem(last=False)
        return forward(images)

    def _capture(self, whole: Hashable, images: Tensor, forward: Callable[[Tensor], Contributions]) -> _Captured | None:
        """A captured forward, kept; None where it cannot be captured."""
        device, stream = images.device, current_stream(images.device)
        before = reserved(device)
        # What inference_mode makes could not be changed outside, and the next call may be outside.
        with torch.inference_mode(False), torch.no_grad():
            static = torch.empty_like(images).copy_(images)
            results: list[Contributions] = []

            def keep() -> None:
                results[:] = [forward(static)]

            if stream not in self._pools:
                self._pools[stream] = new_pool()
            try:
                graph = capture(keep, device, warmup=_WARMUP, pool=self._pools[stream])
            except RuntimeError as error:
                self._seen[whole] = False
                logger.warning("a forward runs without a CUDA graph: %s", " ".join(str(error).split())[:300])
                return None
        captured = self._captured[whole] = _Captured(graph, static, results[0], forward)
        if len(self._captured) > KEPT:
            self._captured.popitem(last=False)
        self._reserved += max(0, reserved(device) - before)
        return captured


def current_stream(device: torch.device) -> Hashable:
    """A device's current stream in this thread, as something to compare."""
    return device.index, torch.cuda.current_stream(device).cuda_stream


def new_pool() -> Any:
    """Memory that graphs share which are replayed one after the other."""
    return torch.cuda.graph_pool_handle()


def reserved(device: torch.device) -> int:
    """Bytes that torch has reserved on a device."""
    return torch.cuda.memory_reserved(device)
