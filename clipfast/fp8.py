"""MLPs in 8 bits: a tower's weights of them as rows in float8, and the reasons why a tower cannot have them.

An MLP has two thirds of a forward's products, and tensor cores multiply float8 twice as fast as bfloat16. Every row of
a weight and every token has a scale of its own, so that none is rounded to the size of another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.kernels import ops
from clipfast.kernels.fp8.eager import MULTIPLE, gpu_reasons
from clipfast.towers.tower import Activation, Block, Tower


@dataclass(frozen=True)
class Mlp:
    """The weights of one MLP as :func:`clipfast.kernels.fp8.quantize_rows` gives them; biases stay with the block."""

    in_values: Tensor
    in_scale: Tensor
    out_values: Tensor
    out_scale: Tensor


@dataclass(frozen=True, eq=False)
class Mlps:
    """The MLPs of a tower's first blocks, in their order; two are equal if they are the same object."""

    layers: tuple[Mlp, ...]


@torch.no_grad()
def quantize(tower: Tower, backend: str) -> Mlps:
    """The MLPs of a tower in float8: half as many bytes as the weights in bfloat16, which stay.

    A last block that is computed for the class token alone keeps its weights.
    """
    blocks = tower.blocks[:-1] if tower.pooling == "cls" else tower.blocks
    return Mlps(
        tuple(
            Mlp(
                *ops.quantize_rows(block.mlp_in_weight, backend=backend),
                *ops.quantize_rows(block.mlp_out_weight, backend=backend),
            )
            for block in blocks
        )
    )


def feed_forward(normed: Tensor, block: Block, mlp: Mlp, activation: Activation, backend: str) -> Tensor:
    """What a block's MLP adds to the residual stream, ``[..., W] → [..., W]``, its products in float8."""
    rows = ops.quantize_rows(normed, backend=backend)
    hidden = ops.scaled_linear(*rows, mlp.in_values, mlp.in_scale, block.mlp_in_bias, backend=backend)
    assert activation != "silu"  # see unsupported_reasons
    rows = ops.quantize_rows(hidden, activation, backend=backend)
    del hidden  # four times as wide as the stream
    added = ops.scaled_linear(*rows, mlp.out_values, mlp.out_scale, block.mlp_out_bias, backend=backend)
    return added if block.mlp_scale is None else added.mul_(block.mlp_scale)


def unsupported_reasons(tower: Tower, backend: str) -> list[str]:
    """The reasons why a tower cannot have its MLPs in float8, empty if it can.

    A CPU emulates them when ``backend="eager"`` asks for it: slowly, to see their error before a GPU is there.
    """
    reasons = [f"the tower has {words}" for words in tower.special()]
    if tower.device.type == "cuda":
        reasons += gpu_reasons(tower.device)
    elif tower.device.type != "cpu" or backend != "eager":
        reasons.append(f"the model is on {tower.device}: only backend='eager' emulates it on a CPU, slowly")
    if tower.dtype != torch.bfloat16:
        reasons.append(f"the weights are {str(tower.dtype).removeprefix('torch.')}: load them in bfloat16")
    sizes = tower.blocks[0].mlp_in_weight.shape if tower.blocks else ()
    if any(size % MULTIPLE for size in sizes):
        reasons.append(f"an MLP of {list(sizes)} has sizes that are no multiples of {MULTIPLE}")
    return reasons
