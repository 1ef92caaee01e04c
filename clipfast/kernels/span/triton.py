"""TEXTSPAN of many heads at once: the texts that, one after the other, explain most of a head's variance.

With covariance ``S = L Lᵀ``, texts ``A`` and ``P`` the projection away from what was picked, the variance that text
``t`` explains is ``v_t = A_t P S P A_tᵀ``. Picking ``j`` adds the direction ``w = P A_j / ‖P A_j‖``; with
``u = P S w`` and ``q = w·u`` every variance changes by two scalar products of a text that never changes itself::

    v_t ← v_t − s_t (2 x_t − s_t q),    s_t = A_t·w,  x_t = A_t·u

So a step reads the texts once and writes one number per text, where deflating the texts (the paper) or ``Y = A L``
reads and writes them all: a third of the bytes. In plain torch a step is some thirty launches; here all steps of a head
are one program, and all heads one launch. Several programs per head would have to wait for each other at every step,
which Triton has no means for.

Such differences lose digits as the variance falls, so everything but the texts in memory is float64: at a share ``f``
of the first variance the error is some 1e-16 / f, nothing beside a gap of 1e-4 down to f = 1e-10. In float32 they, and
the sums of ``Y``, pick wrongly below f = 1e-7. A GPU for data centres has time for float64 while it waits for texts.
"""

from collections.abc import Sequence
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.dispatch import Implementation, Variant
from clipfast.kernels.launch import INTERPRETED, Config, Launch, capability, power_of_two, shared_memory
from clipfast.kernels.reference import EQUAL

# From a model; not timed on a GPU yet. A thread holds whole columns of a tile (BLOCK_T = 4 · 32 · warps, 16 bytes a
# load), so no sum crosses threads. A head has one multiprocessor, which must ask for some 64 KB at a time to be served
# at full speed: STAGES − 1 tiles of 4 · BLOCK_T · BLOCK_R bytes run ahead, or (STAGES = 1) a taller one comes at once.
CONFIGS = (
    Config({"BLOCK_T": 1024, "BLOCK_R": 8, "STAGES": 4}, warps=8, stages=1),
    Config({"BLOCK_T": 1024, "BLOCK_R": 16, "STAGES": 1}, warps=8, stages=1),
    Config({"BLOCK_T": 512, "BLOCK_R": 8, "STAGES": 5}, warps=4, stages=1),  # two heads on a multiprocessor
)
SUMS = 9 * 1024
"""Bytes of shared memory that sums over a program take, at most."""
_FIRST = Config({"BLOCK_T": 128, "BLOCK_S": 16}, warps=4, stages=1)

