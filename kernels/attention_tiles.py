"""How attention is cut into tiles: which sizes are worth timing for which tensors, and what each of them wastes."""

from collections.abc import Mapping, Sequence
from math import ceil

import torch
from torch import Tensor

from clipfast.kernels.launch import INTERPRETED, Config, capability, power_of_two


def _config(block_m: int, block_n: int, descriptors: int, warps: int, stages: int) -> Config:
    """Tiles of queries and keys; whether they are read through tensor descriptors (sm_90 and later) or pointers."""
    return Config({"BLOCK_M": block_m, "BLOCK_N": block_n, "DESCRIPTORS": descriptors}, warps, stages)


CONFIGS: Mapping[tuple[int, int], Sequence[Config]] = {
    (80, 64): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3), _config(128, 64, 0, 4, 2)],
    (80, 96): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (80, 128): [_config(64, 32, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (80, 256): [_config(64, 32, 0, 8, 2)],
    (90, 64): [
        _config(128, 64, 0, 8, 4),
        _config(128, 64, 1, 8, 4),
        _config(64, 64, 0, 4, 3),
        _config(128, 64, 1, 4, 3),
    ],
    (90, 96): [
        _config(128, 64, 0, 8, 3),
        _config(128, 64, 1, 8, 3),
        _config(64, 64, 0, 4, 3),
        _config(64, 64, 1, 4, 3),
    ],
    (90, 128): [
        _config(64, 64, 0, 4, 2),
        _config(64, 64, 1, 4, 2),
        _config(128, 32, 1, 8, 3),
        _config(128, 128, 1, 8, 2),
    ],
    (90, 256): [_config(64, 32, 0, 8, 2), _config(64, 32, 1, 4, 2)],
    (100, 64): [
        _config(128, 64, 0, 8, 3),
        _config(128, 64, 1, 8, 3),
        _config(64, 64, 0, 4, 3),
        _config(128, 128, 1, 8, 2),
    ],
    (100, 96): [_config(128, 64, 0, 8, 3), _config(128, 64, 1, 8, 3), _config(64, 64, 0, 4, 3)],
    (100, 128): [_config(64, 32, 0, 4, 3), _config(64, 64, 1, 4, 2), _config(128, 128, 1, 8, 2)],
    (100, 256): [_config(64, 64, 0, 8, 2), _config(64, 32, 1, 4, 2)],
}
"""By architecture and columns of a head. Modelled; no GPU has timed them yet. On sm_90 two programs of 8 warps share a
multiprocessor at up to 128 registers, and a tile of 64 keys keeps them there. Where the compiler aims at 128 it spills
one register in a few cases (sm_80 at head_dim 64, sm_100 at N = 197), before the loop."""

FLOAT32_CONFIG = _config(32, 32, 0, 8, 2)
"""Exact float32 has no tensor cores: a tile whose products, unrolled, fit the registers."""

_INTERPRETED_CONFIG = _config(256, 64, 0, 32, 1)

LARGEST_HEAD = 256
CLOSE = 1.25
"""Configurations that compute up to this many times the fewest scores are worth timing."""


def head_parts(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Two powers of two, the second maybe 0, whose sum is the fewest columns that hold a head.

    In float32, where products are unrolled in registers, two halves where one part alone would be large.
    """
    whole = power_of_two(head_dim, 16)
    sizes = [2**k for k in range(4, 9)]
    pairs = [(whole, 0), *((a, b) for a in sizes for b in sizes if b < a and head_dim <= a + b < whole)]
    first, second = min(pairs, key=sum)
    large = first > 64 or (first > 16 and not second)
    return (whole // 2, whole // 2) if dtype == torch.float32 and large else (first, second)


def scores(tokens: int, config: Config) -> int:
    """How many scores of ``tokens`` queries and keys are computed, in whole tiles."""
    block_m, block_n = config.blocks["BLOCK_M"], config.blocks["BLOCK_N"]
    return ceil(tokens / block_m) * block_m * ceil(tokens / block_n) * block_n


def apart(tokens: int, config: Config) -> bool:
    """Whether fewer scores are computed when tiles cover the patches alone and the class token is apart."""
    return tokens > 0 and scores(tokens - 1, config) < scores(tokens, config)


def describable(qkv: Tensor) -> bool:
    """Whether there can be tensor descriptors: hardware that has them, and every step a multiple of 16 bytes."""
    steps = [stride * qkv.element_size() for stride in qkv.stride()[:4]]
    aligned = not any(step % 16 for step in (*steps, qkv.data_ptr()))
    return capability(qkv) >= 90 and qkv.numel() > 0 and qkv.stride(4) == 1 and aligned


def configs(qkv: Tensor, arch: int | None = None) -> list[Config]:
    """The configurations worth timing for ``qkv [B, N, 3, H, E]``, those that compute the fewest scores first.

    Args:
        qkv: queries, keys and values.
        arch: compute capability as 80, 90 or 100; None for that of the tensor's GPU.
    """
    if INTERPRETED or qkv.dtype == torch.float32:
        return [_INTERPRETED_CONFIG if INTERPRETED else FLOAT32_CONFIG]
    arch = capability(qkv) if arch is None else arch
    family = {9: 90, 10: 100, 11: 100}.get(arch // 10, 80)
    wanted = sum(head_parts(qkv.shape[4], qkv.dtype))
    columns = min(size for known, size in CONFIGS if known == family and size >= wanted)
    found = [c for c in CONFIGS[family, columns] if not c.blocks["DESCRIPTORS"] or describable(qkv)]

    def computed(config: Config) -> int:
        return scores(qkv.shape[1] - apart(qkv.shape[1], config), config)

    least = min(map(computed, found))
    return sorted((config for config in found if computed(config) <= CLOSE * least), key=computed)
