"""How attention is cut into tiles: configurations, the parts of a head, and what a kernel is told of its arguments.

A vision transformer has N = 2ᵏ + 1 tokens or so: 257, 577. Cut into tiles of 64 or 128, the one token too many costs a
row and a column of tiles: at N = 257 more than half of the products are of padding. Here the class token stands apart:
tiles cover the N − 1 patches. Where that saves no tile (N = 50, 197), it is a query like the others.

A head is cut into two parts where its size is no power of two, 80 = 64 + 16: padded to 128 it would cost 1.6 times the
products.
"""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels.arithmetic import dot_precision
from clipfast.kernels.launch import AMD, INTERPRETED, Config, alignment, capability, power_of_two, unit_stride
from clipfast.kernels.query_row.triton import logit_scale
from clipfast.kernels.reference import Row


def _config(block_m: int, block_n: int, descriptors: int, warps: int, stages: int, with_tile: int = 0) -> Config:
    """Tiles of queries and keys; whether they are read through tensor descriptors (sm_90 and later) or pointers.

    ``with_tile``: the class token's row goes with the first tile of queries, if it can (:func:`row_place`).
    """
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "DESCRIPTORS": descriptors, "WITH_TILE": with_tile}
    return Config(blocks, warps, stages)


CONFIGS: Mapping[tuple[int, int], Sequence[Config]] = {
    (80, 64): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3), _config(128, 64, 0, 4, 2)],
    (80, 96): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (80, 128): [_config(64, 32, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (80, 256): [_config(64, 32, 0, 8, 2)],
    (AMD, 64): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (AMD, 96): [_config(64, 64, 0, 4, 3), _config(128, 64, 0, 8, 3)],
    (AMD, 128): [_config(64, 32, 0, 4, 3)],
    (AMD, 256): [_config(64, 32, 0, 8, 2)],
    (90, 64): [
        _config(128, 64, 1, 8, 4, with_tile=1),
        _config(128, 64, 0, 8, 4),
        _config(64, 64, 1, 4, 3, with_tile=1),
        _config(128, 64, 1, 4, 3, with_tile=1),
    ],
    (90, 96): [
        _config(128, 64, 0, 8, 3),
        _config(128, 64, 1, 8, 3, with_tile=1),
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
"""By architecture and columns of a head. From a model; not timed on a GPU yet. On sm_90 two programs of 8 warps share a
multiprocessor at up to 128 registers, and a tile of 64 keys keeps them there. Where the compiler aims at 128 it spills
one register in a few cases (sm_80 at head_dim 64, sm_100 at N = 197), before the loop."""

FLOAT32_CONFIG = _config(32, 32, 0, 8, 2)
"""Exact float32 has no tensor cores: a tile whose products, unrolled, fit the registers."""

_INTERPRETED_CONFIGS = _config(256, 64, 0, 32, 1), _config(256, 64, 1, 32, 1, with_tile=1)

LARGEST_HEAD = 256
LARGEST_TILE = 256
"""Tokens of a tile, of queries or keys, at most."""
WITH_TILE, OWN_PROGRAM = 1, 2
CLOSE = 1.25
"""Configurations that compute up to this many times the fewest scores are worth timing."""


@cache
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
    return _scores(tokens, config.blocks["BLOCK_M"], config.blocks["BLOCK_N"])


def _scores(tokens: int, block_m: int, block_n: int) -> int:
    return -(-tokens // block_m) * block_m * -(-tokens // block_n) * block_n


def apart(tokens: int, config: Config) -> bool:
    """Whether fewer scores are computed when tiles cover the patches alone and the class token is apart."""
    return _apart(tokens, config.blocks["BLOCK_M"], config.blocks["BLOCK_N"])


@lru_cache
def _apart(tokens: int, block_m: int, block_n: int) -> bool:
    return tokens > 1 and _scores(tokens - 1, block_m, block_n) < _scores(tokens, block_m, block_n)


def row_place(alone: bool, row: Row | None, parts: tuple[int, int], config: Config) -> int:
    """Where the class token's row is computed: 0 (nowhere apart), :data:`WITH_TILE` or :data:`OWN_PROGRAM`.

    With a tile of queries it takes registers. On sm_90 descriptors leave some, which addresses take otherwise, but not
    in a head of more than 64 columns with the class token apart. On sm_80 and sm_100 one program would fit a
    multiprocessor where two do.
    """
    if not alone and row != "cls":
        return 0
    narrow = parts[0] <= 64 and not parts[1]
    return WITH_TILE if config.blocks["WITH_TILE"] and (narrow or not alone) else OWN_PROGRAM


def describable(qkv: Tensor) -> bool:
    """Whether there can be tensor descriptors: hardware that has them, and every step a multiple of 16 bytes."""
    steps = [stride * qkv.element_size() for stride in qkv.stride()[:4]]
    aligned = not any(step % 16 for step in (*steps, qkv.data_ptr()))
    return capability(qkv) >= 90 and qkv.numel() > 0 and qkv.stride(4) == 1 and aligned


def configs(qkv: Tensor, arch: int | None = None) -> list[Config]:
    """The configurations worth timing for ``qkv [B, N, 3, H, E]``, those that compute the fewest scores first.

    Args:
        qkv: queries, keys and values.
        arch: compute capability as 80, 90 or 100, or :data:`.launch.AMD`; None for that of the tensor's GPU.
    """
    if INTERPRETED or qkv.dtype == torch.float32:
        return [_INTERPRETED_CONFIGS[describable(qkv)] if INTERPRETED else FLOAT32_CONFIG]
    arch = capability(qkv) if arch is None else arch
    family = {AMD: AMD, 9: 90, 10: 100, 11: 100}.get(arch // 10, 80)
    needed = sum(head_parts(qkv.shape[4], qkv.dtype))
    columns = min(size for architecture, size in CONFIGS if architecture == family and size >= needed)
    usable = [c for c in CONFIGS[family, columns] if not c.blocks["DESCRIPTORS"] or describable(qkv)]

    def computed(config: Config) -> int:
        return scores(qkv.shape[1] - apart(qkv.shape[1], config), config)

    least = min(map(computed, usable))
    return sorted((config for config in usable if computed(config) <= CLOSE * least), key=computed)


def readable(qkv: Tensor) -> Tensor:
    """``qkv`` with strides that the kernels can read."""
    qkv = unit_stride(qkv)
    # Where tokens are so far apart that a tile's offsets, of 32 bits, would overflow, they are copied together.
    return qkv.contiguous() if LARGEST_TILE * qkv.stride(1) >= 2**31 else qkv


def sizes_of(qkv: Tensor) -> dict[str, Any]:
    """Sizes, strides and scale, as arguments."""
    _, tokens, _, heads, head_dim = qkv.shape
    strides = dict(zip(("s_b", "s_n", "s_part", "s_h"), qkv.stride(), strict=False))
    return {"heads": heads, "N": tokens, **strides, "scale_log2": logit_scale(head_dim)}


def constants_of(qkv: Tensor) -> dict[str, Any]:
    """How a head is cut, read and multiplied, as compile-time arguments."""
    first, second = head_parts(qkv.shape[4], qkv.dtype)
    return {
        "HEAD_DIM": qkv.shape[4],
        "FIRST": first,
        "SECOND": second,
        "ALIGNED": alignment(*qkv.stride()[:4]),
        "PRECISION": dot_precision(qkv.dtype),
        "EXACT": qkv.dtype == torch.float32,
    }
