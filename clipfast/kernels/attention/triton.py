"""Self-attention that also gives the attention row of the pooled token: ``out`` and ``alpha`` in one launch.

``out[b,n,h] = Σ_m softmax_m(q[b,n,h]·k[b,m,h] / √E) v[b,m,h]``, and ``alpha[b,h] = softmax(K[b,h] q[b,0,h] / √E)`` or
the mean of these weights over the patches' queries (:mod:`.mean_row`).

Where the class token is apart from the tiles (:mod:`.tiles`), the online softmax of the patches *starts* from its key
(its score is the first maximum, its value the first sum). The class token's own query is computed in float32 without
tensor cores, and its weights are ``alpha``.

The row goes with the first tile of queries, whose keys and values are in shared memory already, if there are registers
for it (:func:`.tiles.row_place`): its scores are those of the tile's first query, or, where the class token is
apart, sums of products beside those of the tensor cores. Else one more program of the same launch computes it.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from clipfast.kernels.attention import sdpa
from clipfast.kernels.attention.kernel import plan
from clipfast.kernels.attention.tiles import LARGEST_HEAD, apart, configs
from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import INTERPRETED, Config, unsupported_dtypes
from clipfast.kernels.reference import Row


def run(qkv: Tensor, row: Row | None, config: Config | None = None) -> tuple[Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.attention`: ``out [B, N, H, E]``, and ``alpha [B, H, N]`` or ``[B, H, 0]``."""
    launches, out, alpha = plan(qkv, row, config)
    for launch in launches:
        launch.run()
    return out, alpha


def unsupported_reasons(qkv: Tensor, row: Row | None) -> list[str]:
    """The reasons why :func:`run` does not support these arguments."""
    reasons = unsupported_dtypes(qkv=qkv)
    if not 0 < qkv.shape[4] <= LARGEST_HEAD:
        reasons.append(f"head_dim {qkv.shape[4]} is not between 1 and {LARGEST_HEAD}")
    return reasons


def variants(qkv: Tensor, row: Row | None) -> Sequence[Variant]:
    """Our own kernel in every configuration worth timing, and torch's attention where a kernel adds the row to it.

    The mean row is added to torch's where our own has no less to compute: where the class token is not apart.
    """
    worth_timing = configs(qkv)
    own: list[Variant] = [(str(config), partial(run, config=config)) for config in worth_timing]
    if INTERPRETED:
        return own[:1]
    if row == "mean":
        if not apart(qkv.shape[1], worth_timing[0]):
            own += [(label, partial(sdpa.mean_through_torch, backend=backend)) for label, backend in sdpa.fused(qkv)]
        return own
    ways = [(label, partial(sdpa.through_torch, attend=attend)) for label, attend in sdpa.ways(qkv)]
    return [*own, ("sdpa", sdpa.through_torch), *ways]


IMPLEMENTATIONS = {"attention": Implementation(run, unsupported_reasons, variants)}
