"""The device, sizes and measuring of :mod:`benchmarks.gpu_suite`.

A single operation is timed on the GPU's own clock, with its inputs out of the L2 cache: before each call a buffer that
is larger than the cache is written, which also hides the time that Python needs for the launch. A forward is timed by
the wall clock from an idle GPU to an idle GPU, which includes that time. The sides of a comparison run in turn in every
round, in rotated order, and the figure is the median of the rounds' ratios.
"""

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.results import Results
from clipfast.bench.measuring import Bar, Call, Check, Comparison, quantiles, require, seconds

Mode = Literal["eager", "graph", "compile", "max-autotune"]
"""How a forward runs: as Python calls it, as a CUDA graph, or through torch.compile."""

OP_LOW = 1e-2
"""Error bound of one bfloat16 operation by norm: rounding by 2⁻⁹ of every factor, accumulated in float32."""
EXACT = 1e-5
"""Error bound of what is computed in float32 from the given values."""
FLUSH = 256 * 2**20
"""Bytes written between two calls: more than any L2 cache (H100 50 MB, H200 60 MB, B200 126 MB)."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmarks.

    Attributes:
        models: models of the forward benchmarks, the most important first.
        modes: how both sides of the forward benchmarks run, the quickest to build first.
        batches: images per batch of the forward benchmarks, the most important first.
        batch: images per batch of single operations.
        rounds: interleaved rounds of a comparison.
        repeats: calls of a single operation per round.
        matmul: side of the square matrix product that gives the reference rate.
        copied: bytes of the copy that gives the reference bandwidth.
        texts: texts of the map benchmarks.
        pool: texts of the TEXTSPAN benchmark.
        attention: tokens of the attention benchmarks.
        heads: heads of single operations.
        width: width of the residual stream of single operations.
        spans: heads, rank and picks of the TEXTSPAN benchmark.
        specimens: how many kernels are run for sanitizers and bit equality, None for all.
        images: images of the specimens.
        runs: runs of the bit equality.
        tests: test files.
    """

    models: tuple[str, ...] = ("ViT-L-14", "ViT-B-32", "ViT-B-16")
    modes: tuple[Mode, ...] = ("eager", "graph", "compile", "max-autotune")
    batches: tuple[int, ...] = (256, 1, 8, 64)
    batch: int = 256
    rounds: int = 9
    repeats: int = 5
    matmul: int = 8192
    copied: int = 4 * 2**30
    texts: int = 100
    pool: int = 3500
    attention: tuple[int, ...] = (257, 197, 50, 577)
    heads: int = 16
    width: int = 1024
    spans: tuple[int, int, int] = (64, 64, 60)
    specimens: int | None = None
    images: int = 3
    runs: int = 200
    tests: tuple[str, ...] = (
        "tests/kernels/test_triton.py",
        "tests/kernels/test_cuda.py",
        "tests/test_graphs.py",
        "tests/test_compile.py",
        "tests/kernels/test_attention_ways.py",
        "tests/kernels/test_maps_ways.py",
        "tests/kernels/test_layers_ways.py",
        "tests/kernels/test_query_row.py",
        "tests/kernels/test_span.py",
        "tests/kernels/test_tuning.py",
        "tests/kernels/test_derived.py",
        "tests/test_transfer.py",
        "tests/analyses/test_moments.py",
    )


DRY = Sizes(
    models=("dry-run",),
    modes=("eager", "graph", "compile"),  # traced alone here, both kinds of compiled forwards are the same
    batches=(2,),
    batch=2,
    rounds=1,
    repeats=1,
    matmul=256,
    copied=2**20,
    texts=5,
    pool=40,
    attention=(17,),
    heads=2,
    width=64,
    spans=(2, 16, 6),
    specimens=2,
    images=1,
    runs=1,
    tests=("tests/kernels/test_derived.py",),
)
"""The smallest sizes: every step runs once, to show that the suite works; times mean nothing."""


