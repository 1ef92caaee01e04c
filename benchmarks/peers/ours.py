"""clipfast's sides of the questions."""

import clipfast
from benchmarks.peers.question import Inputs, Side
from clipfast.analyses.gradients import attention_matrices


def heads(inputs: Inputs) -> Side:
    """Every head's contribution, ``[B, L, H, D]``."""
    model = clipfast.wrap(inputs.vision.visual)
    return Side(lambda: model.decompose(inputs.images).heads())


def pooled_attention(inputs: Inputs) -> Side:
    """The class token's row of attention, ``[B, L, H, N]``."""
    model = clipfast.wrap(inputs.vision.visual)
    return Side(lambda: model.decompose(inputs.images, attention=True).attention)


def patterns(inputs: Inputs) -> Side:
    """Every layer's attention, ``[B, H, N, N]`` each."""
    tower = clipfast.wrap(inputs.vision.visual).tower
    return Side(lambda: list(attention_matrices(tower, inputs.images)))
