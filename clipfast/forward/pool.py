"""The pooling of a tower alone: an attention pool's heads, or a mean as one head."""

import torch
from torch import Tensor

from clipfast.basis import TowerBasis
from clipfast.contributions import Contributions
from clipfast.forward.blocks import attend, project_in
from clipfast.forward.collector import Collector
from clipfast.forward.embedding import embed
from clipfast.forward.pooling import read_tokens, weighted
from clipfast.forward.request import Request
from clipfast.forward.stream import Stream
from clipfast.towers.tower import Tower


def decompose_pool(tower: Tower, images: Tensor, request: Request, basis: TowerBasis) -> Contributions:
    """Takes the pooling apart, after a plain forward of the blocks."""
    backend = request.backend
    x = embed(tower, images, backend)
    stream = Stream(tower, x, tower.blocks, request.mlps, request.adds_products, backend)
    for layer, block in enumerate(tower.blocks):
        normed = stream.norm(block.ln_1)
        out, _ = attend(project_in(tower, normed, block, backend), block, None, backend)
        stream.add_attention(layer, out.flatten(2))
        del out
        stream.pass_mlp(layer, normed if block.parallel else stream.norm(block.ln_2))
    x = stream.whole()
    needs_values = request.tokens or request.class_token or request.maps is not None
    pooled = read_tokens(tower, x, backend, values=needs_values)
    values, weights = pooled.values, pooled.weights
    if pooled.heads is None:  # a mean: one head, which takes the tokens as they are
        assert weights is not None
        heads, alpha, values = weighted(weights, x), weights, x[:, :, None]
    else:
        assert pooled.attention is not None
        heads, alpha = pooled.heads, pooled.attention
    collector = Collector(tower, request, x, basis.heads, heads.shape[-1], 0)
    rest = heads.new_zeros(len(x), basis.columns)
    if request.layers:
        class_value = None if values is None else values[:, 0]
        collector.add_attention(0, heads, alpha, values if collector.needs_values(0) else None, class_value)
    else:
        constants = basis.constants(pooled.mean, pooled.std, [0])[:, 0]
        rest = torch.einsum("bhe,hec->bc", heads, basis.values(0)) + basis.heads * constants
    residual = rest.new_zeros(len(x), 2, basis.columns)  # no start, and the pool's MLP
    if pooled.mlp is not None:
        residual[:, 1] = pooled.mlp.to(residual.dtype) @ basis.readout.matrix
    return collector.finish(pooled, basis, residual, rest)
