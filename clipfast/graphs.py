"""Small batches as CUDA graphs: the forward's hundred kernel launches become one.

At a few images the GPU waits for Python. A captured forward is replayed on the same memory instead: the images are
copied in, the results copied out. One graph is captured per batch size and request; weights changed in place are seen,
since a graph reads them where they are, and replaced ones give a new graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.contributions import Contributions

KEPT = 8
"""Graphs kept at once; the one that was not used for longest goes first."""
_WARMUP = 3
"""Forwards before a capture: they compile and time kernels, which a capture must not."""


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Contributions


class Graphs:
    """Captured forwards by what they compute.

    Args:
        largest: the largest batch that is captured; larger ones run as they are.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()

    def takes(self, images: Tensor) -> bool:
        """Whether a batch is run as a graph."""
        return images.is_cuda and 0 < len(images) <= self.largest and not torch.compiler.is_compiling()

    def run(self, images: Tensor, key: Hashable, forward: Callable[[Tensor], Contributions]) -> Contributions:
        """The result of ``forward(images)``, by replaying it.

        Args:
            images: ``[B, 3, height, width]`` on a GPU.
            key: what else the result depends on.
            forward: the computation; it may not wait for the GPU or read its memory.
        """
        whole = (tuple(images.shape), images.dtype, images.device, key)
        captured = self._captured.get(whole)
        if captured is None:
            captured = self._captured[whole] = _capture(images, forward)
            if len(self._captured) > KEPT:
                self._captured.popitem(last=False)
        self._captured.move_to_end(whole)
        captured.images.copy_(images)
        captured.graph.replay()
        return captured.result.clone()


def _capture(images: Tensor, forward: Callable[[Tensor], Contributions]) -> _Captured:
    static = images.clone()
    side = torch.cuda.Stream(images.device)
    side.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(side):
        for _ in range(_WARMUP):
            forward(static)
    torch.cuda.current_stream(images.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = forward(static)
    return _Captured(graph, static, result)
