"""A model of the time of TEXTSPAN on an H200, for the Triton kernel and the cluster of ``csrc/cuda``. Nothing runs.

``python -m benchmarks.span_costs`` prints the table in ``docs/kernels/index.md``. Counted are instructions of the
inner loops in the machine code for sm_90 (``cuobjdump`` and ``nvdisasm`` of Triton's package), bytes, and the programs
that fit. Assumed are the rates and latencies of :data:`H200`, and that a kernel takes the time of its busiest unit plus
the waits that cannot overlap. The model ranks designs; it does not predict times. The table therefore repeats the
result with barriers of half and twice the time.
"""

from dataclasses import dataclass, replace

FLOAT32, FLOAT64 = 4, 8
TEXTS, RANK, SIZE = 3500, 67, 60  # 64 entries per head and three that all heads share
TOGETHER = 48
"""Heads per call of the operation in :func:`clipfast.analyses.textspan.pursue`."""
WARP, WARPS = 32, 8


@dataclass(frozen=True)
class Device:
    """Rates and latencies; per clock of one multiprocessor unless noted.

    Attributes:
        clock: clocks per second.
        processors: multiprocessors of each GPC; a cluster must fit in one GPC.
        memory: bytes/s.
        cache: usable bytes of the L2 cache.
        shared: bytes of shared memory.
        reserved: bytes of shared memory that every block takes beyond its request.
        issued: warp instructions issued.
        float64: float64 multiply-adds.
        conversions: conversions from float32 to float64.
        shuffles: warp shuffle instructions.
        from_cache: bytes read from L2.
        load: latency in clocks of a load from L2 or from another block of the cluster.
        barrier: clocks of a cluster barrier, including the preceding writes to other blocks.
        reduction: clocks of a warp reduction by five shuffles.
    """

    clock: float = 1.98e9
    processors: tuple[int, ...] = (16,) * 6 + (18,) * 2
    memory: float = 4.3e12
    cache: float = 48e6
    shared: int = 228 * 1024
    reserved: int = 1024
    issued: float = 4
    float64: float = 64
    conversions: float = 16
    shuffles: float = 1
    from_cache: float = 64
    load: int = 300
    barrier: int = 600
    reduction: int = 250


H200 = Device()


@dataclass(frozen=True)
class Loop:
    """Warp instructions in one iteration of an inner loop, and its products of a text with a coordinate."""

    products: int
    issued: int
    float64: int
    conversions: int

    def clocks(self, device: Device, stored: int) -> float:
        """Clocks of one multiprocessor per product of a text with a coordinate."""
        lanes = self.products / WARP
        busiest = max(
            self.issued / device.issued,
            self.float64 * WARP / device.float64,
            self.conversions * WARP / device.conversions if stored == FLOAT32 else 0,
        )
        return busiest / lanes / WARP


# 4 texts × 8 coordinates a thread; its float64 are 40 products, 40 multiply-adds and 36 sums
TRITON = Loop(products=32 * WARP, issued=383, float64=116, conversions=32)
TRITON_SHUFFLES = {"without": 104, "covariance": 96}  # per warp, for 32 rows of `known` and of the covariance
TRITON_ROWS = 32
# 2 texts × 4 coordinates a thread
CLUSTER = Loop(products=8 * WARP, issued=42, float64=16, conversions=8)


