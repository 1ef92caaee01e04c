"""Tower + images → Contributions: the decomposed forward.

A plain forward computes everything that a decomposition needs and throws it away; here the pooled row's share is
kept as it goes by. Per layer that is each head's output for one row (``z``, row 0 of the attention output, free),
one attention row (``alpha``) and, for text maps, one pass over the values. What the plain forward computes in vain is
left out: in the last block only the class token is read, so neither its keys and values nor the other tokens' MLP
are needed. σ, μ and n are known only after the last layer; everything is accumulated unscaled and scaled once.

Where tokens are pooled after the final LayerNorm, each counts by its own σ, known after the last layer: what the blocks
wrote is kept until then (:mod:`clipfast.forward.upstream`).

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``C`` numbers of a code (``E``, see
:attr:`.Tower.code_width`), ``L`` layers kept, ``T`` texts, ``D`` embed_dim.
"""

import torch
from torch import Tensor

from clipfast.basis import TowerBasis, autocast_disabled
from clipfast.contributions import Contributions
from clipfast.forward.embedding import embed
from clipfast.forward.pool import decompose_pool
from clipfast.forward.request import Maps, Request
from clipfast.forward.rows import decompose_row
from clipfast.forward.tokens import decompose_normed_mean, decompose_upstream
from clipfast.kernels import buffers
from clipfast.towers.tower import Tower

__all__ = ["Maps", "Request", "decompose", "embed"]


@torch.no_grad()
def decompose(tower: Tower, images: Tensor, request: Request, basis: TowerBasis) -> Contributions:
    """Runs the tower once and keeps every term of the pooled row.

    Args:
        tower: the model.
        images: ``[B, 3, height, width]``, preprocessed, on the tower's device and in its dtype.
        request: what to keep.
        basis: :func:`clipfast.basis.fold` of the tower for ``request.centring`` and ``request.depth``.
    """
    if request.depth == "pool":
        run = decompose_pool
    elif tower.pooling in ("cls", "mean"):
        run = decompose_row
    else:
        run = decompose_normed_mean if tower.pooling == "normed_mean" else decompose_upstream
    with autocast_disabled(images):
        if torch.compiler.is_compiling():
            return run(tower, images, request, basis)
        with buffers.reuse(tower.device):
            return run(tower, images, request, basis)