@dataclass(frozen=True)
class Bench:
    """A device to measure on.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` for a dry run.
        sizes: sizes of the benchmarks.
        results: the file that cases are written to.
        say: prints a line.
    """

    device: str
    sizes: Sizes
    results: Results
    say: Callable[[str], None]

    @property
    def dry(self) -> bool:
        """Whether nothing is measured."""
        return self.device == "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that models compute in."""
        return torch.bfloat16

    def draw(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        """A random tensor on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype or self.dtype)

    def operation_seconds(self, call: Call) -> float:
        """Mean time of an operation with its inputs out of the cache, by the GPU's clock."""
        repeats = self.sizes.repeats
        if self.dry:
            return sum(seconds(call) for _ in range(repeats)) / repeats
        flush = torch.empty(FLUSH, dtype=torch.uint8, device=self.device)
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for begin, end in events:
            flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / 1e3 / repeats

    def rounds(
        self, sides: Mapping[str, Call], *, single: bool, warmup: int = 2, rounds: int | None = None
    ) -> dict[str, list[float]]:
        """Seconds of every side per round; in each round all sides run once, each round starts with the next one.

        Args:
            sides: by name.
            single: whether they are single operations, or forwards.
            warmup: rounds that do not count.
            rounds: rounds that count; default that of the sizes.
        """
        timed: Callable[[Call], float] = self.operation_seconds if single else seconds
        names = list(sides)
        times: dict[str, list[float]] = {name: [] for name in names}
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # a collection would count against the side it happens in
        try:
            for number in range(-warmup, rounds or self.sizes.rounds):
                start = number % len(names)
                for name in names[start:] + names[:start]:
                    taken = timed(sides[name])
                    if number >= 0:
                        times[name].append(taken)
        finally:
            if collecting:
                gc.enable()
        return times

    def compared(
        self,
        name: str,
        a: tuple[str, Call],
        b: tuple[str, Call],
        verify: Callable[[], Sequence[Check]],
        *,
        settings: dict[str, Any],
        bars: Callable[[Comparison], tuple[Bar, ...]] = lambda comparison: (),
        single: bool = True,
    ) -> Comparison:
        """Checks the results, times a against b, writes the case and prints a line."""
        checks = tuple(verify())
        require(checks)
        first, second = (a[0], b[0]) if a[0] != b[0] else (f"{a[0]} (a)", f"{b[0]} (b)")
        times = self.rounds({first: a[1], second: b[1]}, single=single)
        comparison = Comparison(tuple(times[first]), tuple(times[second]), checks)
        held = bars(comparison) if not self.dry else ()
        settings = {"cache": "flushed" if single else "as it is", "dtype": "bfloat16"} | settings
        self.results.compared(name, comparison, a=a[0], b=b[0], settings=settings, bars=held)
        outcome = "; ".join(str(bar) for bar in held)
        self.say(f"{name}: {comparison.ratio:.3f}x, error {comparison.error:.1e}{'; ' + outcome if outcome else ''}")
        return comparison

    def record(
        self,
        name: str,
        times: Mapping[str, Sequence[float]],
        *,
        settings: dict[str, Any],
        checks: Sequence[Check] = (),
        bars: Sequence[Bar] = (),
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a case with any number of sides and prints a line."""
        if checks:
            require(checks)
        held = [] if self.dry else list(bars)
        entry = {
            "settings": {"dtype": "bfloat16"} | settings,
            "checks": [check.to_json() for check in checks],
            "sides": {side: {"seconds": quantiles(each), "all": list(each)} for side, each in times.items()},
            "figures": dict(figures or {}),
            "bars": [bar.to_json() for bar in held],
        }
        self.results.write(name, entry)
        parts = [f"{side} {1e3 * statistics.median(each):.3f} ms" for side, each in times.items()]
        self.say(f"{name}: {'; '.join([*parts, *map(str, held)])}")

    def fastest(self, calls: Mapping[str, Call]) -> str:
        """The name of the fastest call that runs on this device.

        Raises:
            RuntimeError: none runs.
        """
        times: dict[str, float] = {}
        for name, call in calls.items():
            try:
                self.operation_seconds(call)
                times[name] = min(self.operation_seconds(call) for _ in range(3))
            except RuntimeError as error:
                self.say(f"  {name} does not run on this device: {str(error).splitlines()[0]}")
        if not times:
            raise RuntimeError("none of the calls runs on this device")
        return min(times, key=lambda name: times[name])


def ratio(times: Mapping[str, Sequence[float]], a: str, b: str) -> float:
    """How many times as fast as b a is: the median of the rounds' ratios."""
    return statistics.median(theirs / mine for mine, theirs in zip(times[a], times[b], strict=True))
