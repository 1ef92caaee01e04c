"""TEXTSPAN in CUDA: a cluster of blocks works on a head.

The mathematics is in ``csrc/cuda``; here are allocation, strides, and the choice of how many blocks a cluster has.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from clipfast.kernels import cuda
from clipfast.kernels.dispatch import Implementation, Variant


def span(
    texts: Tensor, factor: Tensor, size: int, floor: float, blocks: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.span`, a cluster of blocks per head; of float32 texts in float64, too.

    Args:
        texts: ``[G, T, R]``.
        factor: ``[G, R, R]``.
        size: how many to pick.
        floor: share of the first pick's variance at which picking ends.
        blocks: in a cluster; None for the preferred of :func:`sizes`.
    """
    groups, count, rank = texts.shape
    picks = torch.full((groups, size), -1, dtype=torch.long, device=texts.device)
    variance, directions = texts.new_zeros(groups, size), texts.new_zeros(groups, size, rank)
    if groups and rank:
        cuda.call(
            "span",
            texts.device,
            texts.dtype == torch.float64,
            texts,
            *texts.stride(),
            factor.double().contiguous(),
            groups,
            count,
            rank,
            size,
            floor,
            picks,
            variance,
            directions,
            sizes(texts)[0] if blocks is None else blocks,
        )
    return picks, variance, directions


def sizes(texts: Tensor) -> list[int]:
    """Cluster sizes worth timing: the largest, and each smaller one with which more heads are computed at once.

    The more blocks, the shorter a pick takes, and the fewer heads fit on the device. Sizes with the fewest rounds of
    heads come first.
    """
    groups, count, rank = texts.shape
    worth_timing: list[int] = []
    fewest = groups + 1
    for blocks, at_once in sorted(cuda.clusters(texts.device.index or 0, texts.dtype, count, rank).items())[::-1]:
        rounds = -(-groups // at_once)
        if rounds < fewest:
            fewest = rounds
            worth_timing.append(blocks)
    return worth_timing[::-1]


def variants(texts: Tensor, factor: Tensor, size: int, floor: float) -> Sequence[Variant]:
    """One variant per cluster size."""
    return [(f"cluster {blocks}", partial(span, blocks=blocks)) for blocks in sizes(texts) or [1]]


def unsupported_reasons(texts: Tensor, factor: Tensor, size: int, floor: float) -> list[str]:
    """The reasons why :func:`span` cannot take these tensors."""
    tensors = {"texts": texts, "factor": factor}
    reasons = [f"{name} is on {tensor.device}" for name, tensor in tensors.items() if tensor.device.type != cuda.DEVICE]
    reasons = reasons or [f"{name} is a negated view" for name, tensor in tensors.items() if tensor.is_neg()]
    if reasons:
        return reasons
    capability = cuda.capability(texts.device.index or 0)
    if capability != cuda.CAPABILITY:
        return [f"compiled for GPUs of compute capability {cuda.CAPABILITY / 10}: this one has {capability / 10}"]
    groups, count, rank = texts.shape
    if groups and rank and not sizes(texts):
        return [f"{count} texts of rank {rank} are more than the shared memory of {cuda.MOST_BLOCKS} blocks holds"]
    return []


IMPLEMENTATIONS = {"span": Implementation(span, unsupported_reasons, variants)}
