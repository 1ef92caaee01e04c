"""A linear map that a user puts after a model's embedding, such as a linear probe or a bridge to another text space."""

from dataclasses import replace

import torch
from torch import Tensor

from clipfast.errors import InputError
from clipfast.towers.tower import Tower


@torch.no_grad()
def projected(tower: Tower, projection: Tensor) -> Tower:
    """The tower with a linear map ``[D, D']`` after its embedding, in its dtype and on its device.

    Raises:
        InputError: a map that takes no embeddings of this width, or is none.
    """
    if not isinstance(projection, Tensor):
        raise InputError(f"projection is a {type(projection).__name__}: give a tensor, of a linear layer weight.T")
    if projection.device.type == "meta":
        raise InputError("projection is on the meta device and has no values: load it first")
    fits = projection.ndim == 2 and projection.shape[0] == tower.embed_dim and projection.shape[1] > 0
    if not fits or not projection.is_floating_point():
        kind = f"{str(projection.dtype).removeprefix('torch.')} {list(projection.shape)}"
        raise InputError(f"projection is {kind}: expected floating point [{tower.embed_dim}, any width]")
    given = projection.detach().to(tower.device, tower.dtype)
    if tower.projection is None:
        return replace(tower, projection=given, sources=(*tower.sources, projection))
    bias = tower.projection_bias
    sources = [projection, tower.projection, *([] if bias is None else [bias])]
    return replace(
        tower,
        projection=tower.projection @ given,
        projection_bias=None if bias is None else bias @ given,
        sources=(*tower.sources, *sources),
    )
