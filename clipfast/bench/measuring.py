"""Comparisons of two callables: correctness checks first, then interleaved pairs.

The speed of a machine drifts while it is measured (frequency, other programs, caches). The two sides therefore run in
pairs, A B then B A, and the figure is the median of the ratios of the pairs, not the ratio of two medians taken minutes
apart. Nothing is timed before the results are known to be right.
"""

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[], object]


class WrongResult(AssertionError):
    """A result exceeds its error bound; nothing is timed or recorded."""


@dataclass(frozen=True)
class Check:
    """One comparison with a result that is known to be right.

    Attributes:
        name: what was compared.
        error: the largest absolute difference.
        bound: the largest difference accepted.
    """

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound

    def to_json(self) -> dict[str, Any]:
        """The check in the layout of a result file; JSON has no NaN and no infinity."""
        error = self.error if math.isfinite(self.error) else str(self.error)
        return {"name": self.name, "error": error, "bound": self.bound}


def require(checks: Sequence[Check]) -> None:
    """Raises unless every check passes.

    Raises:
        WrongResult: naming every check that failed, or that there are none.
    """
    if not checks:
        raise WrongResult("no check was made, so the result may be wrong")
    wrong = [check for check in checks if not check.passed]
    if wrong:
        reasons = ", ".join(f"{check.name}: {check.error:.3g} > {check.bound:.3g}" for check in wrong)
        raise WrongResult(f"wrong result, not timed: {reasons}")


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Minimum, quantiles, median and maximum, with linear interpolation."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {
        "min": ordered[0],
        "q10": at(0.1),
        "q25": at(0.25),
        "median": statistics.median(ordered),
        "q75": at(0.75),
        "q90": at(0.9),
        "max": ordered[-1],
    }


@dataclass(frozen=True)
class Comparison:
    """The result of timing pairs.

    Attributes:
        seconds_a: per pair, in the order they ran.
        seconds_b: per pair.
        checks: the checks made before; empty for :func:`pairs` alone.
    """

    seconds_a: tuple[float, ...]
    seconds_b: tuple[float, ...]
    checks: tuple[Check, ...] = ()

    @property
    def ratios(self) -> tuple[float, ...]:
        """Per pair, seconds of b over seconds of a: how many times faster a is."""
        return tuple(b / a for a, b in zip(self.seconds_a, self.seconds_b, strict=True))

    @property
    def ratio(self) -> float:
        """Median of :attr:`ratios`."""
        return statistics.median(self.ratios)

    @property
    def error(self) -> float:
        """The largest error of the checks; NaN without any."""
        return max((check.error for check in self.checks), default=math.nan)

    def to_json(self, a: str, b: str) -> dict[str, Any]:
        """The comparison in the layout of a result file.

        Args:
            a: name of the first side.
            b: name of the second.
        """
        return {
            "checks": [check.to_json() for check in self.checks],
            "pairs": len(self.seconds_a),
            "a": {"name": a, "seconds": quantiles(self.seconds_a), "all": list(self.seconds_a)},
            "b": {"name": b, "seconds": quantiles(self.seconds_b), "all": list(self.seconds_b)},
            "ratio_b_over_a": quantiles(self.ratios) | {"all": list(self.ratios)},
        }


def synchronize() -> None:
    """Waits for the accelerator if one is in use."""
    torch = sys.modules.get("torch")  # without torch in the process nothing can be running
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def seconds(call: Call) -> float:
    """Wall time of one call. Its result is freed after the clock stops."""
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def pairs(a: Call, b: Call, *, pairs: int = 7, warmup: int = 2) -> Comparison:
    """Runs two callables in turn, A B, B A, A B, …, so that drift affects both.

    Args:
        a: the side whose speed is asked for.
        b: the side it is compared with.
        pairs: how many pairs count.
        warmup: how many pairs run before.

    Raises:
        ValueError: no pairs.
    """
    if pairs < 1:
        raise ValueError(f"pairs is {pairs}: at least one is needed")
    for _ in range(warmup):
        seconds(a)
        seconds(b)
    times_a: list[float] = []
    times_b: list[float] = []
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a garbage collection would count against the side it happens in
    try:
        for index in range(pairs):
            sides = [(a, times_a), (b, times_b)]
            for call, times in sides if index % 2 == 0 else reversed(sides):
                times.append(seconds(call))
    finally:
        if collecting:
            gc.enable()
    return Comparison(tuple(times_a), tuple(times_b))


def compare(a: Call, b: Call, verify: Callable[[], Sequence[Check]], *, count: int = 7, warmup: int = 2) -> Comparison:
    """:func:`pairs` after correctness checks: ``verify`` runs first, and nothing is timed when a check fails.

    Args:
        a: the side whose speed is asked for.
        b: the side it is compared with.
        verify: compares the results with ones known to be right.
        count: how many pairs count.
        warmup: how many pairs run before.

    Raises:
        WrongResult: a check failed, or none was made.
    """
    checks = tuple(verify())
    require(checks)
    measured = pairs(a, b, pairs=count, warmup=warmup)
    return Comparison(measured.seconds_a, measured.seconds_b, checks)


@dataclass(frozen=True)
class Bar:
    """A bar: a figure that the project promises.

    Attributes:
        what: what is measured.
        value: what was measured.
        limit: the value promised.
        at_least: whether the value must be at least the limit, or at most.
    """

    what: str
    value: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the bar is met."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{self.what} {self.value:.4g} (bar {sign} {self.limit:g}: {'met' if self.met else 'MISSED'})"

    def to_json(self) -> dict[str, Any]:
        """The bar in the layout of a result file."""
        return {
            "what": self.what,
            "value": self.value,
            "at_least" if self.at_least else "at_most": self.limit,
            "met": self.met,
        }
