"""Compares a decomposition with the module's own forward, and says where the two part.

The sum of all terms shows that a decomposition is complete, not that it is of the right embedding: both come from
clipfast's forward. Here the module itself computes the embedding, and its residual stream is recorded after every
layer. Each layer of the decomposed forward then starts from the module's own stream, so a difference shows at the layer
that makes it and at no later one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.basis import autocast_disabled
from clipfast.forward.blocks import attend, project_in
from clipfast.forward.embedding import embed
from clipfast.forward.pooling import read_tokens
from clipfast.forward.stream import Stream
from clipfast.fp8 import Mlps
from clipfast.towers.tower import Block, Tower

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Relative differences of two forwards that round at different places, by dtype."""
FP8_TOLERANCE = 1e-1
"""The same where one has its MLPs in float8: three bits of mantissa for every factor."""


@dataclass(frozen=True)
class Verification:
    """How far a decomposition is from the module's own forward.

    Every error is the largest difference over the largest value of the module's own; NaN where the module did not run
    that part.

    Attributes:
        max_error: of the embedding.
        start: of the residual stream before the first layer.
        layers: of the residual stream after each layer, when both start from the module's own stream before it.
        projection: of the embedding, when both start from the module's own stream after the last layer.
        tolerance: up to which an error counts as rounding.
        cosine: the smallest cosine of an embedding with the module's own.
    """

    max_error: float
    start: float
    layers: tuple[float, ...]
    projection: float
    tolerance: float
    cosine: float

    @property
    def parts(self) -> dict[str, float]:
        """The error of each part, by name, in the order they are computed: start, layers, projection."""
        layers = {f"layer {layer}": error for layer, error in enumerate(self.layers)}
        return {"start": self.start, **layers, "projection": self.projection}

    @property
    def first(self) -> str | None:
        """The first part that differs; None when none does."""
        return next((name for name, error in self.parts.items() if not error <= self.tolerance), None)

    @property
    def ok(self) -> bool:
        """Whether the embedding and every part agree within the tolerance."""
        return self.max_error <= self.tolerance and self.first is None

    def __str__(self) -> str:
        within = f"tolerance {self.tolerance:.0e}"
        if self.ok:
            return f"agrees with the module's own embedding: largest relative error {self.max_error:.1e} ({within})"
        text = f"differs from the module's own embedding by {self.max_error:.1e} of its largest entry ({within})"
        if self.first is None:
            return f"{text}, and no part differs when it starts from the module's own residual stream"
        return f"{text}, first at the {self.first} ({self.parts[self.first]:.1e})".replace("the layer", "layer")


@torch.no_grad()
def verify(
    tower: Tower,
    images: Tensor,
    embedding: Tensor,
    own_embedding: Tensor,
    own_stream: Sequence[Tensor | None],
    *,
    backend: str = "auto",
    tolerance: float | None = None,
    mlps: Mlps | None = None,
) -> Verification:
    """Compares an embedding and each part of a forward with the module's own.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed, on its device and in its dtype.
        embedding: of the decomposition, ``[B, D]``.
        own_embedding: of the module, ``[B, D]``.
        own_stream: the module's residual stream before the first layer and after each, ``[B, N, W]``; None for what
            it did not run.
        backend: which kernels compute.
        tolerance: default by dtype, :data:`TOLERANCES`, and :data:`FP8_TOLERANCE` with MLPs in float8.
        mlps: the MLPs in float8 that the embedding was computed with, None for the weights as they are.
    """
    with autocast_disabled(images):
        start = _error(embed(tower, images, backend), own_stream[0])
        layers = []
        for layer, (before, after) in enumerate(pairwise(own_stream)):
            quantized = None if mlps is None or layer >= len(mlps.layers) else Mlps((mlps.layers[layer],))
            computed = None if before is None else _after(tower, tower.blocks[layer], before, quantized, backend)
            layers.append(float("nan") if computed is None else _error(computed, after))
        last = own_stream[-1]
        projection = float("nan")
        if last is not None:
            own = last.to(tower.dtype, memory_format=torch.contiguous_format)
            projection = _error(read_tokens(tower, own, backend).embedding, own_embedding)
    by_dtype = TOLERANCES[tower.dtype] if mlps is None else FP8_TOLERANCE
    return Verification(
        max_error=_error(embedding, own_embedding),
        start=start,
        layers=tuple(layers),
        projection=projection,
        tolerance=by_dtype if tolerance is None else tolerance,
        cosine=float(F.cosine_similarity(embedding.double(), own_embedding.double(), dim=-1).min()),
    )


def _after(tower: Tower, block: Block, before: Tensor, mlps: Mlps | None, backend: str) -> Tensor:
    """The residual stream after a block, ``[B, N, W]``."""
    x = before.to(tower.dtype, copy=True, memory_format=torch.contiguous_format)
    stream = Stream(tower, x, (block,), mlps, backend=backend)
    normed = stream.norm(block.ln_1)
    out, _ = attend(project_in(tower, normed, block, backend), block, None, backend)
    stream.add_attention(0, out.flatten(2))
    stream.add_mlp(0, normed if block.parallel else stream.norm(block.ln_2))
    return stream.whole()


def _error(computed: Tensor, own: Tensor | None) -> float:
    """The largest difference over the largest value of ``own``."""
    if own is None or computed.shape != own.shape:
        return float("nan")
    own = own.double()
    largest = own.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((computed.double() - own).abs().max() / largest)