_EQUAL = tl.constexpr(EQUAL)
_TINY = tl.constexpr(1e-300)
_NOWHERE = tl.constexpr(2**31 - 1)
_NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _variance_kernel(
    p_texts,
    p_factor,
    p_variance,
    texts,
    columns,
    tiles,
    RANK: tl.constexpr,
    UP_TO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """``v_t = ‖A_t L‖²`` before anything is picked, one program per head and BLOCK_T texts.

    A thread per text and the same order of sums for each: texts that are the same have the same variance, to the bit.
    """
    program = tl.program_id(0)
    group = (program // tiles).to(tl.int64)
    o_t = (program % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_s = tl.arange(0, BLOCK_S)
    m_t = o_t < texts
    p_texts += group * RANK * columns
    p_factor += group * RANK * UP_TO
    b_variance = tl.zeros([BLOCK_T], tl.float64)
    for start in range(0, RANK, BLOCK_S):
        b_product = tl.zeros([BLOCK_S, BLOCK_T], tl.float64)
        for r in range(RANK):
            b_text = tl.load(p_texts + tl.full([], r, tl.int64) * columns + o_t, mask=m_t, other=0.0)  # [BLOCK_T]
            b_factor = tl.load(p_factor + r * UP_TO + start + o_s)  # [BLOCK_S]
            b_product += b_factor[:, None] * b_text.to(tl.float64)[None, :]
        b_variance += tl.sum(b_product * b_product, 0)
    tl.store(p_variance + group * texts + o_t, b_variance, mask=m_t)


@triton.jit
def _without(b_x, p_known, o_r, step, UP_TO: tl.constexpr, BLOCK_J: tl.constexpr):
    """``x`` less its components along the first ``step`` directions in ``p_known``."""
    o_j = tl.arange(0, BLOCK_J)
    for start in range(0, step, BLOCK_J):
        m_j = start + o_j < step
        # [BLOCK_J, UP_TO]
        b_known = tl.load(p_known + (start + o_j)[:, None] * UP_TO + o_r[None, :], mask=m_j[:, None], other=0.0)
        b_along = tl.sum(b_known * b_x[None, :], 1)
        b_x -= tl.sum(b_known * b_along[:, None], 0)
    return b_x


@triton.jit
def _first_of_largest(b_best, b_where, slack):
    """The largest of ``b_best``, and the first index in ``b_where`` whose value comes within ``slack`` of it."""
    best = tl.max(b_best, 0)
    return best, tl.min(tl.where(b_best >= best - slack, b_where, _NOWHERE), 0)


@triton.jit
def _span_kernel(
    p_texts,
    p_covariance,
    p_variance,
    p_known,
    p_pair,
    p_picks,
    p_explained,
    p_directions,
    texts,
    columns,
    steps,
    size,
    floor,
    RANK: tl.constexpr,
    UP_TO: tl.constexpr,  # a power of two
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All steps of one head, each ``v_t ← v_t − s_t (2 x_t − s_t q)`` and the largest of them in one sweep of texts."""
    PARTS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    group = tl.program_id(0).to(tl.int64)
    p_texts += group * RANK * columns
    p_covariance += group * RANK * UP_TO
    p_variance += group * texts
    p_known += group * steps * UP_TO
    p_pair += group * 2 * UP_TO
    p_picks += group * size
    p_explained += group * size
    p_directions += group * size * RANK
    o_t = tl.arange(0, BLOCK_T)
    o_r = tl.arange(0, UP_TO)
    o_j = tl.arange(0, BLOCK_J)
    o_c = tl.arange(0, BLOCK_R)
    m_r = o_r < RANK
    b_best = tl.full([BLOCK_T], _NOTHING, tl.float64)
    b_where = tl.full([BLOCK_T], _NOWHERE, tl.int32)
    b_broken = tl.zeros([BLOCK_T], tl.int32)
    for start in range(0, texts, BLOCK_T):
        b_variance = tl.load(p_variance + start + o_t, mask=start + o_t < texts, other=_NOTHING)
        better = b_variance > b_best
        b_best = tl.where(better, b_variance, b_best)
        b_where = tl.where(better, start + o_t, b_where)
        b_broken = tl.where(b_variance != b_variance, 1, b_broken)
    first = tl.max(b_best, 0)
    slack = tl.maximum(first, 0.0) * _EQUAL
    best, pick = _first_of_largest(b_best, b_where, slack)
    going = (tl.max(b_broken, 0) == 0) & (best > floor * _TINY)
    step = 0
    while going:
        # w: the pick without what is known already. Gram-Schmidt twice is exact to rounding.
        b_w = tl.load(p_texts + o_r.to(tl.int64) * columns + pick, mask=m_r, other=0.0).to(tl.float64)
        for _ in tl.static_range(2):
            b_w = _without(b_w, p_known, o_r, step, UP_TO, BLOCK_J)
            b_w = b_w / tl.sqrt(tl.maximum(tl.sum(b_w * b_w, 0), _TINY))
        tl.store(p_picks + step, pick.to(tl.int64))
        tl.store(p_explained + step, best.to(tl.float32))
        tl.store(p_directions + step * RANK + o_r, b_w.to(tl.float32), mask=m_r)
        # u = S w without what is known; w itself stays in it
        for start in range(0, RANK, BLOCK_J):
            o_row = start + o_j
            m_row = (o_row < RANK)[:, None]
            b_rows = tl.load(p_covariance + o_row[:, None] * UP_TO + o_r[None, :], mask=m_row, other=0.0)
            tl.store(p_pair + UP_TO + o_row, tl.sum(b_rows * b_w[None, :], 1), mask=o_row < UP_TO)
        tl.debug_barrier()  # u is read by other threads than wrote it
        b_u = tl.load(p_pair + UP_TO + o_r, mask=m_r, other=0.0)
        b_u = _without(b_u, p_known, o_r, step, UP_TO, BLOCK_J)
        q = tl.sum(b_w * b_u, 0)
        tl.debug_barrier()  # u is written again
        tl.store(p_known + step * UP_TO + o_r, b_w)
        tl.store(p_pair + o_r, b_w)
        tl.store(p_pair + UP_TO + o_r, b_u)
        tl.debug_barrier()
        b_best = tl.full([BLOCK_T], _NOTHING, tl.float64)
        b_where = tl.full([BLOCK_T], _NOWHERE, tl.int32)
        b_s = tl.zeros([BLOCK_T], tl.float64)
        b_x = tl.zeros([BLOCK_T], tl.float64)
        # One loop over tiles, texts outside and coordinates inside, so that loads run ahead across both.
        for tile in tl.range(0, tl.cdiv(texts, BLOCK_T) * PARTS, num_stages=STAGES):
            o_now = tile // PARTS * BLOCK_T + o_t
            o_row = tile % PARTS * BLOCK_R + o_c
            mask = (o_now < columns)[None, :]
            if RANK % BLOCK_R:
                mask = mask & (o_row < RANK)[:, None]
            p_tile = p_texts + (o_row.to(tl.int64) * columns)[:, None] + o_now[None, :]
            b_text = tl.load(p_tile, mask=mask, other=0.0).to(tl.float64)  # [BLOCK_R, BLOCK_T]
            b_s += tl.sum(b_text * tl.load(p_pair + o_row)[:, None], 0)
            b_x += tl.sum(b_text * tl.load(p_pair + UP_TO + o_row)[:, None], 0)
            if tile % PARTS == PARTS - 1:
                m_t = o_now < texts
                b_variance = tl.load(p_variance + o_now, mask=m_t, other=_NOTHING)
                b_variance -= b_s * (2 * b_x - b_s * q)
                tl.store(p_variance + o_now, b_variance, mask=m_t)
                better = b_variance > b_best + slack
                b_best = tl.where(better, b_variance, b_best)
                b_where = tl.where(better, o_now, b_where)
                b_s = tl.zeros([BLOCK_T], tl.float64)
                b_x = tl.zeros([BLOCK_T], tl.float64)
        best, pick = _first_of_largest(b_best, b_where, slack)
        step += 1
        going = (step < steps) & (best > floor * tl.maximum(first, _TINY))
        tl.debug_barrier()  # variances, w and known are read and written again


def plan(
    texts: Tensor, factor: Tensor, size: int, floor: float, config: Config | None = None
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches that compute :func:`run`, in order, with its results."""
    config = configs(capability(texts))[0] if config is None else config
    groups, count, rank = texts.shape
    columns = -(-count // 16) * 16  # rows start where a 16-byte load may
    transposed = texts.new_empty((groups, rank, columns))
    transposed[:, :, :count] = texts.transpose(1, 2)
    transposed[:, :, count:] = 0
    steps = min(size, rank)
    up_to = power_of_two(rank, 16)  # rows of everything small are as long, so that they are aligned and need no mask
    factor = factor.double().contiguous()
    covariance = F.pad(torch.bmm(factor, factor.transpose(1, 2)), (0, up_to - rank))
    variance = factor.new_empty((groups, count))
    picks = torch.full((groups, size), -1, dtype=torch.long, device=texts.device)
    explained, directions = texts.new_zeros((groups, size)), texts.new_zeros((groups, size, rank))
    tiles = -(-count // _FIRST.blocks["BLOCK_T"])
    before = Launch(
        kernel=_variance_kernel,
        grid=(groups * tiles if rank else 0,),
        arguments={
            "p_texts": transposed,
            "p_factor": F.pad(factor, (0, up_to - rank)),
            "p_variance": variance,
            "texts": count,
            "columns": columns,
            "tiles": tiles,
        },
        constants={"RANK": rank, "UP_TO": up_to},
        config=_FIRST,
    )
    loop = Launch(
        kernel=_span_kernel,
        grid=(groups if rank else 0,),
        arguments={
            "p_texts": transposed,
            "p_covariance": covariance,
            "p_variance": variance,
            "p_known": factor.new_empty((groups, steps, up_to)),
            "p_pair": factor.new_empty((groups, 2, up_to)),
            "p_picks": picks,
            "p_explained": explained,
            "p_directions": directions,
            "texts": count,
            "columns": columns,
            "steps": steps,
            "size": size,
            "floor": float(floor),
        },
        constants={"RANK": rank, "UP_TO": up_to, "BLOCK_J": max(1, 512 * config.warps // up_to)},
        config=config,
    )
    return [before, loop], (picks, explained, directions)


def run(
    texts: Tensor, factor: Tensor, size: int, floor: float, config: Config | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`clipfast.kernels.reference.span` of float32 texts."""
    launches, results = plan(texts, factor, size, floor, config)
    for launch in launches:
        launch.run()
    return results


def unsupported_reasons(texts: Tensor, factor: Tensor, size: int, floor: float) -> list[str]:
    """The reasons why :func:`run` does not support these tensors; a factor of float64 is what it computes with."""
    return [] if texts.dtype == torch.float32 else [f"texts is {str(texts.dtype).removeprefix('torch.')}"]


def configs(on: int = 90) -> tuple[Config, ...]:
    """The configurations whose tiles fit the shared memory of a compute capability, the preferred first."""
    if INTERPRETED:
        return CONFIGS[:1]
    sizes = ("BLOCK_T", "BLOCK_R")
    held = [4 * prod(c.blocks[name] for name in sizes) * (c.blocks["STAGES"] - 1) + SUMS for c in CONFIGS]
    return tuple(config for config, bytes_ in zip(CONFIGS, held, strict=True) if bytes_ <= shared_memory(on))


def variants(texts: Tensor, factor: Tensor, size: int, floor: float) -> Sequence[Variant]:
    """One variant per configuration."""
    return [(str(config), partial(run, config=config)) for config in configs(capability(texts))]


IMPLEMENTATIONS = {"span": Implementation(run, unsupported_reasons, variants)}