def _up(count: int, to: int) -> int:
    return -(-count // to)


@dataclass(frozen=True)
class Cost:
    """Cost of all heads of one call.

    Attributes:
        seconds: total time.
        at_once: heads processed concurrently.
        step: clocks of one pick.
        sweep: the part of ``step`` that reads texts.
    """

    seconds: float
    at_once: int
    step: float
    sweep: float


def triton(
    device: Device, heads: int, texts: int = TEXTS, rank: int = RANK, size: int = SIZE, loop: Loop = TRITON
) -> Cost:
    """The Triton kernel: one program per head; texts come from L2, or from memory if they do not fit."""
    at_once = min(heads, sum(device.processors))
    if heads > at_once:  # in several waves
        waves, rest = heads // at_once, heads % at_once
        parts = [(waves, triton(device, at_once, texts, rank, size, loop))]
        parts += [(1, triton(device, rest, texts, rank, size, loop))] if rest else []
        return replace(parts[0][1], seconds=sum(times * part.seconds for times, part in parts))
    padded = _up(texts, 1024) * 1024 * _up(rank, 8) * 8  # whole tiles
    text_bytes = FLOAT32 * texts * rank
    sweep = max(padded * loop.clocks(device, FLOAT32), text_bytes / device.from_cache)
    if at_once * text_bytes > device.cache:
        sweep = max(sweep, at_once * text_bytes / device.memory * device.clock)
    known = sum(_up(step, TRITON_ROWS) for step in range(size)) / size
    shuffles = 3 * known * TRITON_SHUFFLES["without"] + _up(rank, TRITON_ROWS) * TRITON_SHUFFLES["covariance"]
    waits = 5 * device.load + 4 * device.reduction  # the text, `known` three times, the covariance; norms and the best
    step = sweep + shuffles * WARPS / device.shuffles + waits
    first = texts * rank * rank / device.float64 * heads / sum(device.processors)
    return Cost((size * step + first) / device.clock, at_once, step, sweep)


def shared_bytes(texts: int, rank: int, blocks: int, stored: int) -> int:
    """Shared memory of one block of a cluster, as laid out by ``Layout`` in ``csrc/cuda/span_kernel.h``."""
    share, rows = 2 * _up(_up(texts, blocks), 2), _up(rank, blocks)
    matrices, vectors = 2 * FLOAT64 * rows * rank, 4 * FLOAT64 * rank
    return stored * rank * share + FLOAT64 * share + matrices + vectors + 12 * blocks * WARPS


def cluster(
    device: Device,
    heads: int,
    blocks: int,
    texts: int = TEXTS,
    rank: int = RANK,
    size: int = SIZE,
    stored: int = FLOAT32,
) -> Cost | None:
    """``csrc/cuda/span_kernel.h``: a cluster of ``blocks`` blocks per head; None if they cannot hold the texts."""
    block_bytes = shared_bytes(texts, rank, blocks, stored) + device.reserved
    resident = min(3, device.shared // block_bytes)
    at_once = sum(count * resident // blocks for count in device.processors)
    if not at_once:
        return None
    share, rows = 2 * _up(_up(texts, blocks), 2), _up(rank, blocks)
    quarters = _up(_up(share, 2 * WARP), 4) * 4 * 2 * WARP  # the busiest of four schedulers, in whole warps
    sweep = quarters * rank * CLUSTER.clocks(device, stored)
    products = 3 * _up(rows, WARPS) * device.reduction
    small = 3 * device.reduction + products + 8 * rows * rank * FLOAT64 / 128  # the best twice, norms; matrices
    step = max(resident * sweep, sweep + small + device.load + 3 * device.barrier)
    first = resident * quarters * rank * rank / 2 / device.float64  # of a triangular factor
    waves = _up(heads, at_once)
    load = heads * stored * texts * rank / device.memory * device.clock
    return Cost((waves * (size * step + first) + load) / device.clock, at_once, step, sweep)


def best_cluster(device: Device, heads: int, stored: int = FLOAT32, texts: int = TEXTS) -> tuple[int, Cost]:
    """The cluster size with the least modelled time, and its cost; at run time the sizes are timed."""
    costs = {
        blocks: cost
        for blocks in range(1, 17)
        if (cost := cluster(device, heads, blocks, texts=texts, stored=stored)) is not None
    }
    blocks = min(costs, key=lambda size: costs[size].seconds)
    return blocks, costs[blocks]


CASES = (("one head", 1, 1), ("ViT-B-16", 144, TOGETHER), ("ViT-L-14", 384, TOGETHER))
"""Name, heads, and heads per call."""

HEADER = (
    "heads",
    "in calls of",
    "Triton, ms",
    "its loop as lean",
    "cluster, ms",
    "blocks",
    "at once",
    "gain (barriers × ½, × 2)",
)


def markdown(device: Device = H200) -> str:
    """The table as Markdown."""
    lines = [
        f"**Modelled, not measured**: H200 at {device.clock / 1e9:.2f} GHz and {device.memory / 1e12:.1f} TB/s;"
        f" {TEXTS:,} float32 texts of rank {RANK}, {SIZE} picks; every head of a model.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{' --- |' * len(HEADER)}",
    ]
    for name, heads, own in CASES:
        for together in sorted({own, heads}):
            calls = _up(heads, together)
            one, lean = triton(device, together), triton(device, together, loop=CLUSTER)
            blocks, other = best_cluster(device, together)
            gains = []
            for factor in (1.0, 0.5, 2.0):
                changed = replace(device, barrier=int(factor * device.barrier))
                gains.append(one.seconds / best_cluster(changed, together)[1].seconds)
            lines.append(
                f"| {name}: {heads} | {together} | {1e3 * calls * one.seconds:.2f} | {1e3 * calls * lean.seconds:.2f}"
                f" | {1e3 * calls * other.seconds:.2f}"
                f" | {blocks} | {other.at_once} | {gains[0]:.1f} ({gains[1]:.1f}, {gains[2]:.1f}) |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
