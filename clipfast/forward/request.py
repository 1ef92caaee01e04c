"""What to keep of a forward pass."""

from dataclasses import dataclass
from typing import Literal

from clipfast.basis import Basis, Centring, Depth
from clipfast.fp8 import Mlps

Maps = Literal["summed", "per_head"]


@dataclass(frozen=True)
class Request:
    """What to keep of a forward pass.

    Attributes:
        layers: layers of the model to keep codes, attention, tokens and maps of, ascending.
        text_basis: :func:`clipfast.basis.fold` of the tower with texts as columns, for maps.
        maps: ``"summed"`` over the kept heads and layers, ``"per_head"``, or None.
        attention: keep the pooled token's attention weights.
        tokens: keep what :meth:`Contributions.tokens` needs: the values of the kept layers.
        class_token: keep the class token's own part of every kept head.
        centring: how μ is split over the terms.
        backend: which kernels compute.
        mlps: the tower's MLPs in float8; None for its own weights. The last block's, if it is for the class token
            alone, takes no time and is computed from its own weights.
        adds_products: whether products add themselves to the residual stream, see :class:`Stream`; None on a GPU.
        depth: ``"all"`` for the heads of the blocks, ``"pool"`` for those of the pooling.
    """

    layers: tuple[int, ...]
    text_basis: Basis | None = None
    maps: Maps | None = None
    attention: bool = False
    tokens: bool = False
    class_token: bool = False
    centring: Centring = "uniform"
    backend: str = "auto"
    mlps: Mlps | None = None
    adds_products: bool | None = None
    depth: Depth = "all"
