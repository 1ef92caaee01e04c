"""The device, sizes and measuring of :mod:`benchmarks.gpu`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import Results
from clipfast.bench.measuring import Bar, Call, Check, Comparison, compare

LOW = 2e-2
"""Error bound of a bfloat16 forward with a unit-norm embedding, as in the tests."""
OP_LOW = 1e-2
"""Error bound of one bfloat16 operation relative to its largest result: rounding by 2⁻⁸, accumulated in sums."""
EXACT = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Sizes of the benchmarks.

    Attributes:
        models: models of the forward benchmarks, and the speed over eager that each promises (None: no promise).
        compiled: models also compared with ``torch.compile``, and the promised speed over it.
        batch: images per batch.
        pairs: interleaved pairs.
        repeats: calls per timing of a single operation.
        matmul: side of the square matrix product that gives the reference rate.
        texts: texts of the map benchmarks.
        pool: texts of the TEXTSPAN benchmark.
        attention: tokens, and the promised speed over the best SDPA backend.
    """

    models: tuple[tuple[str, float | None], ...] = (("ViT-L-14", 1.12), ("ViT-B-16", 1.15), ("ViT-B-32", None))
    compiled: tuple[tuple[str, float], ...] = (("ViT-L-14", 1.05),)
    batch: int = 256
    pairs: int = 9
    repeats: int = 10
    matmul: int = 8192
    texts: int = 100
    pool: int = 3500
    attention: tuple[tuple[int, float | None], ...] = ((257, 1.25), (577, 1.05), (197, None), (50, None))


DRY = Sizes(
    models=(("ViT-S-32-alt", None),),
    compiled=(),
    batch=2,
    pairs=1,
    repeats=1,
    matmul=256,
    texts=5,
    pool=40,
    attention=((17, None),),
)
"""The smallest sizes: every benchmark runs once, to show that the suite works; times mean nothing."""


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
    def dtype(self) -> torch.dtype:
        """The dtype that models compute in."""
        return torch.bfloat16

    def draw(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
        """A random tensor on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).to(dtype or self.dtype)

    def repeated(self, call: Call) -> Call:
        """Repeats a call ``sizes.repeats`` times, so that launches overlap as they do in a forward."""

        def calls() -> None:
            for _ in range(self.sizes.repeats):
                call()

        return calls

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
        calls = [self.repeated(call) if single else call for _, call in (a, b)]
        comparison = compare(calls[0], calls[1], verify, count=self.sizes.pairs)
        checked_bars = bars(comparison)
        settings = {"repeats": self.sizes.repeats if single else 1, "dtype": "bfloat16"} | settings
        self.results.compared(name, comparison, a=a[0], b=b[0], settings=settings, bars=checked_bars)
        outcome = "; ".join(str(bar) for bar in checked_bars)
        self.say(f"{name}: {comparison.ratio:.3f}x, error {comparison.error:.1e}{'; ' + outcome if outcome else ''}")
        return comparison
