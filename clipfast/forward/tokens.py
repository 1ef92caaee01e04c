"""A tower that pools its tokens after the final LayerNorm: what its blocks write is kept until the weights are known.

``B`` images, ``N`` tokens, ``W`` width, ``H`` heads, ``E`` head_dim, ``C`` numbers of a code, ``G`` heads of the pool,
``V`` width of its output, ``T`` texts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast.basis import Basis, TowerBasis, UpstreamBasis
from clipfast.contributions import Contributions
from clipfast.forward.blocks import Frozen, attend, freeze, project_in, project_out
from clipfast.forward.collector import Collector, framed, weighted_row
from clipfast.forward.embedding import embed
from clipfast.forward.pooling import read_tokens, weighted
from clipfast.forward.request import Request
from clipfast.forward.stream import Stream
from clipfast.forward.upstream import Kept, PoolPath, head_columns, pooled_rows
from clipfast.kernels import ops
from clipfast.towers.tower import Block, Tower


def _run_blocks(tower: Tower, x: Tensor, request: Request, needs_rows: Sequence[int]) -> tuple[Tensor, list[Kept]]:
    """Every block, with what each wrote; the last residual stream ``[B, N, W]``."""
    backend = request.backend
    stream = Stream(tower, x, tower.blocks, request.mlps, False, backend)
    kept = []
    for layer, block in enumerate(tower.blocks):
        normed = stream.norm(block.ln_1)
        qkv = project_in(tower, normed, block, backend)
        out, _ = attend(qkv, block, None, backend)
        stream.add_attention(layer, out.flatten(2))
        stream.pass_mlp(layer, normed if block.parallel else stream.norm(block.ln_2))
        frozen = freeze(block, out.flatten(2), backend)
        kept.append(Kept(out, stream.added, frozen, qkv if layer in needs_rows else None))
    return stream.whole(), kept


def decompose_normed_mean(tower: Tower, images: Tensor, request: Request, basis: TowerBasis) -> Contributions:
    """Takes the mean of all tokens' final LayerNorms apart into what the blocks wrote."""
    backend = request.backend
    start = embed(tower, images, backend)
    collector = Collector(tower, request, start, tower.heads, tower.code_width, 1 + tower.layers)
    needs_rows = [layer for layer in request.layers if collector.needs_attention_row(layer)]
    x, kept = _run_blocks(tower, start.clone(), request, needs_rows)
    pooled = read_tokens(tower, x, backend)
    weights = pooled.weights
    assert weights is not None
    collector.residual[:, 0] = weighted(weights, start)[:, 0]
    for layer, (block, part) in enumerate(zip(tower.blocks, kept, strict=True)):
        collector.residual[:, 1 + layer] = weighted(weights, part.mlp)[:, 0]
        if layer not in request.layers:
            collector.rest += weighted(weights, project_out(part.out.flatten(2), block, backend))[:, 0]
            continue
        if part.frozen is None:
            ones = torch.ones_like(weights[:, 0])
            frozen = Frozen(ones, torch.zeros_like(ones), ones)
        else:
            frozen = part.frozen
        z, frame = framed(part.out, frozen, weights, collector.width)
        alpha = value = class_value = None
        if part.qkv is not None:
            alpha = weighted_row(weights, frozen, part.qkv, block, backend)
            class_value = frame.values(part.qkv[:, 0, 2], collector.width)
            value = frame.values(part.qkv[:, :, 2], collector.width) if collector.needs_values(layer) else None
        collector.add_attention(layer, z, alpha, value, class_value)
    return collector.finish(pooled, basis)


def decompose_upstream(tower: Tower, images: Tensor, request: Request, basis: TowerBasis) -> Contributions:
    """Takes what an attention pool reads apart into what the blocks before it wrote."""
    backend = request.backend
    start = embed(tower, images, backend)
    collector = Collector(tower, request, start, tower.heads, basis.columns, 0)
    needs_rows = [layer for layer in request.layers if collector.needs_attention_row(layer)]
    x, kept = _run_blocks(tower, start.clone(), request, needs_rows)
    pooled = read_tokens(tower, x, backend)
    path = PoolPath(tower, pooled, request.centring)
    mean, std, readout = pooled.mean, pooled.std, basis.readout
    residual = [path.residual(start)]
    rest = residual[0].new_zeros(residual[0].shape)
    codes = {}
    for layer, (block, part) in enumerate(zip(tower.blocks, kept, strict=True)):
        residual.append(path.residual(part.mlp))
        heads = path.heads(block, part, tower.heads)  # [B, H, V]
        if layer in request.layers:
            codes[layer] = heads
        else:
            rest += heads.sum(1)
    share = basis.layers - len(request.layers)
    left_out = readout.term(rest, mean, std, share)
    if pooled.mlp is not None:
        left_out = left_out + pooled.mlp.to(left_out.dtype) @ readout.matrix
    shared = (mean[:, None] * readout.mean_row + std[:, None] * readout.std_row) / tower.heads
    for layer, heads in codes.items():
        position = request.layers.index(layer)
        collector.codes[:, position] = heads @ readout.matrix + shared[:, None]
        if kept[layer].qkv is not None:
            _add_rows(collector, position, path, tower.blocks[layer], kept[layer])
    if collector.maps is not None and request.text_basis is not None:
        _add_constants(collector, request.text_basis, collector.codes)
    return collector.finish(pooled, basis, readout.term(torch.stack(residual, 1), mean, std), left_out)


def _add_rows(collector: Collector, position: int, path: PoolPath, block: Block, part: Kept) -> None:
    """Attention and maps of one layer before an attention pool."""
    request, qkv = collector.request, part.qkv
    assert qkv is not None
    rows = pooled_rows(path.weights, block, part, request.backend)  # [B, G, H, N]
    if collector.attention is not None:
        collector.attention[:, position] = (rows / rows.sum(-1, keepdim=True)).mean(1)
    if collector.maps is None or not isinstance(request.text_basis, TowerBasis):
        return
    columns = head_columns(path, block, request.text_basis.readout, collector.heads)  # [G, H, E, T]
    value = qkv[:, :, 2]
    for head in range(len(columns)):
        alpha = rows[:, head].contiguous()
        if request.maps == "summed":
            ops.text_maps(alpha, value, columns[head], collector.maps, backend=request.backend)
        else:
            maps = ops.head_maps(alpha, value, columns[head], backend=request.backend)
            if head:
                collector.maps[:, position] += maps
            else:
                collector.maps[:, position] = maps


def _add_constants(collector: Collector, text_basis: Basis, codes: Tensor) -> None:
    """Spreads what maps lack of their heads' scores over the tokens: the parts that no token has of its own."""
    maps = collector.maps
    assert maps is not None
    assert isinstance(text_basis, UpstreamBasis)
    assert text_basis.texts is not None
    scores = codes @ text_basis.texts.to(codes).T  # [B, L, H, T]
    if maps.ndim == 3:
        maps += ((scores.sum((1, 2)) - maps.sum(1)) / maps.shape[1])[:, None]
    else:
        maps += ((scores - maps.sum(3)) / maps.shape[3])[:, :, :, None]
